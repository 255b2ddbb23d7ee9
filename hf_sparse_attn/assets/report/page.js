"use strict";
// Without this script the page still says everything: values stand in the cells and as titles.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Values under the pointer, the finger or the focus. Titles move into a box of our own: a browser's comes late, and
  // not at all for keys and fingers.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const hide = () => { tip.hidden = true; };
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const { clientWidth, clientHeight } = document.documentElement;
    tip.style.left = `${Math.max(4, Math.min(x + 14, clientWidth - width - 4))}px`;
    tip.style.top = `${y + 18 + height > clientHeight ? Math.max(4, y - height - 12) : y + 18}px`;
  };
  for (const cell of all("td[title], td a[title]")) {
    cell.dataset.tip = cell.title;
    cell.setAttribute("aria-label", cell.title);
    cell.removeAttribute("title");
  }
  for (const title of all(".plot title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }

  // Attention maps: a byte for each square, the highest bit for kept, the others the weight on a logarithmic scale.
  const decoded = new Map();
  const square = (image, row, column) => {
    if (!decoded.has(image)) decoded.set(image, atob(image.dataset.values));
    const side = Number(image.dataset.side);
    const [size, tokens] = [Number(image.dataset.size), Number(image.dataset.tokens)];
    const byte = decoded.get(image).charCodeAt(row * side + column);
    const level = byte & 127;
    const weight = level ? Number((10 ** (4 * (level / 127 - 1))).toPrecision(2)) : "at most 0.0001";
    const range = (at) => `${at * size} to ${Math.min((at + 1) * size, tokens) - 1}`;
    return `queries ${range(row)}, keys ${range(column)}: weight ${weight}, ${byte & 128 ? "kept" : "not kept"}`;
  };
  const place = (image, part, length) =>
    Math.max(0, Math.min(image.dataset.side - 1, Math.floor((part / length) * image.dataset.side)));
  const where = new Map();
  for (const image of all("img.pixels")) {
    image.tabIndex = 0;
    const at = () => {
      const [row, column] = where.get(image) ?? [0, 0];
      const box = image.getBoundingClientRect();
      const unit = box.width / image.dataset.side;
      show(square(image, row, column), box.left + (column + 0.5) * unit, box.top + (row + 0.5) * unit);
    };
    image.addEventListener("focus", () => { if (image.matches(":focus-visible")) at(); });
    image.addEventListener("keydown", (event) => {
      const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
      if (down === undefined) return;
      event.preventDefault();
      const last = image.dataset.side - 1;
      const [row, column] = where.get(image) ?? [0, 0];
      where.set(image, [Math.max(0, Math.min(last, row + down)), Math.max(0, Math.min(last, column + right))]);
      at();
    });
  }

  const point = (event) => {
    const found = event.target.closest?.("[data-tip], img.pixels");
    if (!found) return hide();
    if (found.dataset.tip) return show(found.dataset.tip, event.clientX, event.clientY);
    const box = found.getBoundingClientRect();
    const row = place(found, event.clientY - box.top, box.height);
    const column = place(found, event.clientX - box.left, box.width);
    where.set(found, [row, column]);
    show(square(found, row, column), event.clientX, event.clientY);
  };
  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("focusin", (event) => {
    const box = event.target.getBoundingClientRect();
    if (event.target.dataset.tip && event.target.matches(":focus-visible")) {
      show(event.target.dataset.tip, box.left + box.width / 2, box.bottom - 12);
    }
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // Maps of heads: one stop for the tab key, arrows from there.
  for (const map of all("table.map")) {
    const rows = [...map.tBodies[0].rows].map((row) => all("[data-tip]", row));
    rows.flat().forEach((cell, i) => { cell.tabIndex = i ? -1 : 0; });
    map.addEventListener("keydown", (event) => {
      const row = rows.findIndex((cells) => cells.includes(event.target));
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (row < 0 || !step) return;
      event.preventDefault();
      const next = rows[row + step[0]]?.[rows[row].indexOf(event.target) + step[1]];
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  // Tables are sorted by a click on a heading; what is not known comes last.
  for (const table of all("table.sort")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const numeric = heading.classList.contains("n");
      const value = (row) => {
        // Not by the letter of a method before its name.
        const cell = row.cells[column];
        const text = (cell.querySelector(".named > :last-child") ?? cell).textContent.trim();
        return numeric ? parseFloat(text) : text;
      };
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        // The largest number is what one looks for first.
        const order = { ascending: "descending", descending: "ascending" };
        const next = order[heading.getAttribute("aria-sort")] ?? (numeric ? "descending" : "ascending");
        const sign = next === "ascending" ? 1 : -1;
        const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
        const known = (row) => !Number.isNaN(value(row));
        const rows = [...body.rows];
        rows.sort((a, b) => known(b) - known(a) || (known(a) ? sign * compare(value(a), value(b)) : 0));
        for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", next);
        body.append(...rows);
      });
    });
  }
})();
