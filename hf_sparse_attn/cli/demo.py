"""`hf-sparse-attn demo`: the shipped model reads a long document densely and with each method, side by side."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.context import check_int
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.extras import need
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.profiling.head_maps import extent, pooled_attention
from hf_sparse_attn.profiling.observe import Call, capture
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.shipped.byte_llama import load_model, settings
from hf_sparse_attn.shipped.corpus import NeedleDocument, needle_document, next_byte_loss, score_needles
from hf_sparse_attn.tables import table

# Sixteen needles and their questions leave room for code from here on.
_SHORTEST = 576
# Squares along each side of an attention map.
_CELLS = 192


@dataclass(frozen=True)
class Row:
    """What one method did on the document.

    Args:
        method: name and parameters.
        density: kept share of the causal pairs, mean over layers and heads.
        error: relative error of the attention output, mean over layers, on the dense model's own q, k, v.
        loss: next-byte loss on the code in nats.
        needles: questions answered.
        seconds: forward passes, timed in turn with the dense ones.
        ratio: median time over that of dense attention.
    """

    method: str
    density: float
    error: float
    loss: float
    needles: int
    seconds: list[float]
    ratio: float


def compare(
    model: nn.Module,
    document: NeedleDocument,
    chosen: Sequence[tuple[str, dict[str, Any]]],
    rounds: int,
    progress: Any,
) -> list[Row]:
    """Runs the document densely and with each method; dense is the first row.

    Args:
        model: a causal language model over bytes.
        document: what to read.
        chosen: method names and parameters.
        rounds: timed forward passes of each, in turn, after one that is not timed.
        progress: called after every forward pass.
    """
    tokens = document.token_ids
    names = ["dense", *(f"{name}({', '.join(f'{k}={v}' for k, v in params.items())})" for name, params in chosen)]
    entries: list[tuple[str, dict[str, Any]]] = [("dense", {}), *chosen]
    reference = Reference(list(capture(model, tokens).values()))
    results: list[dict[str, Any]] = [{"seconds": []} for _ in entries]
    for turn in range(rounds + 1):
        for (name, params), result in zip(entries, results, strict=True):
            # Dense is the model as it is, without any patch.
            on = nullcontext() if name == "dense" else patch(model, name, min_tokens=0, **params)
            with on as applied, torch.no_grad():
                start = time.perf_counter()
                logits = model(tokens, use_cache=False).logits
                if turn:
                    result["seconds"].append(time.perf_counter() - start)
            progress()
            if turn:
                continue
            result["density"] = applied.report().density if applied is not None else 1.0
            result["error"] = 0.0 if applied is None else reference.compare(make_method(name, params)).output_error
            result["loss"] = next_byte_loss(logits, document)
            result["needles"] = sum(score_needles(logits, document))
    dense = statistics.median(results[0]["seconds"])
    return [
        Row(method=name, ratio=statistics.median(r["seconds"]) / dense, **r)
        for name, r in zip(names, results, strict=True)
    ]


def comparison_table(rows: Sequence[Row], document: NeedleDocument) -> str:
    """The rows as text."""
    dense = rows[0]
    lines = [
        (
            r.method,
            f"{r.density:.3f}",
            f"{r.error:.3f}",
            f"{r.loss:.3f}",
            f"{r.loss - dense.loss:+.3f}",
            f"{r.needles}/{len(document.needles)}",
            f"{r.ratio:.2f}",
            f"{min(r.seconds):.2f}-{max(r.seconds):.2f} s",
        )
        for r in rows
    ]
    columns = ("method", "density", "output error", "loss", "vs dense", "needles", "time ratio", "forward")
    title = f"{len(document)} bytes of {document.module} (standard library), {len(document.needles)} needles"
    return table(columns, lines, title, width=130)


def main(args: argparse.Namespace) -> str:
    """Runs the demo and returns what to print.

    Args:
        args: length (bytes), output (folder for the picture), threads (int or None), json (bool).

    Raises:
        ValueError: the model cannot read a document of that length.
    """
    from tqdm import tqdm

    if args.threads is not None:
        torch.set_num_threads(check_int("threads", args.threads, 1))
    # A folder that cannot be made must not cost what comes before the pictures.
    folder = make_folder(args.output)
    model = load_model()
    most = model.config.max_position_embeddings
    if not _SHORTEST <= args.length <= most:
        raise ValueError(f"`length` must be from {_SHORTEST} to {most} bytes for the shipped model, got {args.length}")
    document = needle_document(args.length, needles=16, seed=1)
    chosen, rounds = settings(args.length), 3
    with tqdm(total=(rounds + 1) * (len(chosen) + 1), desc="forward passes", unit="pass", leave=False) as bar:
        rows = compare(model, document, chosen, rounds, bar.update)
    pictures = draw(model, document, folder)
    if args.json:
        return json.dumps({"document": document.module, "length": len(document), "rows": [asdict(r) for r in rows],
                           "pictures": [str(p) for p in pictures]}, indent=2)  # fmt: skip
    note = (
        "density: kept share of the causal pairs. output error: relative, of the attention output, mean over layers.\n"
        "loss: nats per byte on the code. needles: keys asked for at the end whose four digits all come first.\n"
        f"time ratio: whole forward pass, median of {rounds}, dense = 1; {torch.get_num_threads()} threads."
    )
    drawn = "\n".join(f"attention maps: {p}" for p in pictures) or f"no picture: it {need('matplotlib')}"
    return f"{comparison_table(rows, document)}\n\n{note}\n{drawn}"


def draw(model: nn.Module, document: NeedleDocument, folder: Path) -> list[Path]:
    """Attention maps of three telling heads with the patterns of two methods over them, as PNG.

    Returns:
        the files written; none where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    seen = capture(model, document.token_ids)
    heads = _telling_heads(seen, document)
    methods = [make_method(name, params) for name, params in settings(len(document))[3::2]]
    figure = Figure(figsize=(4.2 * len(heads), 4.3 * len(methods) + 0.6), layout="constrained")
    axes = figure.subplots(len(methods), len(heads), squeeze=False)
    for line, method in zip(axes, methods, strict=True):
        for ax, (what, layer, head) in zip(line, heads, strict=True):
            q, k, _, ctx = seen[layer]
            group = q.shape[1] // k.shape[1]
            q, k = q[:, head : head + 1], k[:, head // group : head // group + 1]
            pattern = method.pattern_for(q, k, ctx)
            assert isinstance(pattern, BlockPattern)
            _draw_head(ax, q[0, 0], k[0, 0], ctx.softmax_scale, pattern)
            density = pattern.density("causal")
            ax.set_title(f"layer {layer}, head {head}: {what}\n{method.name}, density {density:.2f}", fontsize=10)
    figure.suptitle("attention (dark: much) and what the method keeps (orange)", fontsize=12)
    file = make_folder(folder) / "attention_maps.png"
    figure.savefig(file, dpi=110)
    return [file]


def _draw_head(ax: Any, q: Tensor, k: Tensor, scale: float, pattern: BlockPattern) -> None:
    n = len(q)
    weights = pooled_attention(q, k, scale, _CELLS).clamp(min=1e-4).log10()
    place = extent(n, _CELLS)
    ax.imshow(weights, cmap="Greys", vmin=-3.5, vmax=0, extent=place, interpolation="nearest")
    kept = pattern.reblock(pattern.block_q, 16).block_map()[0, 0].float()
    over = torch.zeros(*kept.shape, 4)
    over[..., 0], over[..., 1], over[..., 3] = 1.0, 0.5, 0.38 * kept
    rows, columns = len(kept) * pattern.block_q, kept.shape[1] * 16
    ax.imshow(over, extent=(0, columns, rows, 0), interpolation="nearest")
    # Whole cells and blocks reach beyond the last token.
    ax.set_xlim(0, n)
    ax.set_ylim(n, 0)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.tick_params(labelsize=8)


def _telling_heads(seen: dict[int, Call], document: NeedleDocument) -> list[tuple[str, int, int]]:
    """Three heads, as (what it does, layer, head): most on the needles, most on the start, most on the neighbourhood.

    Shares are of the attention of the positions that choose the digits of the answers.
    """
    asked = torch.tensor([p for positions, _ in document.questions for p in positions])
    stated = torch.tensor([p for _, positions in document.questions for p in positions])
    shares: dict[tuple[int, int], tuple[float, float, float]] = {}
    for layer, (q, k, _, ctx) in seen.items():
        group = q.shape[1] // k.shape[1]
        position = torch.arange(k.shape[2])
        for head in range(q.shape[1]):
            logits = q[0, head, asked] @ k[0, head // group].T * ctx.softmax_scale
            weights = logits.masked_fill(position > asked[:, None], -torch.inf).softmax(-1)
            near = weights.masked_fill(position <= asked[:, None] - 16, 0.0).sum(-1)
            needle = weights.gather(1, stated[:, None])
            shares[layer, head] = float(needle.mean()), float(weights[:, 0].mean()), float(near.mean())
    chosen: list[tuple[str, int, int]] = []
    for i, what in enumerate(("on the answer's digit", "on the first byte", "on the last 16 bytes")):
        # The heads of the first layer look at fixed distances: nothing to choose among for a method.
        free = [at for at in shares if at[0] > 0 and at not in {(layer, head) for _, layer, head in chosen}]
        best = max(free, key=lambda at: shares[at][i])
        chosen.append((f"{shares[best][i]:.0%} {what}", *best))
    return chosen
