"""LoRA adapters: what they train, what they leave alone, their gradients through sparse attention, and their files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.training.adapter_task import checkpoint_gradients
from hf_sparse_attn.training.lora import adapter as lora
from hf_sparse_attn.training.lora.adapter import Adapter, add_lora
from hf_sparse_attn.training.lora.settings import LoraSettings
from tests.support import tiny_hunyuan, tiny_lm, tiny_wan
from tests.support.lora_cases import CASES, LM, VIDEO, assert_same, shake, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

every_model = pytest.mark.parametrize("name", CASES)
CPU_BACKENDS = ("torch_reference", "torch_gather", "cpp_block_sparse")


def llama(**changes: Any) -> Any:
    return tiny_lm.FAMILIES["llama"]("sdpa", **changes)


# ------------------------------------------------------------------ what it trains


@every_model
@pytest.mark.parametrize("full", [False, True], ids=["matrices", "modules_in_full"])
def test_a_step_changes_the_named_weights_alone(name: str, full: bool) -> None:
    case = CASES[name]
    model, settings = case.build(), case.full if full else case.plain
    base = {id(p): p.detach().clone() for p in model.parameters()}
    kind = type(model)
    adapter = add_lora(model, settings)
    assert type(model) is kind and adapter.model is model
    trained = adapter.parameters()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    shake(adapter)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    case.run(model).float().square().mean().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained)
    matrices = {n for n in trained if ".lora_" in n}
    assert len(matrices) == 2 * len(lora.find_targets(case.build(), settings))
    in_full = {n for n in trained if ".modules_to_save." in n}
    assert matrices | in_full == set(trained) and bool(in_full) == full
    for wrapped in settings.trained:
        assert any(wrapped in n for n in in_full), wrapped
    assert all(torch.equal(p, base[id(p)]) for p in model.parameters() if id(p) in base)
    assert sum(id(p) in base for p in model.parameters()) == len(base)


@every_model
def test_it_starts_as_the_model_it_is_on(name: str) -> None:
    case = CASES[name]
    model = case.build()
    with torch.no_grad():
        expected = case.run(model)
        add_lora(model, case.full)
        assert torch.equal(case.run(model), expected)


def test_the_added_product_is_scaled_by_alpha_over_rank() -> None:
    model = llama()
    layer = model.model.layers[1].self_attn
    base = layer.q_proj.weight.detach().clone()
    shake(add_lora(model, LoraSettings(targets=("q_proj",), rank=4, alpha=6)))
    x = torch.randn(3, 32)
    a, b = layer.q_proj.lora_A["default"].weight, layer.q_proj.lora_B["default"].weight
    torch.testing.assert_close(layer.q_proj(x), x @ (base + 1.5 * b @ a).T)


def test_dropout_acts_in_training_alone() -> None:
    model = llama()
    adapter = add_lora(model, LoraSettings(targets=LM, dropout=0.5))
    shake(adapter)
    ids = tiny_lm.tokens(1, 21)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


# ------------------------------------------------------------------ off and on


@every_model
@pytest.mark.parametrize("patched", [False, True], ids=["dense", "patched"])
def test_disabled_gives_the_bits_of_the_base(name: str, patched: bool) -> None:
    case = CASES[name]
    model = case.build()
    if patched:
        hsa.patch(model, "sliding_window", window=24, sink=3, block_size=16, min_tokens=0, backend="torch_reference")
    expected = case.run(model)
    adapter = add_lora(model, case.full)
    shake(adapter)
    loss = case.run(model)
    flags = [p.requires_grad for p in model.parameters()]
    with adapter.disabled():
        assert torch.equal(case.run(model), expected)
        assert [p.requires_grad for p in model.parameters()] == flags
        with adapter.disabled():
            pass
        assert torch.equal(case.run(model), expected)
        # A graph that was made before, as a student's beside its teacher, is still good.
        loss.float().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters().values())
    assert not torch.equal(case.run(model), expected)
    with pytest.raises(RuntimeError, match="in it"), adapter.disabled():
        raise RuntimeError("in it")
    assert not torch.equal(case.run(model), expected)


@every_model
@pytest.mark.parametrize("order", ["alone", "patch_first", "patch_last", "patch_outlives"])
def test_remove_restores_everything(name: str, order: str) -> None:
    case = CASES[name]
    model = case.build()
    # Some weights train before, some do not: each gets its own back.
    for number, weight in enumerate(model.parameters()):
        weight.requires_grad_(number % 3 > 0)
    expected, before = case.run(model), snapshot(model)

    def patch() -> hsa.Patch:
        return hsa.patch(
            model, "sliding_window", window=24, sink=3, block_size=16, min_tokens=0, backend="torch_gather"
        )

    p = patch() if order == "patch_first" else None
    adapter = add_lora(model, case.full)
    p = patch() if order in ("patch_last", "patch_outlives") else p
    shake(adapter)
    case.run(model).float().sum().backward()
    if p is not None:
        assert p.report().density < 1
    if p is not None and order != "patch_outlives":
        p.remove()
    adapter.remove()
    adapter.remove()
    if p is not None:
        p.remove()
    assert_same(before, snapshot(model))
    assert torch.equal(case.run(model), expected)
    with pytest.raises(ValueError, match="it was removed"):
        adapter.parameters()
    with pytest.raises(ValueError, match="it was removed"), adapter.disabled():
        pass
    with add_lora(model, case.plain) as again:
        assert len(again.parameters()) > 0
    assert_same(before, snapshot(model))


def test_what_was_set_before_comes_back() -> None:
    model = llama()
    model.__dict__["_hf_peft_config_loaded"] = False
    add_lora(model, CASES["llama"].plain).remove()
    assert model.__dict__["_hf_peft_config_loaded"] is False and "peft_config" not in model.__dict__


def test_an_adapter_under_another_one_stays() -> None:
    from peft import LoraConfig

    model = llama()
    adapter = add_lora(model, CASES["llama"].plain)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "other")
    with pytest.raises(ValueError, match="must have no other adapter to remove this one, got other"):
        adapter.remove()
    assert len(adapter.parameters()) == 16
    model = llama()
    adapter = add_lora(model, CASES["llama"].plain)
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="q_proj was replaced"):
        adapter.remove()


# ------------------------------------------------------------------ seed and precision


def test_the_start_depends_on_the_seed_alone() -> None:
    def start(seed: int, dtype: torch.dtype = torch.float32, noise: int = 0, targets: Any = LM) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        adapter = add_lora(llama().to(dtype), LoraSettings(targets=targets, rank=3), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {n: p.detach().clone() for n, p in adapter.parameters().items()}

    first = start(1)
    for other in (start(1, noise=7), start(1, torch.bfloat16), start(1, targets=LM[::-1])):
        assert other.keys() == first.keys()
        assert all(torch.equal(first[n], other[n]) for n in first)
    second = start(2)
    for name, weight in first.items():
        assert (weight == 0).all() if "lora_B" in name else not torch.equal(weight, second[name]), name
    matrices = torch.cat([w.flatten() for n, w in first.items() if "lora_A" in n])
    # Uniform between -1 / sqrt(32) and that, as torch has it for 32 inputs.
    assert matrices.abs().max() <= 32**-0.5 and matrices.abs().max() > 0.95 * 32**-0.5
    assert len(matrices.unique()) > 0.9 * len(matrices)


@every_model
def test_weights_are_float32_on_a_model_of_lower_precision(name: str) -> None:
    case = CASES[name]
    model = case.build().to(torch.bfloat16)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.inputs().items()}
    with torch.no_grad():
        expected = case.run(model, **given)
    adapter = add_lora(model, case.full)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    shake(adapter, 1e-3)
    out = case.run(model, **given)
    assert out.dtype == expected.dtype == torch.bfloat16
    # Both are off the exact value by roundings of bfloat16, 2 ** -9 of it, in every layer.
    assert (out - expected).float().norm() < 0.1 * expected.float().norm()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters().values())
    with adapter.disabled(), torch.no_grad():
        assert torch.equal(case.run(model, **given), expected)


def test_a_module_of_two_dtypes_is_refused() -> None:
    model = llama().to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.float()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"`trained` must be modules of one dtype each, got model.layers.0.mlp"):
        add_lora(model, LoraSettings(targets=LM, trained=("mlp",)))
    assert_same(before, snapshot(model))


# ------------------------------------------------------------------ gradients


@dataclass(frozen=True)
class Ragged(Method):
    """Every head keeps other blocks, and the first and the last block of keys it may see."""

    block: int = 16

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> BlockPattern:
        n, causal = ctx.layout.q_len, ctx.layout.is_causal
        blocks = -(-n // self.block)
        draw = torch.Generator().manual_seed(11)
        keep = torch.rand(1, ctx.num_heads, blocks, blocks, generator=draw) < 0.3
        keep |= torch.eye(blocks, dtype=torch.bool)
        keep[..., 0] = True
        return BlockPattern.from_block_map(keep, self.block, self.block, n, n, causal=causal)


class LlamaGradients:
    """Llama, whose masked-dense form takes the mask as an input."""

    n = 111

    def build(self, dtype: torch.dtype) -> Any:
        return llama().to(dtype)

    def run(self, model: Any, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        ids = tiny_lm.tokens(2, self.n)
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf).expand(2, -1, -1, -1)
        return model(ids, attention_mask=bias, use_cache=False).logits

    def mask(self) -> Tensor:
        ctx = hsa.Context(hsa.TokenLayout.causal(self.n), num_heads=4, num_kv_heads=2, head_dim=8)
        return Ragged().pattern(None, None, ctx).to_dense()


@dataclass
class WanGradients:
    """Wan, whose masked-dense form has its attention function replaced."""

    grid: tuple[int, int, int] = (3, 3, 7)
    layers: int = 2

    def build(self, dtype: torch.dtype) -> Any:
        return tiny_wan.transformer(num_layers=self.layers).to(dtype)

    def run(self, model: Any, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        frames, height, width = self.grid
        given = tiny_wan.inputs(latents=(frames, 2 * height, 2 * width))
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        if mask is None:
            return tiny_wan.run(model, grad=True, **given)
        with tiny_wan.replaced_attention(mask, dtype):
            return tiny_wan.run(model, grad=True, **given)

    def mask(self) -> Tensor:
        ctx = hsa.Context(hsa.TokenLayout.video(*self.grid), num_heads=2, num_kv_heads=2, head_dim=12)
        return Ragged().pattern(None, None, ctx).to_dense()


GRADIENTS: dict[str, tuple[Any, LoraSettings]] = {
    "llama": (LlamaGradients(), LoraSettings(targets=LM, rank=3, trained=("embed_tokens", "norm"))),
    "wan": (WanGradients(), LoraSettings(targets=VIDEO, rank=3, trained=("norm2",))),
    # For the interpreter of Triton, which takes its time.
    "small_wan": (WanGradients((1, 7, 7), 1), LoraSettings(targets=VIDEO, rank=3)),
}


def gradients(
    name: str, dtype: torch.dtype, backend: str | None, checkpointing: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the adapter's weights: through a backend, or (None) masked dense."""
    case, settings = GRADIENTS[name]
    model = case.build(dtype)
    adapter = add_lora(model, settings)
    shake(adapter)
    model.train()
    if checkpointing:
        checkpoint_gradients(model)
    p = None if backend is None else hsa.patch(model, Ragged(), backend=backend, min_tokens=0, strict=True)
    out = case.run(model, case.mask() if p is None else None, dtype)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (out * weights).sum().backward()
    if p is not None:
        assert all(r.sparse_calls == 1 + checkpointing and not r.dense_calls for r in p.report().layers)
        assert 0 < p.report().density < 0.9
    return out.detach(), {n: w.grad.detach() for n, w in adapter.parameters().items()}


