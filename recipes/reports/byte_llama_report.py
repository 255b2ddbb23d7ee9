"""Measure the byte-level Llama on held-out documents: needles by depth, loss, and what each head attends to.

    python -m hf_sparse_attn.recipes.byte_llama_report --model assets/byte_llama --output report.md

The figures on the model card come from here.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_sparse_attn.shipped.corpus import NeedleDocument, needle_document, next_byte_loss, score_needles

_LOG = logging.getLogger(__name__)
_LOCAL_BYTES = 16
_QUARTERS = 4
# Far enough from the start that the first byte is not also a near one.
_FIRST_QUERY = 256


@dataclass(frozen=True)
class HeadFigures:
    """Where one head's attention goes, as shares of its mass, averaged over queries and documents.

    Args:
        layer: layer of the head.
        head: its index among the query heads.
        offset: the single distance back, from 0 to 15, that gets most.
        at_offset: share at that distance.
        local: share on the last 16 bytes, the current one included.
        first: share on the opening byte.
        needle: share that the positions choosing an answer's digits put on that digit where it is hidden.
    """

    layer: int
    head: int
    offset: int
    at_offset: float
    local: float
    first: float
    needle: float

    @property
    def kind(self) -> str:
        """One word for the head, retrieval first, since such heads rest on the opening byte in between."""
        if self.needle >= 0.3:
            return "retrieval"
        if self.at_offset >= 0.5:
            return f"offset {self.offset}"
        if self.first >= 0.4:
            return "sink"
        if self.local >= 0.5:
            return "local"
        return "spread"


@torch.no_grad()
def needle_table(model: PreTrainedModel, length: int, documents: int, first_seed: int) -> tuple[list[float], float]:
    """Measure documents of one length.

    Args:
        model: the model.
        length: bytes in each document.
        documents: how many, with 8 needles each.
        first_seed: seed of the first; the others follow.

    Returns:
        Share of needles answered for each quarter of the depth and for all of them, and the mean loss on the code.
    """
    hits: list[list[bool]] = [[] for _ in range(_QUARTERS)]
    losses = []
    for seed in range(first_seed, first_seed + documents):
        document = needle_document(length, 8, seed)
        logits = model(input_ids=document.token_ids, use_cache=False).logits
        losses.append(next_byte_loss(logits, document))
        for needle, answered in zip(document.needles, score_needles(logits, document), strict=True):
            hits[min(_QUARTERS - 1, int(needle.depth * _QUARTERS))].append(answered)
    together = [answered for quarter in hits for answered in quarter]
    return [sum(part) / max(1, len(part)) for part in [*hits, together]], sum(losses) / len(losses)


@torch.no_grad()
def head_figures(model: PreTrainedModel, length: int, documents: int, first_seed: int) -> list[HeadFigures]:
    """Look at every head over held-out documents.

    Args:
        model: a model whose attention gives its weights back ("eager").
        length: bytes in each document, more than 256.
        documents: how many.
        first_seed: seed of the first; the others follow.

    Returns:
        One entry for each head, layer by layer.
    """
    sums: dict[tuple[int, int], Tensor] = {}
    for seed in range(first_seed, first_seed + documents):
        document = needle_document(length, 8, seed)
        layers = model(input_ids=document.token_ids, use_cache=False, output_attentions=True).attentions
        for layer, weights in enumerate(layers):
            for head, shares in enumerate(weights[0]):
                figures = _head_sums(shares, document)
                sums[layer, head] = sums.get((layer, head), torch.zeros_like(figures)) + figures / documents
    found = []
    for (layer, head), figures in sums.items():
        near = figures[:_LOCAL_BYTES]
        offset = int(near.argmax())
        rest = [float(near[offset]), float(near.sum()), *figures[_LOCAL_BYTES:].tolist()]
        found.append(HeadFigures(layer, head, offset, *rest))
    return found


def _head_sums(shares: Tensor, document: NeedleDocument) -> Tensor:
    queries = torch.arange(_FIRST_QUERY, shares.shape[0])
    near = [shares[queries, queries - back].mean() for back in range(_LOCAL_BYTES)]
    asking = torch.tensor([at - 1 for needle in document.needles for at in needle.answer_positions])
    hidden = torch.tensor([at for needle in document.needles for at in needle.statement_positions])
    return torch.stack([*near, shares[queries, 0].mean(), shares[asking, hidden].mean()])


def report(folder: Path, lengths: Sequence[int], documents: int, first_seed: int) -> str:
    """Measure a model and write the figures as Markdown.

    Args:
        folder: where the model was saved.
        lengths: document lengths for the needles and the loss.
        documents: how many of each.
        first_seed: seed of the first document.

    Returns:
        Two tables.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = ["| bytes | depth 0-25 % | 25-50 % | 50-75 % | 75-100 % | all needles | nats per byte of code |"]
    lines.append("|---" * 7 + "|")
    for length in lengths:
        shares, loss = needle_table(model, length, documents, first_seed)
        cells = [str(length), *(f"{share:.3f}" for share in shares), f"{loss:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
        _LOG.info("%s", lines[-1])
    lines += [
        "",
        "| layer | head | kind | best offset | at it | last 16 bytes | first byte | needle |",
        "|---" * 8 + "|",
    ]
    model.set_attn_implementation("eager")
    for head in head_figures(model, 2048, min(documents, 8), first_seed):
        shares = [head.at_offset, head.local, head.first, head.needle]
        cells = [str(head.layer), str(head.head), head.kind, str(head.offset), *(f"{share:.2f}" for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and write the file."""
    parser = argparse.ArgumentParser(description="Measure the byte-level Llama of the demo.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the saved model")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--documents", type=int, default=32, help="documents of each length")
    parser.add_argument("--first-seed", type=int, default=1000, help="seed of the first document")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="document lengths")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    text = report(options.model, options.lengths, options.documents, options.first_seed)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
