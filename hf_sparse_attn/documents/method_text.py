"""All there is to know of one method, as a plain record and as text for a terminal, its pattern drawn."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_sparse_attn
from hf_sparse_attn.api import default_device
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.documents import catalog
from hf_sparse_attn.documents.docstrings import default_text, fields_of, read, type_text
from hf_sparse_attn.documents.drawing import drawn_heads, made_up, pattern_of
from hf_sparse_attn.documents.figures import read as read_figures
from hf_sparse_attn.documents.method_page import measured, set_by
from hf_sparse_attn.method import NEEDS, READS, Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS, FAMILIES, METHODS
from hf_sparse_attn.tables import table

# What `hf-sparse-attn eval` wrote; in the repository, not in the wheel.
_EVALUATION = Path(hf_sparse_attn.__file__).parents[1] / ".github" / "eval" / "eval.json"
_LAYOUTS = {
    "causal text of 384 tokens": TokenLayout.causal(384),
    "text of 384 tokens": TokenLayout.bidirectional(384),
    "video of 6 frames of 8 x 8 tokens": TokenLayout.video(6, 8, 8),
}
_ANY_TEXT = "text of 384 tokens"
# Spots in a row of a picture, of as many tokens each; a spot is twice as high as it is wide.
_SPOTS = (48, 32, 24)
_SHADES = "·░▒▓█"
_GAP = "   "


def record(name: str, width: int) -> dict[str, Any]:
    """All there is to know of a method.

    Args:
        name: of the method.
        width: columns that its pictures may take.

    Returns:
        plain values: what its docstring says in parts, parameters, what it needs, the families and backends that run
        it, presets, measured figures, lines to try, and `patterns`: the share that is kept of the visible pairs, spot
        by spot (None where none is visible), of a small layout of every kind that it applies to.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    cls = METHODS.get(name)
    doc = read(cls.__doc__)
    patterns, problem = _patterns(cls)
    # Two heads beside each other.
    spots = next((spots for spots in _SPOTS if 2 * spots + len(_GAP) <= width), _SPOTS[-1])
    example = next((pattern for _, _, pattern in patterns), None)
    return {
        "name": name,
        "summary": doc.summary,
        "about": doc.chosen(deviations=False),
        "deviations": doc.chosen(deviations=True),
        "formula": doc.sections.get("Formula", ""),
        "when": " ".join(doc.sections.get("When", "").split()),
        "raises": " ".join(doc.sections.get("Raises", "").split()),
        "paper": cls.paper,
        "source": str(inspect.getsourcefile(cls)),
        "needs": {need: NEEDS[need] for need in sorted(cls.needs)},
        "reads": {part: READS[part] for part in sorted(cls.reads)},
        "static": cls.static,
        "trainable": cls.trainable,
        "by_steps": cls.by_steps,
        "knob": asdict(cls.knob) if cls.knob else None,
        "density set by": set_by(cls),
        "parameters": [
            {"name": field.name, "type": type_text(hint), "default": default_text(field), "meaning": said}
            for field, hint, said in fields_of(cls)
        ],
        "families": _families(cls),
        "backends": _backends(example, cls.trainable),
        "presets": _presets(name),
        "measured": [
            {"setting": setting, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
            for setting, (columns, rows) in measured(name, evaluation())
        ],
        "examples": list(_lines(cls)),
        "patterns": [
            {"method": label, "layout": layout, "heads": _shares(pattern, _LAYOUTS[layout], spots)}
            for label, layout, pattern in patterns
        ],
        "not_drawn": problem,
    }


def render(found: dict[str, Any], width: int) -> str:
    """A record as text.

    Args:
        found: as `record` gives it.
        width: columns of the terminal.
    """

    def wrapped(text: str, indent: str = "  ", further: str = "  ") -> str:
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)

    def section(title: str, *lines: str) -> list[str]:
        return [f"{title}\n" + "\n".join(lines)] if any(lines) else []

    def entry(head: str, text: str) -> str:
        return wrapped(head, further="    ") + (f"\n{wrapped(text, ' ' * 6, ' ' * 6)}" if text else "")

    kinds = [
        f"Tokens: {' and '.join(found['needs'].values()) or 'any layout'}.",
        f"Families: {', '.join(found['families']) or 'none of those that are here'}.",
        "Pattern: static, built once for a layout; nothing of a call is read." if found["static"]
        else f"Pattern: dynamic, from {' and '.join(['queries', 'keys', *found['reads'].values()])} of every call.",
        f"Gradient: {'may flow through it' if found['trainable'] else 'may not flow through it'}.",
        f"Density: set by {_knob(found)}.",
        *(["Steps: what is kept goes by the share of the denoising run."] if found["by_steps"] else []),
    ]  # fmt: skip
    parts = [
        f"{found['name']}\n{wrapped(found['summary'], '', '')}",
        *(wrapped(text, "", "") for text in found["about"] + found["deviations"]),
        *section("Formula", *(wrapped(line, further="    ") for line in found["formula"].splitlines())),
        *section("When to take it", wrapped(found["when"])),
        *section("Where it applies", *(wrapped(line, further="    ") for line in kinds)),
        *section(
            "Parameters",
            *(entry(f"{p['name']}: {p['type']}, default {p['default']}", p["meaning"]) for p in found["parameters"]),
        ),
        *section("Raises", wrapped(found["raises"])),
        *section("Backends here", *(entry(backend["name"], backend["why_not"]) for backend in found["backends"])),
        *section("Presets (quality=)", *(entry(*_preset(preset)) for preset in found["presets"])),
    ]
    for result in found["measured"]:
        columns = list(result["rows"][0])
        rows = [["dense" if row["method"] == "dense" else "sparse", *list(row.values())[1:]] for row in result["rows"]]
        shown = table(("", *columns[1:]), rows, width=width)
        parts += section("Measured", wrapped(f"{result['setting']}:"), shown)
    parts += section("Try", *(f"  {line}" for line in found["examples"]))
    parts += section("Source", wrapped(found["paper"]), f"  {found['source']}")
    return "\n\n".join([*parts, *_drawn(found, width)])