@pytest.fixture(scope="module")
def masked_dense() -> Callable[[str], tuple[dict[str, Tensor], dict[str, float]]]:
    """Gradients of masked-dense attention in float64, and how far each is off in float32."""
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            exact, low = gradients(name, torch.float64, None)[1], gradients(name, torch.float32, None)[1]
            known[name] = exact, {n: float((low[n] - g).abs().max()) for n, g in exact.items()}
        return known[name]

    return of


def assert_gradients(found: dict[str, Tensor], masked: Any) -> None:
    """At most 4 times as far from the exact gradients as masked-dense attention in the same precision."""
    exact, rounding = masked
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        size = gradient.abs().max()
        assert size > 0, name
        # Where that happened to round well: the unit of the largest entry, for each of its sums.
        allowed = 4 * rounding[name] + 16 * torch.finfo(torch.float32).eps * size
        assert (found[name] - gradient).abs().max() <= allowed, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["llama", "wan"])
def test_gradients_are_those_of_masked_dense_attention(
    name: str, backend: str, checkpointing: bool, masked_dense: Any
) -> None:
    if backend == "cpp_block_sparse":
        q = torch.zeros(1, 1, 64, 64, requires_grad=True)
        reason = BACKENDS.get(backend).why_not(None, q, q, q, True)
        if reason is not None:
            pytest.skip(reason)
    assert_gradients(gradients(name, torch.float32, backend, checkpointing)[1], masked_dense(name))


