"""Tables of measured figures, from the files that benchmarks, evaluations and training reports leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_sparse_attn.coverage import page as coverage_page
from hf_sparse_attn.tables import Table, markdown

# How contestants are called in the tables.
_KERNELS = {"cpp_block_sparse": "C++", "torch_gather": "gather", "flex_attention": "Flex"}
_LAYERS = {"llama prefill": "Llama", "wan step": "Wan"}


def figures(folder: Path) -> dict[str, str]:
    """Tables in Markdown by name; one whose file is not there is left out.

    Args:
        folder: where `coverage.json` and the folders `bench`, `eval` and `train` are (.github of the repository).
    """
    known: dict[str, tuple[str, Callable[[Any], Table | str]]] = {
        "kernels": ("bench/cpu_kernels.json", kernels),
        "layers": ("bench/cpu_auto.json", layers),
        "decoding": ("bench/cpu_decode.json", decoding),
        "quality": ("eval/eval.json", quality),
        "longer_context": ("train/llama_long_context.json", longer_context),
        "longer_video": ("train/wan_long_video.json", longer_video),
        "few_steps": ("train/step_distill.json", few_steps),
        "coverage": ("coverage.json", coverage_page.summary),
    }
    made = {}
    for name, (file, table) in known.items():
        document = read(folder / file)
        if document is not None:
            found = table(document)
            made[name] = found if isinstance(found, str) else markdown(*found)
    return made


def read(path: Path) -> Any:
    """A file of figures, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def kernels(document: dict[str, Any]) -> Table:
    """Speed-up over dense attention of each kernel at each density, and its share of 1 / density."""
    records = [r for r in document["kernels"] if r["reason"] is None]
    densities = sorted({r["density"] for r in records if r["contestant"] in _KERNELS})
    columns = [(name, density) for name in _KERNELS for density in densities]
    heads = [f"{_KERNELS[name]}, 1/{round(1 / density)}" for name, density in columns]
    rows = []
    for place in _ordered(records, "tokens", "dim", "dtype"):
        here = [r for r in records if (r["tokens"], r["dim"], r["dtype"]) == place]
        dense = min(r["median"] for r in here if r["contestant"].startswith("dense"))
        of = {(r["contestant"], r["density"]): r for r in here}
        cells = [f"{r['speedup']:.1f}x ({r['share_of_limit']:.2f})" if (r := of.get(c)) else "-" for c in columns]
        rows.append([f"{place[0]:,}", str(place[1]), place[2], f"{dense * 1000:,.0f} ms", *cells])
    return ("tokens", "dim", "dtype", "dense", *heads), rows


def layers(document: dict[str, Any]) -> Table:
    """Patched over unpatched time of whole layers, by method."""
    records = [r for r in document["auto"] if r["contestant"] not in ("unpatched", "dense")]
    methods = list(dict.fromkeys(r["contestant"] for r in records))
    of = {(r["model"], r["tokens"], r["contestant"]): r.get("ratio") for r in records}
    rows = []
    for model, tokens in sorted(_ordered(records, "model", "tokens")):
        ratios = [of.get((model, tokens, method)) for method in methods]
        rows.append([f"{_LAYERS.get(model, model)}, {tokens:,} tokens", *(_number(r) for r in ratios)])
    return ("layer", *methods), rows


def decoding(document: dict[str, Any]) -> Table:
    """Time of a step of generated text over that of transformers, by contestant."""
    records = [r for r in document["generation"] if r["reason"] is None]
    own, *others = dict.fromkeys(r["contestant"] for r in records)
    of = {(r["tokens"], r["dtype"], r["contestant"]): r for r in records}
    rows = []
    for tokens, dtype in _ordered(records, "tokens", "dtype"):
        ratios = [of.get((tokens, dtype, name), {}).get("ratio") for name in others]
        seconds = of[tokens, dtype, own]["median"]
        rows.append([f"{tokens:,}", dtype, f"{seconds * 1000:.0f} ms", *(_number(r) for r in ratios)])
    return ("tokens", "dtype", own, *others), rows


