"""A bundle comes off as a whole, or stays as a whole and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.recipe import SparseSettings
from hf_sparse_attn.training.lora.adapter import add_lora
from hf_sparse_attn.training.rope_scaling import scale_rope
from tests.support import tiny_lm
from tests.support.lora_cases import CASES, assert_same, shake, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

ROPE = {"type": "yarn", "factor": 2.0}
WINDOW = SparseSettings(method="sliding_window", params={"window": 24, "block_size": 16}, min_tokens=0)


def stretched_again(model: Any) -> Callable[[], object]:
    return scale_rope(model, ROPE)


def other_adapter(model: Any) -> Callable[[], object]:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "other")

    def undo() -> None:
        model.delete_adapter("other")
        model.set_adapter("default")

    return undo


def merged(model: Any) -> Callable[[], object]:
    layers = [m for m in model.modules() if hasattr(m, "unmerge")]
    for layer in layers:
        layer.merge()
    return lambda: [layer.unmerge() for layer in layers]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = add_lora(CASES["llama"].build(), CASES["llama"].plain)
    shake(adapter)
    undo = scale_rope(adapter.model, ROPE)
    hsa.save_bundle(
        tmp_path, model=adapter.model, base_model="x", adapter=adapter, sparse=WINDOW, rope=ROPE, figures={}, recipe={}
    )
    undo()
    return tmp_path


@pytest.mark.parametrize("later", [stretched_again, other_adapter, merged])
@pytest.mark.parametrize("by", ["remove", "with"])
def test_what_came_later_keeps_all_of_it_on(later: Any, by: str, saved: Path) -> None:
    model, ids = tiny_lm.FAMILIES["llama"]("sdpa"), tiny_lm.tokens(1, 111)
    before, config = snapshot(model), model.config.to_dict()
    with torch.no_grad():
        base = model(input_ids=ids).logits
        loaded = hsa.load_bundle(model, saved)
        undo = later(model)
        acts = model(input_ids=ids).logits
        for _ in range(2):
            with pytest.raises(ValueError, match=r"changed since|no other adapter|is merged into"):
                loaded.remove() if by == "remove" else loaded.__exit__(None, None, None)
            assert torch.equal(model(input_ids=ids).logits, acts)
            assert loaded.adapter.layers() and all(r.sparse_calls for r in loaded.patch.report().layers)
        undo()
        loaded.remove()
        loaded.remove()
        torch.testing.assert_close(model(input_ids=ids).logits, base)
    if later is stretched_again:
        assert_same(before, snapshot(model))
    assert model.config.to_dict() == config


def test_two_stretches_in_two_bundles_come_off_in_turn(tmp_path: Path) -> None:
    """The second is for a model that is stretched; the first stays whole until it is off."""
    model = tiny_lm.FAMILIES["llama"]("sdpa")
    folders = [tmp_path / name for name in ("first", "second")]
    undo = []
    for folder in folders:
        undo.append(scale_rope(model, ROPE))
        hsa.save_bundle(
            folder, model=model, base_model="x", adapter=None, sparse=WINDOW, rope=ROPE, figures={}, recipe={}
        )
    for one in reversed(undo):
        one()
    before = snapshot(model)
    first = hsa.load_bundle(model, folders[0])
    first.patch.remove()
    second = hsa.load_bundle(model, folders[1])
    with pytest.raises(ValueError, match="changed since"):
        first.remove()
    second.remove()
    first.remove()
    assert_same(before, snapshot(model))