def test_the_mask_matters_to_the_gradients(masked_dense: Any) -> None:
    """What the test above allows is less than what a block more or less makes."""
    case, settings = GRADIENTS["llama"]
    model = case.build(torch.float32)
    adapter = add_lora(model, settings)
    shake(adapter)
    mask = case.mask()
    mask[:, 1, 64:80, 16:32] = ~mask[:, 1, 64:80, 16:32]
    out = case.run(model, mask, torch.float32)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    with pytest.raises(AssertionError):
        assert_gradients({n: w.grad for n, w in adapter.parameters().items()}, masked_dense("llama"))


def _interpreted(name: str) -> dict[str, Tensor]:
    return gradients(name, torch.float32, "triton_block_sparse")[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_gradients_through_the_triton_kernels(interpreter: Any, masked_dense: Any) -> None:
    assert_gradients(interpreter.submit(_interpreted, "small_wan").result(), masked_dense("small_wan"))


def test_a_backend_without_a_backward_pass_says_so() -> None:
    model = llama()
    add_lora(model, CASES["llama"].plain)
    p = hsa.patch(model, "sliding_window", window=24, sink=3, block_size=16, min_tokens=0, backend="flex_attention")
    ids = tiny_lm.tokens(1, 111)
    with pytest.raises(hsa.BackendUnavailable, match=r"flex_attention.*no backward on the CPU"):
        model(ids)
    p.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with hsa.patch(model, "sliding_window", window=24, sink=3, block_size=16, min_tokens=0, backend="torch_gather"):
        model(ids)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": ("q_prj",)}, r"`targets` must be modules of LlamaForCausalLM such as q_proj.*; got 'q_prj'"),
        ({"targets": (*LM, "self_attn.q_pro")}, r"such as self_attn.q_proj.*; got 'self_attn.q_pro'"),
        ({"targets": ("zzz",)}, r"such as down_proj, gate_proj, k_proj, lm_head, .*; got 'zzz'"),
        ({"targets": (r".*\.nothing",)}, r"`targets` must match a module of LlamaForCausalLM, got '\.\*"),
        ({"targets": (r".*\.(",)}, r"`targets` must be a regular expression, got"),
        ({"targets": ("embed_tokens",)}, r"`targets` must be linear modules, got model.embed_tokens, a Embedding"),
        ({"targets": ("input_layernorm",)}, r"`targets` must be modules that can get an adapter, got"),
        ({"targets": LM, "trained": ("nrm",)}, r"`trained` must be modules of LlamaForCausalLM such as norm.*'nrm'"),
        ({"targets": LM, "trained": ("rotary_emb",)}, r"`trained` must be modules of LlamaForCausalLM such as"),
        (
            {"targets": LM, "trained": ("v_proj",)},
            r"other modules than `targets`, got model.layers.0.self_attn.v_proj",
        ),
        ({"targets": LM, "trained": ("self_attn",)}, r"got model.layers.0.self_attn and model.layers.0.self_attn.q_"),
        ({"targets": LM, "trained": ("mlp", "up_proj")}, r"not inside one another, got model.layers.0.mlp.up_proj in"),
    ],
)
def test_names_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        add_lora(model, LoraSettings(**given))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("part", ["targets", "trained"])
def test_weights_that_are_not_in_memory_get_no_adapter(part: str) -> None:
    # As accelerate leaves those that it keeps on the disk: an adapter beside them would be nowhere, too.
    model = llama()
    (model.model.layers[1].self_attn.q_proj if part == "targets" else model.model.norm).to("meta")
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=f"`{part}` must be modules whose weights are in memory, got .* on meta"):
        add_lora(model, CASES["llama"].full)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_a_model_with_an_adapter_gets_no_second_one() -> None:
    model = llama()
    adapter = add_lora(model, CASES["llama"].plain)
    before = snapshot(model)
    with pytest.raises(ValueError, match="`model` must have no adapter yet, got one with 'default'"):
        add_lora(model, CASES["llama"].plain)
    assert_same(before, snapshot(model))
    model.__dict__.pop("peft_config")
    with pytest.raises(ValueError, match="got one with layers of peft"):
        add_lora(model, CASES["llama"].plain)
    assert not adapter._removed


