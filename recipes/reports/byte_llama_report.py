"""Measure the byte-level Llama on held-out documents: needles by depth, loss, and what each head attends to.

    python -m hf_sparse_attn.recipes.reports.byte_llama_report --model assets/byte_llama --output report.md

The figures on the model card come from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_sparse_attn.recipes.reports.page import pipes
from hf_sparse_attn.shipped.corpus import NeedleDocument, needle_document, next_byte_loss, score_needles

_LOCAL_BYTES = 16
_DEPTHS = ("depth 0-25 %", "25-50 %", "50-75 %", "75-100 %")
# Far enough from the start that the first byte is not also a near one.
_FIRST_QUERY = 256


def kind_of(offset: int, at_offset: float, local: float, first: float, needle: float) -> str:
    """One word for a head, retrieval first, since such heads rest on the opening byte in between.

    Args:
        offset: the single distance back, from 0 to 15, that gets most of its attention.
        at_offset: share of its attention at that distance, averaged over queries and documents as the others.
        local: share on the last 16 bytes, the current one included.
        first: share on the opening byte.
        needle: share that the positions choosing an answer's digits put on that digit where it is hidden.
    """
    if needle >= 0.3:
        return "retrieval"
    if at_offset >= 0.5:
        return f"offset {offset}"
    if first >= 0.4:
        return "sink"
    return "local" if local >= 0.5 else "spread"


@torch.no_grad()
def needle_table(model: PreTrainedModel, lengths: Sequence[int], documents: int, first_seed: int) -> str:
    """Share of needles answered by their depth, and the mean loss on the code, for documents of some lengths.

    Args:
        model: the model.
        lengths: bytes in each document.
        documents: how many of each, with 8 needles each.
        first_seed: seed of the first; the others follow.
    """
    rows = []
    for length in tqdm(lengths, "lengths", disable=None):
        hits: list[list[bool]] = [[] for _ in _DEPTHS]
        losses = []
        for seed in range(first_seed, first_seed + documents):
            document = needle_document(length, 8, seed)
            logits = model(input_ids=document.token_ids, use_cache=False).logits
            losses.append(next_byte_loss(logits, document))
            for needle, answered in zip(document.needles, score_needles(logits, document), strict=True):
                hits[min(len(_DEPTHS) - 1, int(needle.depth * len(_DEPTHS)))].append(answered)
        parts = zip(
            (*_DEPTHS, "all needles"), [*hits, [answered for quarter in hits for answered in quarter]], strict=True
        )
        shares = {title: f"{sum(part) / max(1, len(part)):.3f}" for title, part in parts}
        rows.append({"bytes": str(length), **shares, "nats per byte of code": f"{sum(losses) / len(losses):.3f}"})
    return pipes(rows)


@torch.no_grad()
def head_table(model: PreTrainedModel, length: int, documents: int, first_seed: int) -> str:
    """Where each head looks, over held-out documents, layer by layer.

    Args:
        model: a model whose attention gives its weights back ("eager").
        length: bytes in each document, more than 256.
        documents: how many.
        first_seed: seed of the first; the others follow.
    """
    sums: dict[tuple[int, int], Tensor] = {}
    for seed in range(first_seed, first_seed + documents):
        document = needle_document(length, 8, seed)
        layers = model(input_ids=document.token_ids, use_cache=False, output_attentions=True).attentions
        for layer, weights in enumerate(layers):
            for head, shares in enumerate(weights[0]):
                figures = _head_sums(shares, document)
                sums[layer, head] = sums.get((layer, head), torch.zeros_like(figures)) + figures / documents
    rows = []
    for (layer, head), figures in sums.items():
        near = figures[:_LOCAL_BYTES]
        offset = int(near.argmax())
        told = [float(near[offset]), float(near.sum()), *figures[_LOCAL_BYTES:].tolist()]
        row = {"layer": str(layer), "head": str(head), "kind": kind_of(offset, *told), "best offset": str(offset)}
        titles = ("at it", "last 16 bytes", "first byte", "needle")
        rows.append(row | {title: f"{share:.2f}" for title, share in zip(titles, told, strict=True)})
    return pipes(rows)


def _head_sums(shares: Tensor, document: NeedleDocument) -> Tensor:
    queries = torch.arange(_FIRST_QUERY, shares.shape[0])
    near = [shares[queries, queries - back].mean() for back in range(_LOCAL_BYTES)]
    asking = torch.tensor([at - 1 for needle in document.needles for at in needle.answer_positions])
    hidden = torch.tensor([at for needle in document.needles for at in needle.statement_positions])
    return torch.stack([*near, shares[queries, 0].mean(), shares[asking, hidden].mean()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and write the file."""
    parser = argparse.ArgumentParser(description="Measure the byte-level Llama of the demo.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the saved model")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--documents", type=int, default=32, help="documents of each length")
    parser.add_argument("--first-seed", type=int, default=1000, help="seed of the first document")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="document lengths")
    options = parser.parse_args(arguments)
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    needles = needle_table(model, options.lengths, options.documents, options.first_seed)
    model.set_attn_implementation("eager")
    heads = head_table(model, 2048, min(options.documents, 8), options.first_seed)
    options.output.write_text(f"{needles}\n\n{heads}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