def evaluation() -> Any:
    """The measured figures, or None where they are not."""
    return read_figures(_EVALUATION)


def _patterns(cls: type[Method]) -> tuple[list[tuple[str, str, BlockPattern]], str]:
    """The method in words, the layout and the pattern for each kind of layout; and what kept it from being drawn."""
    try:
        method = cls(**cls.examples()[0])
        found: list[tuple[str, str, BlockPattern]] = []
        declined: list[str] = []
        for layout, tokens in _LAYOUTS.items():
            # Where text may be causal, that tells the most of it.
            if layout == _ANY_TEXT and found:
                continue
            pattern = pattern_of(method, tokens)
            if isinstance(pattern, Decline):
                declined.append(pattern.reason)
            else:
                # Gates are no words.
                plain = {key: value for key, value in method.params().items() if not hasattr(value, "parameters")}
                said = ", ".join(f"{key}={value}" for key, value in plain.items() if value not in (None, ""))
                found.append((f"{method.name}({said})", layout, pattern))
    # A method of somebody else's may want what only a model has.
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"
    return found, "" if found else "; ".join(declined)


def _shares(pattern: BlockPattern, layout: TokenLayout, columns: int) -> list[dict[str, Any]]:
    """Of each drawn head the share that is kept of the visible pairs, of all and spot by spot."""
    shape = columns // 2, columns
    found = []
    for name, kept, seen in drawn_heads(pattern, layout):
        spots = _sums(kept, shape) / _sums(seen, shape)
        rows = [[None if share != share else round(share, 3) for share in row] for row in spots.tolist()]
        found.append({"head": name, "density": round(float(kept.sum() / seen.sum()), 4), "spots": rows})
    return found