def test_arguments_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="`model` must be a torch module, got a WanPipeline"):
        add_lora(tiny_wan.pipeline(), CASES["wan"].plain)
    with pytest.raises(TypeError, match="`settings` must be LoraSettings, got 3"):
        add_lora(llama(), 3)
    with pytest.raises(TypeError, match="`seed` must be an int"):
        add_lora(llama(), CASES["llama"].plain, seed=1.5)


def test_without_peft_the_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"a LoRA adapter needs peft \(pip install 'hf-sparse-attn\[train\]'\)"):
        add_lora(llama(), CASES["llama"].plain)


@pytest.mark.parametrize("where", ["_initialise", "_raise_precision"])
def test_a_failure_half_way_leaves_the_model(where: str, monkeypatch: Any) -> None:
    model, calls = llama(), []
    before = snapshot(model)
    original = getattr(lora, where)

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(lora, where, fails)
    with pytest.raises(KeyboardInterrupt):
        add_lora(model, CASES["llama"].full)
    assert_same(before, snapshot(model))


# ------------------------------------------------------------------ files


def trained(name: str, full: bool = False) -> tuple[Adapter, Tensor]:
    """An adapter away from its start, and what its model then gives."""
    case = CASES[name]
    adapter = add_lora(case.build(), case.full if full else case.plain)
    shake(adapter)
    with torch.no_grad():
        return adapter, case.run(adapter.model)