def quality(document: dict[str, Any]) -> Table:
    """The best single method of each figure at each density, the mix of the profiler, and dense."""
    language, video = ({r["subject"]: r["rows"] for r in document["results"]}[s] for s in ("language", "video"))
    for row in language:
        row["needles"] = sum(row["by_depth"]) / len(row["by_depth"])
    dense = language[0]
    rows = []
    for density in sorted({row["wanted"] for row in language if row["wanted"] is not None}):
        loss, best_loss = _best(language, density, "loss", min)
        needles, best_needles = _best(language, density, "needles", max)
        psnr, best_psnr = _best(video, density, "psnr", max)
        rows.append([
            f"1/{round(1 / density)}",
            f"{best_loss['loss']:.3f} ({best_loss['name']})", f"{loss:.3f}", f"{dense['loss']:.3f}",
            f"{best_needles['needles']:.2f} ({best_needles['name']})", f"{needles:.2f}", f"{dense['needles']:.2f}",
            f"{best_psnr['psnr']:.1f} dB ({best_psnr['name']})", f"{psnr:.1f} dB",
        ])  # fmt: skip
    others = ("profile", "dense")
    singles = [f"{figure}: best single" for figure in ("loss", "needles", "PSNR")]
    return ("density", singles[0], *others, singles[1], *others, singles[2], "profile"), rows


def longer_context(document: dict[str, Any]) -> Table:
    """Loss and needles at the new length, read sparse and dense, before and after training both ways."""
    length = max(int(key.rpartition("_")[2]) for key in document["unstretched"])
    runs = document["runs"]
    stages = {
        "as it is": (document["unstretched"], None),
        "positions stretched": (runs["sparse"]["before"], None),
        "fine-tuned sparse": (runs["sparse"]["after"], runs["sparse"]["cost"]),
        "fine-tuned dense": (runs["dense"]["after"], runs["dense"]["cost"]),
    }
    rows = []
    for name, (found, cost) in stages.items():
        cells = [
            f"{found[f'{what}_{how}_{length}']:{digits}}"
            for how in ("sparse", "dense")
            for what, digits in (("loss", ".3f"), ("needles", ".2f"))
        ]
        spent = ["-", "-"] if cost is None else [f"{cost['cpu_seconds']:.1f} s", f"{cost['peak'] / 2**30:.2f} GiB"]
        rows.append([name, *cells, *spent])
    read_as = ("read sparse: loss", "needles", "read dense: loss", "needles")
    return (f"at {length:,}", *read_as, "processor time of a step", "peak memory"), rows


def longer_video(document: dict[str, Any]) -> Table:
    """Flow loss and motion of the small Wan at each multiple of its length."""
    lengths = document["lengths"]
    columns = [c for n in lengths for c in (f"{n['times']} times: flow loss", "motion right", "error", "a step")]
    rows = []
    for name in lengths[0]["rows"]:
        cells = []
        for at in lengths:
            row, step = at["rows"][name], at["steps"][name.split()[0].rstrip(",")]
            spent = f"{step['processor_seconds']:.1f} s" if name.endswith("LoRA") else "-"
            cells += [f"{row['flow_loss']:.3f}", f"{row['right']:.2f}", f"{row['motion_error']:.1f} px", spent]
        rows.append([name, *cells])
    return ("", *columns), rows


def few_steps(document: dict[str, Any]) -> Table:
    """Motion, and what a clip costs, of teacher and students."""
    rows = [
        [
            name,
            f"{row['right']:.2f}",
            f"{row['motion_error']:.1f} px",
            f"{row['calls']:.0f}",
            f"{row['seconds']:.2g} s",
        ]
        for name, row in document["rows"].items()
    ]
    return ("", "motion right", "error", "model calls", "a clip"), rows


def _best(rows: Sequence[dict[str, Any]], density: float, figure: str, better: Any) -> tuple[float, dict[str, Any]]:
    """A figure of the profiler's mix at a density, and the best row among the single methods."""
    here = [row for row in rows if row["wanted"] == density]
    mixed = next(row[figure] for row in here if row["name"] == "per-head profile")
    # Some methods cannot keep as little as was asked.
    single = [row for row in here if row["name"] != "per-head profile" and row["density"] <= 1.2 * density]
    return mixed, better(single, key=lambda row: row[figure])


def _ordered(records: Sequence[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(r[key] for key in keys) for r in records))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