def _sums(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sums over the spots of a mask."""
    return torch.nn.functional.adaptive_avg_pool2d(mask[None], shape)[0]


def _families(cls: type[Method]) -> list[str]:
    """The families whose models the method may be put on."""
    return [
        name
        for name, family in FAMILIES.items()
        if cls.needs <= family.provides and cls.reads <= getattr(family, "reads", frozenset())
    ]


def _backends(pattern: BlockPattern | None, trainable: bool) -> list[dict[str, Any]]:
    """Whether each backend runs a pattern of the method here, forward and backward, or why not."""
    absent = {"runs": False, "backward": False}
    found: list[dict[str, Any]] = [{"name": name, **absent, "why_not": why} for name, why in BACKENDS.missing.items()]
    device = default_device()
    q, k = (x.to(device) for x in made_up(next(iter(_LAYOUTS.values()))))
    pattern = None if pattern is None else pattern.to(device)
    for name, backend in BACKENDS.items():
        forward, backward = (backend.why_not(pattern, q, k, k, needs_grad) for needs_grad in (False, True))
        why = forward or (f"forward alone: {backward}" if backward and trainable else "")
        found.append({"name": name, "runs": forward is None, "backward": backward is None, "why_not": why})
    return sorted(found, key=lambda entry: str(entry["name"]))


def _presets(name: str) -> list[dict[str, str]]:
    columns, rows = catalog.presets_table()
    own = [dict(zip(columns, row, strict=True)) for row in rows if row[columns.index("method")] == name]
    return [{key: value for key, value in row.items() if key != "method"} for row in own]


def _preset(row: dict[str, str]) -> tuple[str, str]:
    """What a preset sets, and where that is from and what was measured of it."""
    quality = "without one" if row["quality"] == catalog.DEFAULT else row["quality"]
    size = "" if row["models"] == "all" else f", {row['models']}"
    measured = "" if row["measured"] == catalog.NOT_MEASURED else f". Measured: {row['measured']}"
    return f"{quality}, {row['family']}{size}: {row['values']}", row["source"] + measured


def _knob(found: dict[str, Any]) -> str:
    knob = found["knob"]
    if knob is None:
        return " or ".join(found["density set by"]) or "no parameter"
    if knob["integer"]:
        return f"{knob['name']}, {knob['low']:g} or more"
    return f"{knob['name']}, from {knob['low']:g} to {knob['high']:g}"


def _lines(cls: type[Method]) -> Iterator[str]:
    """Lines to try, with the knob at its default where it has one."""
    params = {}
    for field, _, _ in fields_of(cls):
        if cls.reads and field.default == "":
            params[field.name] = json.dumps("FOLDER")
        elif cls.knob and field.name == cls.knob.name and field.default is not None:
            params[field.name] = json.dumps(field.default)
    given = "".join(f", {name}={value}" for name, value in params.items())
    yield f'hsa.patch(model, "{cls.name}"{given})'
    if "video grid" in cls.needs or not cls.needs:
        yield f"hf-sparse-attn sample moving_wan --method {cls.name} --compare"
    if "video grid" not in cls.needs and not cls.reads and cls.has_pattern():
        yield f'AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="hsa:{cls.name}")'


def _drawn(found: dict[str, Any], width: int) -> Iterator[str]:
    """The pictures, each with its heads beside one another where they fit."""
    if not found["patterns"]:
        yield textwrap.fill(f"Not drawn: {found['not_drawn']}", width)
        return
    for pattern in found["patterns"]:
        heads = [_picture(head) for head in pattern["heads"]]
        rows = [_GAP.join(cells).rstrip() for cells in zip(*heads, strict=True)]
        if max(map(len, rows)) > width:
            rows = [row.rstrip() for head in heads for row in head]
        yield "\n".join([textwrap.fill(f"{pattern['method']} on {pattern['layout']}", width), *rows])
    none, some, full = _SHADES[0], _SHADES[1], _SHADES[-1]
    yield textwrap.fill(
        f"{full} all pairs of a spot kept, {some} up to a quarter, {none} none, blank: none is visible. Queries go "
        "down, keys across.",
        width,
    )


def _picture(head: dict[str, Any]) -> list[str]:
    """A head's density and spots, as lines of one length."""
    most = len(_SHADES) - 1
    title = f"{head['head']}: {head['density']:.2f} of the pairs"
    rows = ["".join(" " if x is None else _SHADES[math.ceil(x * most)] for x in row) for row in head["spots"]]
    longest = max(len(title), len(rows[0]))
    return [line.ljust(longest) for line in (title, *rows)]