@every_model
@pytest.mark.parametrize("full", [False, True], ids=["matrices", "modules_in_full"])
def test_plain_peft_reads_what_is_saved(name: str, full: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter, expected = trained(name, full)
    adapter.save(tmp_path, "some/base")
    case = CASES[name]
    with torch.no_grad():
        assert torch.equal(case.run(PeftModel.from_pretrained(case.build(), tmp_path)), expected)
        model = case.build()
        again = lora.load_lora(model, tmp_path)
        settings = adapter.settings
        alpha = settings.rank if settings.alpha is None else settings.alpha
        assert again.settings == replace(settings, alpha=alpha, targets=tuple(sorted(settings.targets)))
        assert torch.equal(case.run(model), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["inference_mode"] is True


@every_model
def test_names_in_the_file_are_those_of_peft(name: str, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    adapter, _ = trained(name, True)
    adapter.save(tmp_path)
    wanted = get_peft_model_state_dict(adapter.model, save_embedding_layers=False)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.removeprefix("base_model.model.") for n in found} == set(wanted)
    assert all(torch.equal(found[f"base_model.model.{n}"], value) for n, value in wanted.items())
    assert {t.dtype for t in found.values()} == {torch.float32}


def reads_modules_in_full() -> bool:
    """transformers 5.17 does not read into modules that are trained in full."""
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


@pytest.mark.parametrize("name", ["llama", "qwen_vl"])
@pytest.mark.parametrize("full", [False, True], ids=["matrices", "modules_in_full"])
def test_transformers_reads_what_is_saved(name: str, full: bool, tmp_path: Path) -> None:
    if full and not reads_modules_in_full():
        pytest.skip("this version of transformers does not read into modules that are trained in full")
    adapter, expected = trained(name, full)
    adapter.save(tmp_path)
    model = CASES[name].build()
    model.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(CASES[name].run(model), expected)


def test_a_tied_head_keeps_its_weight(tmp_path: Path) -> None:
    from peft import PeftModel

    model, ids = llama(tie_word_embeddings=True), tiny_lm.tokens(1, 21)
    head = model.lm_head.weight
    adapter = add_lora(model, CASES["llama"].full)
    shake(adapter)
    assert model.lm_head.weight is head and not torch.equal(model.model.embed_tokens.weight, head)
    adapter.save(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
        assert torch.equal(again(ids).logits, model(ids).logits)


WEIGHT_NAME = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_pipelines_of_diffusers_read_what_is_saved(name: str, tmp_path: Path) -> None:
    adapter, expected = trained(name)
    adapter.save(tmp_path)
    pipe = tiny_wan.pipeline() if name == "wan" else tiny_hunyuan.pipeline()
    # The transformer of the case, which may be another than that of the tiny pipeline.
    pipe.transformer = CASES[name].build()
    pipe.load_lora_weights(str(tmp_path), weight_name=WEIGHT_NAME)
    with torch.no_grad():
        assert torch.equal(CASES[name].run(pipe.transformer), expected)
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (3, 5.5)
    pipe.unload_lora_weights()


def test_the_second_expert_reads_what_is_saved(tmp_path: Path) -> None:
    adapter, expected = trained("wan")
    adapter.save(tmp_path)
    pipe = tiny_wan.pipeline("experts")
    pipe.transformer_2 = tiny_wan.transformer(0)
    pipe.load_lora_weights(str(tmp_path), weight_name=WEIGHT_NAME, load_into_transformer_2=True)
    with torch.no_grad():
        assert torch.equal(CASES["wan"].run(pipe.transformer_2), expected)
    assert not hasattr(pipe.transformer, "peft_config")


def test_diffusers_with_modules_in_full_reads_all_or_refuses(tmp_path: Path) -> None:
    adapter, expected = trained("wan", True)
    adapter.save(tmp_path)
    pipe = tiny_wan.pipeline()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(str(tmp_path), weight_name=WEIGHT_NAME)
    pipe.transformer.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=WEIGHT_NAME)
    with torch.no_grad():
        assert torch.equal(CASES["wan"].run(pipe.transformer), expected)


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    trained("wan")[0].save(tmp_path)
    assert (tmp_path / WEIGHT_NAME).is_file()
    trained("llama")[0].save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _first_tensor(folder: Path, value: Tensor | None = None) -> None:
    """Takes a tensor away, or puts another in its place."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    first = min(state)
    del state[first]
    save_file(state if value is None else {**state, first: value}, folder / "adapter_model.safetensors")


def _text(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def _cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), "must hold adapter_config.json, which is missing"),
    "no_weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors, which is missing",
    ),
    "half_config": (lambda f: _cut(f, "adapter_config.json"), "must hold valid JSON"),
    "half_weights": (lambda f: _cut(f, "adapter_model.safetensors"), "got a damaged file"),
    "other_kind": (lambda f: _edit(f, peft_type="IA3"), "must hold a LoRA adapter"),
    "dora": (lambda f: _edit(f, use_dora=True), "must hold a plain LoRA adapter, got use_dora: True"),
    "patterns": (lambda f: _edit(f, alpha_pattern={"q_proj": 2}), "must hold a plain LoRA adapter, got alpha_pattern"),
    "rank": (lambda f: _edit(f, r=4), r"must hold .*lora_A.weight as torch.float32 \[4, 32\], got .*\[3, 32\]"),
    "rank_text": (lambda f: _edit(f, r="3"), "must hold a number as rank"),
    "rank_none": (lambda f: _edit(f, r=0), "must hold valid settings: `rank` must be at least 1"),
    "rank_huge": (
        lambda f: _edit(f, r=10**12),
        r"must hold .*lora_A.weight as .*\[1000000000000, 32\], got .*\[3, 32\]",
    ),
    "alpha": (
        lambda f: _text(f, '"lora_alpha": ', '"lora_alpha": 1e999, "was": '),
        "`alpha` must be more than 0 and fin",
    ),
    "later": (lambda f: _edit(f, use_later=True), "must hold a plain LoRA adapter, got use_later: True"),
    "targets": (lambda f: _edit(f, target_modules=["q_proj"]), "got .*k_proj.* besides"),
    "tensor": (_first_tensor, "got .* missing"),
    "nan": (lambda f: _first_tensor(f, torch.full((3, 32), torch.nan)), "must hold finite weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    trained("llama")[0].save(tmp_path)
    change, said = DAMAGE[damage]
    change(tmp_path)
    model = llama()
    before = snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        lora.load_lora(model, tmp_path)
    assert_same(before, snapshot(model))
