"""Text models with what else transformers, accelerate and PEFT do to them, before and after patching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from tests.support.composed_text import (
    FULL,
    KINDS,
    assert_full_budget,
    assert_no_trace,
    attention_in,
    fresh,
    play,
)
from tests.support.patched import WINDOWED, assert_same_state, sparse_share, state_of
from tests.support.tiny_lm import FAMILIES, padded, tokens

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["q_proj", "v_proj"]
Undo = Callable[[], object] | None


# ------------------------------------------------------------------ what is done to a model; each gives its undoing


def lora(model: Any, tmp: Any) -> Undo:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), name)
    model.set_adapter(["a", "b"])
    return model.disable_adapters


def without_hooks(model: Any) -> Undo:
    return lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True)


def model_offload(model: Any, tmp: Any) -> Undo:
    accelerate.cpu_offload_with_hook(model, "cpu")
    return without_hooks(model)


def sequential_offload(model: Any, tmp: Any) -> Undo:
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    return None


def disk_offload(model: Any, tmp: Any) -> Undo:
    model.tie_weights()
    accelerate.disk_offload(model, tmp / "offloaded", "cpu", offload_buffers=True)
    return None


def dispatched(model: Any, tmp: Any) -> Undo:
    """What `device_map` does, with a hook on every module of the map though there is one device."""
    lists = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    above = {n[:i] for n in lists for i in range(len(n) + 1) if i == len(n) or n[i] == "."}
    places = {n: "cpu" for n, _ in model.named_modules() if n not in above and n.rpartition(".")[0] in {"", *above}}
    places.pop("", None)
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    return without_hooks(model)


def half(model: Any, tmp: Any) -> Undo:
    model.to(torch.bfloat16)
    return None


CHANGES = (lora, model_offload, sequential_offload, disk_offload, dispatched, half)


def named(change: Callable[..., Undo]) -> str:
    return change.__name__


def without_meta(found: Any) -> Any:
    """A state less the weights that are elsewhere while nothing runs."""
    return found[0], found[1], {k: v for k, v in found[2].items() if v.device.type != "meta"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_changed_before_and_after_the_patch(change: Callable[..., Undo], kind: str, tmp_path: Any) -> None:
    plain, before, after = (fresh(kind) for _ in range(3))
    undo = change(plain, tmp_path / "plain")
    changed = play(plain, kind)
    change(before, tmp_path / "before")
    state = without_meta(state_of(before))
    with hsa.patch(before, "dense"):
        assert torch.equal(play(before, kind), changed)
    with hsa.patch(before, **WINDOWED, strict=True) as patch:
        sparse = play(before, kind)
    assert sparse_share(patch.report().layers) == 1 and not torch.equal(sparse, changed)
    assert_full_budget(before, kind)
    assert_same_state(state, without_meta(state_of(before)))
    assert torch.equal(play(before, kind), changed)

    later = hsa.patch(after, **WINDOWED, strict=True)
    play(after, kind)
    back = change(after, tmp_path / "after")
    assert torch.equal(play(after, kind), sparse)
    assert sparse_share(later.report().layers) == 1
    later.remove()
    assert_no_trace(after)
    assert torch.equal(play(after, kind), changed)
    if undo is not None and back is not None:
        again = hsa.patch(after, **WINDOWED, strict=True)
        undo(), back()
        assert not torch.equal(play(after, kind), play(plain, kind))
        again.remove()
        assert_no_trace(after)
        assert torch.equal(play(after, kind), play(plain, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_while_patched(kind: str, tmp_path: Any) -> None:
    model = fresh(kind)
    model.save_pretrained(tmp_path / "plain")
    with hsa.patch(model, **WINDOWED):
        play(model, kind)
        model.save_pretrained(tmp_path / "patched")
    assert_no_trace(model)
    texts = [(tmp_path / name / "config.json").read_text() for name in ("plain", "patched")]
    assert texts[0] == texts[1] and "hsa" not in texts[0]
    plain, loaded = (
        type(model).from_pretrained(tmp_path / name, device_map="cpu", dtype=torch.float32).eval()
        for name in ("plain", "patched")
    )
    assert torch.equal(play(loaded, kind), play(plain, kind))
    with hsa.patch(plain, **WINDOWED), hsa.patch(loaded, **WINDOWED) as patch:
        assert torch.equal(play(loaded, kind), play(plain, kind))
    assert sparse_share(patch.report().layers) == 1
    assert_no_trace(loaded)


# ------------------------------------------------------------------ every way to generate

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams and sampling": {"num_beams": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.5},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "chunked prefill": {"prefill_chunk_size": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "itself"},
    "early exit": {"assistant_early_exit": 1},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True},
}
# These take one text alone.
SINGLE = ("prompt lookup", "assistant", "early exit")


def generate(model: Any, mode: str) -> torch.Tensor:
    ids, mask, _ = padded([23, 37], "left")
    if mode in SINGLE:
        ids, mask = ids[1:], mask[1:]
    options = {k: model if v == "itself" else v for k, v in MODES[mode].items()}
    torch.manual_seed(3)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, **{"do_sample": False, **options})
    return out if isinstance(out, torch.Tensor) else out.sequences


@pytest.mark.parametrize("mode", MODES)
def test_one_line_on_one_line_off(mode: str) -> None:
    model = FAMILIES["llama"]("sdpa")
    try:
        dense = generate(model, mode)
    except (RuntimeError, AssertionError) as error:
        if "offloaded" in mode:
            pytest.skip(f"needs an accelerator: {error}")
        raise
    before = state_of(model)
    ways: dict[str, dict[str, Any]] = {
        "dense": {"method": "dense"},
        "short": {"method": "sliding_window"},
        "full": FULL,
    }
    for name, how in ways.items():
        with hsa.patch(model, **how) as patch:
            assert torch.equal(generate(model, mode), dense), name
        assert (sparse_share(patch.report().layers) > 0) == (name == "full")
        assert torch.equal(generate(model, mode), dense)
    with hsa.patch(model, **{**WINDOWED, "window": 4, "sink": 1, "block_size": 16}) as patch:
        sparse = generate(model, mode)
    assert sparse_share(patch.report().layers) > 0 and sparse.shape == dense.shape and not torch.equal(sparse, dense)
    assert_same_state(before, state_of(model))
    assert torch.equal(generate(model, mode), dense)


@pytest.mark.parametrize("what", ["pipeline", "model"])
def test_text_generation_pipeline(what: str) -> None:
    import tokenizers
    import transformers

    vocabulary = {f"w{i}": i for i in range(97)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    model = FAMILIES["llama"]("sdpa")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = [" ".join(f"w{int(i)}" for i in row[0]) for row in (tokens(1, 61), tokens(1, 40, 1))]

    def write() -> list[str]:
        return [out[0]["generated_text"] for out in pipe(texts, batch_size=2, max_new_tokens=5, do_sample=False)]

    dense, before = write(), state_of(model)
    for name, how in {"dense": {"method": "dense"}, "full": FULL, "sparse": {**WINDOWED, "window": 4}}.items():
        with hsa.patch(pipe if what == "pipeline" else model, **how) as patch:
            assert (write() == dense) == (name != "sparse")
        assert (sparse_share(patch.report().layers) > 0) == (name != "dense")
        assert_same_state(before, state_of(model))
        assert write() == dense
    assert all(text.count("w") == n + 5 for text, n in zip(dense, (61, 40), strict=True))


def test_continuous_batching_is_refused() -> None:
    """Its paged cache needs attention that reads pages."""
    model = FAMILIES["llama"]("sdpa")
    before = state_of(model)
    with hsa.patch(model, **WINDOWED), pytest.raises(RuntimeError, match="continuous batching"):
        model.generate_batch([tokens(1, 37)[0].tolist()])
    assert_same_state(before, state_of(model))


# ------------------------------------------------------------------ training


def train(how: dict[str, Any] | None, tmp: Any, dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, Any]:
    """Two steps of Trainer on LoRA weights; the model of PEFT and the patch, which is still on."""
    import transformers

    base = FAMILIES["llama"]("sdpa")
    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    patch = None if how is None else hsa.patch(model, **how)
    arguments = transformers.TrainingArguments(
        **{"output_dir": str(tmp), "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [],
           "save_strategy": "no", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.05,
           "logging_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options}
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(4, 63)]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    if dtype is None:
        trainer.train()
    else:
        with attention_in(model, dtype):
            trainer.train()
    if patch is not None:
        trainer.save_model(str(tmp / "saved"))
        assert not [f for f in (tmp / "saved").iterdir() if f.is_file() and b"hsa" in f.read_bytes()]
    return model.eval(), patch


def adapters(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_" in n])


def test_trainer_with_lora(tmp_path: Any) -> None:
    plain, _ = train(None, tmp_path)
    dense, patch = train({"method": "dense"}, tmp_path)
    assert torch.equal(adapters(dense), adapters(plain))
    patch.remove()
    assert_no_trace(dense)
    # Training in float32 with attention in float64, and how far float32 is off.
    exact, low = (adapters(train(None, tmp_path, dtype)[0]) for dtype in (torch.float64, torch.float32))
    bound = 4 * (low - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    full, _ = train(FULL, tmp_path)
    assert (adapters(full) - exact).abs().max() <= bound
    sparse, patch = train({**WINDOWED, "strict": True}, tmp_path)
    assert sparse_share(patch.report().layers) == 1 and (adapters(sparse) - exact).abs().max() > 10 * bound
    # Merged while patched: as sparse as before, and once the patch is off the model that a merge without it gives.
    other, _ = train({**WINDOWED, "strict": True}, tmp_path)
    hsa.unpatch(other)
    twin, merged = other.merge_and_unload(), sparse.merge_and_unload()
    assert_no_trace(twin)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), merged.parameters(), strict=True))
    within = play(merged, "llama")
    patch.remove()
    assert_no_trace(merged)
    assert torch.equal(play(merged, "llama"), play(twin, "llama")) and not torch.equal(within, play(twin, "llama"))
    with hsa.patch(twin, **WINDOWED):
        assert torch.equal(play(twin, "llama"), within)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_accumulate(checkpointing: bool, tmp_path: Any) -> None:
    """Two batches of one are one batch of two, as far as they are without a patch."""
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    if checkpointing:
        parts["gradient_checkpointing"] = True
    plain = [adapters(train(None, tmp_path, **options)[0]) for options in ({}, parts)]
    bound = 4 * (plain[0] - plain[1]).abs().max() + 4 * torch.finfo(torch.float32).eps * plain[0].abs().max()
    runs = [train({**WINDOWED, "strict": True}, tmp_path, **options) for options in ({}, parts)]
    assert all(sparse_share(patch.report().layers) == 1 for _, patch in runs)
    one, two = (adapters(model) for model, _ in runs)
    assert (one - two).abs().max() <= bound < (one - plain[0]).abs().max()
    for model, patch in runs:
        patch.remove()
        assert_no_trace(model)
