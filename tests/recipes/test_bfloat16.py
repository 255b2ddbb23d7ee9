"""Every recipe in bfloat16, with activations computed again: the losses of float32 up to its rounding.

Run wherever the package trains, which is on a GPU where there is one; `-m gpu` asks for one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse_attn as hsa
from hf_sparse_attn.recipe import read_recipe
from hf_sparse_attn.shipped.byte_llama import load_model
from hf_sparse_attn.shipped.moving import load_moving_wan
from hf_sparse_attn.training.loop import train

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("yaml")

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = "sparse={method: sliding_window, params: {window: 96, sink: 16, block_size: 32}, min_tokens: 0}"
SCENES = "scenes={frames: 4, height: 12, width: 12, turn: 3, clips: 0}"
CHECKPOINTS = "gradient_checkpointing=true"
COMMON = ("steps=2", "seed=3", "batch=2", "optimizer.warmup_steps=0", "optimizer.schedule=constant")
RECIPES: dict[str, tuple[str, ...]] = {
    "llama_long_context": (
        "data.length=384",
        "data.needles=4",
        "held_out=null",
        "profile=null",
        WINDOW,
        "evaluation_lengths=[384]",
        "evaluation_samples=1",
        CHECKPOINTS,
    ),
    "distill_sparse": ("data.length=384", "data.needles=4", "evaluation_samples=1", WINDOW, CHECKPOINTS),
    "seer_gate": ("data.length=512", "data.needles=4", "evaluation_samples=1"),
    "duo_gate": ("data.length=384", "data.needles=4", "evaluation_samples=1"),
    "moving_wan_long": (SCENES, "held_out=1", CHECKPOINTS),
    "moving_wan_distill": (SCENES, "held_out=1", "student.steps=2", CHECKPOINTS),
    "moving_wan_vsa": (SCENES, "held_out=1", "schedule=null", "sparse.params={density: 0.5}", CHECKPOINTS),
}


def first_losses(name: str, folder: Path, precision: str) -> list[float]:
    settings = [*COMMON, *RECIPES[name], f"precision={precision}"]
    figures = train(read_recipe(name, settings), folder / precision, progress=False)
    assert math.isfinite(figures["loss"]) and figures["steps"] == 2
    log = [json.loads(line) for line in (folder / precision / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("where", ["here", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_in_bfloat16(name: str, where: str, tmp_path: Path) -> None:
    if "wan" in name:
        pytest.importorskip("diffusers")
    low, full = (first_losses(name, tmp_path, precision) for precision in ("bfloat16", "float32"))
    # bfloat16 keeps 8 bits: some products in a row are off by a few parts in a hundred.
    assert low != full and low[0] == pytest.approx(full[0], rel=0.05)
    result = tmp_path / "bfloat16" / "result"
    saved = {n: w for file in result.rglob("*.safetensors") for n, w in load_file(file).items()}
    # What duo_gate finds is a profile, without weights.
    assert bool(saved) == (name != "duo_gate") and all(
        w.dtype == torch.float32 and bool(w.isfinite().all()) for w in saved.values()
    )
    model: Any = load_moving_wan() if "wan" in name else load_model()
    if where == "cuda":
        model.to("cuda")
    with hsa.load_bundle(model, result) as bundle:
        assert bundle.figures["after"]
