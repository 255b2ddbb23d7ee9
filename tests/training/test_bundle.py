"""Bundles: what is saved comes back on a model, comes off again without a trace, and nothing else is taken for one."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import StepPlan
from hf_sparse_attn.recipe import SparseSettings
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.sharing import gates
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.training import rope_scaling
from hf_sparse_attn.training.bundle import bundle
from hf_sparse_attn.training.bundle import file as bundle_file
from hf_sparse_attn.training.bundle.card import card
from hf_sparse_attn.training.lora import adapter as lora_adapter
from hf_sparse_attn.training.lora import file as lora_file
from hf_sparse_attn.training.lora.adapter import Adapter, add_lora
from hf_sparse_attn.training.sparse import make_patch
from tests.support import tiny_lm, tiny_wan
from tests.support.lora_cases import CASES, assert_same, shake, snapshot
from tests.support.processes import run_code

pytestmark = pytest.mark.usefixtures("one_thread")

every_model = pytest.mark.parametrize("name", CASES)
WINDOW = SparseSettings(
    method="sliding_window",
    params={"window": 24, "sink": 3, "block_size": 16},
    backend="torch_reference",
    min_tokens=0,
)
# For clips of 18 tokens.
NARROW = SparseSettings(
    method="sliding_window", params={"window": 5, "sink": 1, "block_size": 16}, backend="torch_reference", min_tokens=0
)
FIGURES = {"before": {"loss": 2.5}, "after": {"loss": np.float32(1.25), "accuracy": math.nan}, "steps": 7}
RECIPE = {"recipe": "test", "lora": {"rank": 3, "targets": ["q_proj"]}, "data": Path("some/where")}


def save(folder: Path, adapter: Adapter | None, model: Any = None, **given: Any) -> None:
    """Saves a bundle, of the sliding window unless told otherwise."""
    parts: dict[str, Any] = dict(
        model=adapter.model if model is None and adapter is not None else model, base_model="some/base",
        adapter=adapter, sparse=WINDOW, figures=FIGURES, recipe=RECIPE,
    )  # fmt: skip
    hsa.save_bundle(folder, **{**parts, **given})


def trained(name: str, full: bool = True) -> Adapter:
    case = CASES[name]
    adapter = add_lora(case.build(), case.full if full else case.plain)
    shake(adapter)
    return adapter


def output(name: str, model: Any, **changes: Any) -> Tensor:
    with torch.no_grad():
        return CASES[name].run(model, **changes)


def llama(**changes: Any) -> Any:
    return tiny_lm.FAMILIES["llama"]("sdpa", **changes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a bundle for the tiny Llama."""
    save(tmp_path / "bundle", trained("llama"))
    return tmp_path / "bundle"


# ------------------------------------------------------------------ there and back


@every_model
def test_what_is_saved_comes_back_and_off_again(name: str, tmp_path: Path) -> None:
    adapter = trained(name)
    with make_patch(adapter.model, WINDOW):
        expected = output(name, adapter.model)
        save(tmp_path, adapter)
    model = CASES[name].build()
    base, before = output(name, model), snapshot(model)
    kind = type(model)
    with hsa.load_bundle(model, tmp_path) as loaded:
        assert type(model) is kind
        assert torch.equal(output(name, model), expected) and not torch.equal(expected, base)
        report = loaded.patch.report()
        assert report.method == "sliding_window" and report.density < 1
        assert {b for r in report.layers if r.sparse_calls for b in r.backends} == {"torch_reference"}
        assert loaded.figures == {"before": {"loss": 2.5}, "after": {"loss": 1.25, "accuracy": None}, "steps": 7}
        assert loaded.recipe == {**RECIPE, "data": "some/where"} and loaded.base_model == "some/base"
        assert not any(p.requires_grad for p in model.parameters())
    loaded.remove()
    assert_same(before, snapshot(model))
    assert torch.equal(output(name, model), base)


def test_without_its_sparse_attention(saved: Path) -> None:
    adapter = trained("llama")
    model = llama()
    loaded = hsa.load_bundle(model, str(saved), patch=False)
    assert loaded.patch is None and torch.equal(output("llama", model), output("llama", adapter.model))
    for weight in loaded.adapter.parameters().values():
        weight.requires_grad_(True)
    CASES["llama"].run(model).sum().backward()


def test_an_adapter_alone_and_sparse_attention_alone(tmp_path: Path) -> None:
    adapter = trained("llama")
    save(tmp_path / "dense", adapter, sparse=None)
    with hsa.load_bundle(llama(), tmp_path / "dense") as loaded:
        assert loaded.patch is None and loaded.adapter is not None
    save(tmp_path / "sparse", None, llama())
    model = llama()
    flags = [p.requires_grad for p in model.parameters()]
    with hsa.load_bundle(model, tmp_path / "sparse") as loaded:
        assert loaded.adapter is None and loaded.patch.report().method == "sliding_window"
        assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ValueError, match="`patch` must be True for a bundle without an adapter"):
        hsa.load_bundle(llama(), tmp_path / "sparse", patch=False)


def test_all_settings_come_back(tmp_path: Path) -> None:
    sparse = SparseSettings(
        method="radial", params={"decay": math.inf, "block_size": 32}, backend="torch_gather", dense_layers=(1,),
        dense_steps=(0.25, 0.5), min_tokens="auto",
    )  # fmt: skip
    save(tmp_path, trained("wan"), sparse=sparse, rope={"type": "yarn", "factor": 4.0, "mscale": [1, 2.5]}, part="")
    folder, found = bundle.fetch(tmp_path)
    assert found.settings_in(folder) == sparse
    assert found.rope == {"type": "yarn", "factor": 4.0, "mscale": [1, 2.5]}
    assert found.fingerprint == Fingerprint.of(CASES["wan"].build())
    assert {"torch", "peft"} <= set(found.versions)


def profile_of(model: Any) -> hsa.HeadProfile:
    """Every layer: its first head dense, the others in the window."""
    made = Fingerprint.of(model)
    choice = np.ones((made.layers, made.heads), np.int16)
    choice[:, 0] = 0
    methods = (hsa.get_method("dense")(), hsa.get_method("sliding_window")(window=24, sink=3, block_size=16))
    figures = {"density": np.full((1, made.layers, made.heads), 0.5, np.float32)}
    return hsa.HeadProfile(
        model=made, methods=methods, plans=(StepPlan((0.0, 1.0), choice),), figures=figures, metric="output_error",
        budget={"density": 0.5}, calibration={"source": "none"},
    )  # fmt: skip


@pytest.mark.parametrize("how", ["named", "given"])
def test_a_profile_is_in_the_bundle(how: str, tmp_path: Path) -> None:
    adapter = trained("llama")
    made = profile_of(adapter.model)
    made.save_pretrained(tmp_path / "elsewhere")
    if how == "named":
        sparse = SparseSettings(method=str(tmp_path / "elsewhere"), backend="torch_reference", min_tokens=0)
        save(tmp_path / "bundle", adapter, sparse=sparse)
    else:
        save(tmp_path / "bundle", adapter, profile=made)
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "bundle").rename(tmp_path / "moved")
    with hsa.patch(adapter.model, made, backend="torch_reference", min_tokens=0):
        expected = output("llama", adapter.model)
    model = llama()
    before = snapshot(model)
    with hsa.load_bundle(model, tmp_path / "moved") as loaded:
        assert loaded.patch.report().method == "head_profile"
        assert torch.equal(output("llama", model), expected)
    assert_same(before, snapshot(model))
    save(tmp_path / "moved", adapter, profile=made, sparse=None)
    assert hsa.load_bundle(llama(), tmp_path / "moved").patch.method.profile.model == made.model


@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Takes gates and keeps everything."""

    gates: str = ""

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        return hsa.BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, causal=ctx.layout.is_causal, block=64)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the method, known while a test runs: others run over all methods."""
    METHODS.discover()
    with monkeypatch.context() as patched:
        patched.setitem(METHODS._entries, "gated_for_the_bundle_test", Gated)
        patched.setattr(Gated, "name", "gated_for_the_bundle_test")
        yield "gated_for_the_bundle_test"


class Gates:
    """Stands for a GateSet: one number."""

    def __init__(self, model: Fingerprint, value: int) -> None:
        self.model, self.value = model, value

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "gates.json").write_text(json.dumps([vars(self.model), self.value]))

    @classmethod
    def load(cls, folder: Any) -> Gates:
        model, value = json.loads((Path(folder) / "gates.json").read_text())
        return cls(Fingerprint(**model), value)

    def check(self, model: Any) -> None:
        assert self.model == Fingerprint.of(model)


@pytest.mark.parametrize("how", ["named", "given", "live"])
def test_gates_are_in_the_bundle(how: str, gated: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "hf_sparse_attn.sharing.gates", types.SimpleNamespace(GateSet=Gates))
    model = llama()
    gates = Gates(Fingerprint.of(model), 7)
    gates.save(tmp_path / "elsewhere")
    params: dict[str, Any] = {"gates": gates if how == "live" else str(tmp_path / "elsewhere")}
    sparse = SparseSettings(method=gated, params=params, min_tokens=0)
    given = {"gates": Gates(gates.model, 8)} if how == "given" else {}
    save(tmp_path / "bundle", None, model, sparse=sparse, **given)
    shutil.rmtree(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with hsa.load_bundle(llama(), "bundle") as loaded:
        where = loaded.patch.method.gates
        assert Path(where).is_absolute() and Gates.load(where).value == (8 if how == "given" else 7)
    assert str(tmp_path) not in (tmp_path / "bundle" / "bundle.json").read_text()
    other = Gates(Fingerprint.of(llama(num_hidden_layers=1)), 7)
    with pytest.raises(ValueError, match="`gates` must be for the model that is saved; layers: 1 here, 2 in the mod"):
        save(tmp_path / "other", None, model, sparse=sparse, gates=other)
    assert not (tmp_path / "other").exists()


def scaling(monkeypatch: Any, fails: bool = False) -> list[str]:
    """Stands for rope_scaling: multiplies the base; returns what was done."""
    done: list[str] = []

    def scale_rope(model: Any, settings: dict[str, Any]) -> Callable[[], None]:
        before = model.config.rope_parameters
        model.config.rope_parameters = {**before, "rope_theta": before["rope_theta"] * settings["factor"]}
        done.append("scaled")

        def undo() -> None:
            model.config.rope_parameters = before
            done.append("undone")

        undo.check = lambda: None
        return undo

    monkeypatch.setitem(
        sys.modules, "hf_sparse_attn.training.rope_scaling", types.SimpleNamespace(scale_rope=scale_rope)
    )
    return done


def test_positions_are_scaled_before_the_model_is_compared(tmp_path: Path, monkeypatch: Any) -> None:
    done = scaling(monkeypatch)
    rope = {"factor": 4.0}
    adapter = trained("llama")
    sys.modules["hf_sparse_attn.training.rope_scaling"].scale_rope(adapter.model, rope)
    save(tmp_path, adapter, rope=rope)
    done.clear()
    model = llama()
    before, parameters = snapshot(model), model.config.rope_parameters
    with hsa.load_bundle(model, tmp_path):
        assert model.config.rope_parameters["rope_theta"] == 4 * parameters["rope_theta"]
        assert done == ["scaled"]
    assert done == ["scaled", "undone"] and model.config.rope_parameters is parameters
    assert_same(before, snapshot(model))
    # One that is scaled already, and one that is another model in other ways.
    other = llama(rope_parameters={"rope_type": "default", "rope_theta": 40000.0})
    with pytest.raises(ValueError, match=r"rope: .* here, .* in the model"):
        hsa.load_bundle(other, tmp_path)
    assert done[2:] == ["scaled", "undone"] and other.config.rope_parameters["rope_theta"] == 40000.0
    with pytest.raises(ValueError, match=r"made for; layers: 2 here, 1 in the model"):
        hsa.load_bundle(llama(num_hidden_layers=1), tmp_path)
    assert len(done) == 4


def test_the_scaling_of_the_package(tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 2.0}
    adapter = trained("llama")
    undo = rope_scaling.scale_rope(adapter.model, rope)
    save(tmp_path, adapter, rope=rope, sparse=None)
    expected = output("llama", adapter.model)
    undo()
    model = llama()
    base, before, config = output("llama", model), snapshot(model), model.config.to_dict()
    loaded = hsa.load_bundle(model, tmp_path)
    assert torch.equal(output("llama", model), expected) and not torch.equal(expected, base)
    again = rope_scaling.scale_rope(model, rope)
    with pytest.raises(ValueError, match="changed since"):
        loaded.remove()
    again()
    loaded.remove()
    assert_same(before, snapshot(model))
    assert model.config.to_dict() == config and torch.equal(output("llama", model), base)


def test_gates_of_the_package(tmp_path: Path) -> None:
    model = llama()
    made = gates.GateSet("seer_attention", model, {"block_size": 16, "hidden": 8}, seed=3)
    settings = SparseSettings(method="seer_attention", params={"gates": made, "density": 0.4}, min_tokens=0)
    with make_patch(model, settings):
        expected = output("llama", model)
    save(tmp_path, None, model, sparse=settings)
    model = llama()
    before = snapshot(model)
    with hsa.load_bundle(model, tmp_path) as loaded:
        assert torch.equal(output("llama", model), expected)
        assert loaded.patch.method.density == 0.4
    assert_same(before, snapshot(model))


# ------------------------------------------------------------------ pipelines


def test_a_pipeline_is_patched_as_one(tmp_path: Path) -> None:
    adapter = trained("wan", False)
    save(tmp_path, adapter, sparse=NARROW)
    pipe = tiny_wan.pipeline()
    base = tiny_wan.generate(pipe)
    before = tiny_wan.state(pipe)
    with hsa.load_bundle(pipe, tmp_path) as loaded:
        assert loaded.patch.model is pipe and loaded.adapter.model is pipe.transformer
        assert not torch.equal(tiny_wan.generate(pipe), base)
    tiny_wan.assert_same(before, tiny_wan.state(pipe))
    assert torch.equal(tiny_wan.generate(pipe), base)


@pytest.mark.parametrize("how", ["found", "given"])
def test_of_two_experts_the_trained_one_gets_it(how: str, tmp_path: Path) -> None:
    pipe = tiny_wan.pipeline("experts")
    base, before = tiny_wan.generate(pipe), tiny_wan.state(pipe)
    for name, seed in (("transformer_2", 5), ("transformer", 6)):
        adapter = add_lora(getattr(pipe, name), CASES["wan"].full)
        shake(adapter, seed=seed)
        model, part = (pipe, "") if how == "found" else (adapter.model, name)
        save(tmp_path / name, adapter, model, part=part, sparse=NARROW)
        adapter.remove()
    tiny_wan.assert_same(before, tiny_wan.state(pipe))
    with hsa.load_bundle(pipe, tmp_path / "transformer_2") as second:
        assert second.adapter.model is pipe.transformer_2 and second.patch.modules == [pipe.transformer_2]
        assert not hasattr(pipe.transformer, "peft_config")
        one = tiny_wan.generate(pipe)
        with hsa.load_bundle(pipe, tmp_path / "transformer") as first:
            assert first.adapter.model is pipe.transformer
            both = tiny_wan.generate(pipe)
            assert first.patch.report().density < 1 and second.patch.report().density < 1
        assert torch.equal(tiny_wan.generate(pipe), one)
    tiny_wan.assert_same(before, tiny_wan.state(pipe))
    assert torch.equal(tiny_wan.generate(pipe), base)
    assert not torch.equal(one, base) and not torch.equal(both, one)
    # A pipeline with one transformer has no other place for it.
    with hsa.load_bundle(tiny_wan.pipeline("low_only"), tmp_path / "transformer_2") as loaded:
        assert loaded.adapter is not None
    with hsa.load_bundle(pipe.transformer, tmp_path / "transformer_2") as loaded:
        assert loaded.adapter.model is pipe.transformer


def test_of_two_experts_none_is_guessed(tmp_path: Path) -> None:
    save(tmp_path, trained("wan"))
    pipe = tiny_wan.pipeline("experts")
    before = tiny_wan.state(pipe)
    with pytest.raises(ValueError, match="must be transformer or transformer_2 of the WanPipeline: the bundle do"):
        hsa.load_bundle(pipe, tmp_path)
    tiny_wan.assert_same(before, tiny_wan.state(pipe))
    # Sparse attention alone is for all of them.
    save(tmp_path, None, pipe)
    with hsa.load_bundle(pipe, tmp_path) as loaded:
        assert loaded.patch.modules == [pipe.transformer, pipe.transformer_2]


def test_a_pipeline_of_transformers(saved: Path) -> None:
    import transformers

    pipe = transformers.Pipeline.__new__(transformers.TextGenerationPipeline)
    pipe.model = llama()
    before = snapshot(pipe.model)
    with hsa.load_bundle(pipe, saved) as loaded:
        assert loaded.adapter.model is pipe.model
    assert_same(before, snapshot(pipe.model))


# ------------------------------------------------------------------ what is refused, and a model left as it was


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, "layers: 2 here, 1 in the model"),
        ({"num_key_value_heads": 4}, "kv_heads: 2 here, 4 in the model"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope: .* here, .* in the model"),
    ],
)
def test_another_model_is_refused_with_the_difference(changes: dict[str, Any], said: str, saved: Path) -> None:
    model = llama(**changes)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"`model` must be the one that the bundle was made for; .*{said}"):
        hsa.load_bundle(model, saved)
    assert_same(before, snapshot(model))


def test_models_of_another_kind_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="model_class: LlamaModel here, MistralModel in the model; "):
        hsa.load_bundle(tiny_lm.FAMILIES["mistral"](), saved)
    with pytest.raises(ValueError, match="model_class: LlamaModel here, WanTransformer3DModel in the model"):
        hsa.load_bundle(tiny_wan.pipeline(), saved)
    with pytest.raises(ValueError, match="must hold the weights of an adapter on this model, got "):
        hsa.load_bundle(llama().model, saved)
    with pytest.raises(TypeError, match="`model` must be a model or pipeline of a known family"):
        hsa.load_bundle(torch.nn.Linear(2, 2), saved)
    with pytest.raises(TypeError, match="`model` must be a model, or a pipeline with one, got a str"):
        hsa.load_bundle("model", saved)


@pytest.mark.parametrize("there", ["patch", "adapter", "bundle"])
def test_a_model_that_has_one_gets_no_second(there: str, saved: Path) -> None:
    model = llama()
    on = {
        "patch": lambda: hsa.patch(model, "vertical_slash", min_tokens=0),
        "adapter": lambda: add_lora(model, CASES["llama"].plain),
        "bundle": lambda: hsa.load_bundle(model, saved),
    }[there]()
    before = snapshot(model)
    with pytest.raises(ValueError, match="must not be patched already" if there == "patch" else "no adapter yet"):
        hsa.load_bundle(model, saved)
    assert_same(before, snapshot(model))
    on.remove()


@pytest.mark.parametrize("stage", ["scale", "compare", "adapter", "weights", "patch"])
def test_an_exception_on_the_way_leaves_the_model(stage: str, tmp_path: Path, monkeypatch: Any) -> None:
    done = scaling(monkeypatch)
    adapter = trained("llama")
    sys.modules["hf_sparse_attn.training.rope_scaling"].scale_rope(adapter.model, {"factor": 2.0})
    save(tmp_path, adapter, rope={"factor": 2.0})
    done.clear()
    owner, name = {
        "scale": (sys.modules["hf_sparse_attn.training.rope_scaling"], "scale_rope"),
        "compare": (bundle, "_check_model"),
        "adapter": (lora_adapter, "add_lora"),
        "weights": (lora_file, "fill"),
        "patch": (sys.modules["hf_sparse_attn.training.sparse"], "patch"),
    }[stage]
    original, calls = getattr(owner, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if stage == "compare" and len(calls) < 2:
            return original(*args, **kwargs)
        raise KeyboardInterrupt(stage)

    monkeypatch.setattr(owner, name, fails)
    model = llama()
    before, parameters = snapshot(model), model.config.rope_parameters
    with pytest.raises(KeyboardInterrupt, match=stage):
        hsa.load_bundle(model, tmp_path)
    assert_same(before, snapshot(model))
    assert model.config.rope_parameters is parameters
    assert done == ([] if stage == "scale" else ["scaled", "undone"])


def test_another_adapter_on_top_must_come_off_first(tmp_path: Path) -> None:
    from peft import LoraConfig

    save(tmp_path, trained("llama", False))
    model = llama()
    loaded = hsa.load_bundle(model, tmp_path)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "other")
    with pytest.raises(ValueError, match="must have no other adapter to remove this one, got other"):
        loaded.remove()
    assert loaded.patch.report().method == "sliding_window" and hsa.unpatch(model) is None


def _json(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = {**json.loads((folder / "bundle.json").read_text()), **changes}
        (folder / "bundle.json").write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return change


def _text(change: Callable[[str], str], name: str = "bundle.json") -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        data = (folder / name).read_bytes().decode("latin1")
        (folder / name).write_bytes(change(data).encode("latin1"))

    return changed


def _sparse(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / "bundle.json").read_text())["sparse"]
        _json(sparse={**value, **changes})(folder)

    return change


SHA = "0" * 64
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_bundle": (lambda f: (f / "bundle.json").unlink(), "must be a folder that holds bundle.json"),
    "truncated": (_text(lambda t: t[: len(t) // 2]), "must hold a valid bundle, got .*bundle.json: "),
    "no_text": (_text(lambda t: "\xff\xfe" + t), "must hold a valid bundle, got .*bundle.json: "),
    "no_object": (_text(lambda t: "[1]"), "the text must be a JSON object"),
    "endless": (_text(lambda t: "[" * 100_000), "lists within lists|must hold a valid bundle"),
    "twice": (_text(lambda t: t.replace('"part"', '"base_model"')), "keys must be given once, got 'base_model' twice"),
    "nan": (_text(lambda t: t.replace("2.5", "NaN")), "numbers must be finite, got NaN"),
    "version": (_json(version=2), r"the format must be hf_sparse_attn.bundle version 1, got .*2"),
    "format": (_json(format="hf_sparse_attn.head_profile"), "the format must be hf_sparse_attn.bundle version 1"),
    "key_missing": (_json(recipe=...), "must have the keys .*; 'recipe' missing"),
    "key_besides": (_json(more=1), "must have the keys .*; got 'more' besides"),
    "fingerprint": (_json(fingerprint={}), "`fingerprint` must have the keys"),
    "method_is_a_path": (_sparse(method="../x"), "`sparse.method` must be the name of a method, got '../x'"),
    "method_is_a_profile": (_sparse(method="profile"), "`sparse.method` must be 'profile' exactly where"),
    "gates": (_sparse(params={"gates": "/tmp"}), "`sparse.params` must have no `gates`"),
    "sparse_key": (_sparse(more=1), "`sparse` must have keys out of .* got unknown .'more'"),
    "sparse_type": (_sparse(backend=3), "`sparse.backend` must be of type str, got 3"),
    "nothing": (_json(sparse=None, files={}), "`files` must have an adapter where `sparse` is null"),
    "own_file": (_json(files={"profile/notes.txt": SHA}), "`files` must be those of a bundle with their SHA-256"),
    "climbs_out": (_json(files={"profile/../../x": SHA}), "`files` must be those of a bundle with their SHA-256"),
    "other_file": (_json(files={"evil.py": SHA}), "`files` must be those of a bundle with their SHA-256"),
    "no_hash": (_json(files={"adapter_config.json": "abc"}), "`files` must be those of a bundle with their SHA-256"),
    "half_adapter": (_json(files={"adapter_config.json": SHA}), "`files` must have both of adapter_config.json and"),
    "config_gone": (lambda f: (f / "adapter_config.json").unlink(), "must hold all files .* without adapter_config"),
    "weights_gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "must hold all files .* without adapter_m"),
    "weights_cut": (_text(lambda t: t[:-9], "adapter_model.safetensors"), "got a changed adapter_model.safetensors"),
    "one_bit": (_text(lambda t: t[:-1] + chr(ord(t[-1]) ^ 1), "adapter_model.safetensors"), "got a changed adapter_m"),
    "config_changed": (_text(lambda t: t.replace("3", "4"), "adapter_config.json"), "got a changed adapter_config"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bundles_are_refused(damage: str, saved: Path) -> None:
    change, said = DAMAGE[damage]
    change(saved)
    model = llama()
    before = snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        hsa.load_bundle(model, saved)
    assert_same(before, snapshot(model))


def test_an_unknown_method_or_parameter_is_refused(saved: Path) -> None:
    model = llama()
    before = snapshot(model)
    _sparse(method="no_such_method")(saved)
    with pytest.raises(ValueError, match=r"`method` must be one of .*; got 'no_such_method'"):
        hsa.load_bundle(model, saved)
    _sparse(method="sliding_window", params={"no_such": 1})(saved)
    with pytest.raises(TypeError, match="no_such"):
        hsa.load_bundle(model, saved)
    assert_same(before, snapshot(model))


def test_sources_of_another_kind(saved: Path, monkeypatch: Any) -> None:
    with pytest.raises(TypeError, match="`source` must be a folder or a Hub id, got 3"):
        hsa.load_bundle(llama(), 3)
    with pytest.raises(ValueError, match="got the file"):
        hsa.load_bundle(llama(), saved / "bundle.json")
    with pytest.raises(ValueError, match="must be a folder that exists or a Hub id"):
        hsa.load_bundle(llama(), saved / "absent")
    monkeypatch.setattr(bundle_file, "_LARGEST_FILE", 9)
    with pytest.raises(ValueError, match="at most 9 bytes of settings"):
        hsa.load_bundle(llama(), saved)


# ------------------------------------------------------------------ saving


def test_saving_refuses_what_does_not_fit(tmp_path: Path) -> None:
    adapter = trained("llama")
    with pytest.raises(ValueError, match="`adapter` or `sparse` must be given, got neither"):
        save(tmp_path / "a", None, llama(), sparse=None)
    with pytest.raises(ValueError, match="`part` must be one of transformer, transformer_2, or empty; got 'vae'"):
        save(tmp_path / "a", adapter, part="vae")
    with pytest.raises(
        ValueError, match="`profile` must be for the model that is saved; layers: 1 here, 2 in the mod"
    ):
        save(tmp_path / "a", adapter, profile=profile_of(llama(num_hidden_layers=1)))
    with pytest.raises(TypeError, match=r"`figures.loss` must be numbers, texts, or lists or mappings of them"):
        save(tmp_path / "a", adapter, figures={"loss": torch.ones(2)})
    with pytest.raises(TypeError, match=r"`rope.of` must be numbers"):
        save(tmp_path / "a", adapter, rope={"of": object()})
    with pytest.raises(TypeError, match="parameter 'window' must be numbers"):
        save(tmp_path / "a", adapter, sparse=SparseSettings(method="sliding_window", params={"window": object()}))
    assert not (tmp_path / "a").exists()


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    adapter = trained("wan")
    save(tmp_path, adapter, profile=profile_of(adapter.model))
    for name in ("mine.txt", "profile/mine.txt"):
        (tmp_path / name).write_text("kept")
    assert (tmp_path / "profile" / "head_profile.json").is_file()
    save(tmp_path, trained("llama"))
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert names == {
        "mine.txt", "profile", "profile/mine.txt", "README.md", "bundle.json", "adapter_config.json",
        "adapter_model.safetensors",
    }  # fmt: skip
    loaded = hsa.load_bundle(llama(), tmp_path)
    loaded.remove()
    # Nor does what is one's own get into a bundle, from where it would be uploaded.
    save(tmp_path, adapter, profile=profile_of(adapter.model))
    assert {n for n in bundle_file.read(tmp_path).files if n.startswith("profile/")} == {
        "profile/README.md", "profile/head_profile.json",
    }  # fmt: skip


def test_the_files_of_gates_are_known_to_bundles() -> None:
    names = {f"gates/{name}" for name in (gates.SETTINGS_FILE, gates.WEIGHTS_FILE)}
    assert {name for name in bundle_file.NAMES if name.startswith("gates/")} == names


def test_half_a_save_is_no_bundle(saved: Path, monkeypatch: Any) -> None:
    def fails(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Adapter, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save(saved, trained("llama"))
    with pytest.raises(FileNotFoundError, match=r"must be a folder that holds bundle.json"):
        hsa.load_bundle(llama(), saved)


def test_the_adapter_of_a_bundle_is_one_of_peft(saved: Path) -> None:
    from peft import PeftModel

    expected = output("llama", trained("llama").model)
    assert torch.equal(output("llama", PeftModel.from_pretrained(llama(), saved)), expected)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


# ------------------------------------------------------------------ Hub


class Hub:
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.asked = folder, [], []

    def __call__(self, token: Any = None) -> Hub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append((repo_id, kwargs))

    def create_commit(self, *, repo_id: str, operations: list[Any], **kwargs: Any) -> Any:
        self.calls.append((repo_id, kwargs))
        for operation in operations:
            path = self.folder / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id: str, name: str, revision: str | None = None) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append(name)
        found = self.folder / repo_id / name
        if not found.is_file():
            raise EntryNotFoundError(f"no {name}")
        return str(found)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> Hub:
    import huggingface_hub

    # Imported with a hub that is none, diffusers would fail.
    CASES["wan"].build()
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    return made


def test_hub_round_trip(tmp_path: Path, hub: Hub) -> None:
    adapter = trained("wan", False)
    save(tmp_path / "bundle", adapter, profile=profile_of(adapter.model))
    (tmp_path / "bundle" / "secret.txt").write_text("not to be uploaded")
    where = hsa.push_bundle(tmp_path / "bundle", "me/adapter", private=True, token="t", revision="new")
    assert where == "https://hub/me/adapter/commit/1"
    assert hub.calls[:2] == [("token", "t"), ("me/adapter", {"private": True, "repo_type": "model", "exist_ok": True})]
    assert hub.calls[2][1] == {"repo_type": "model", "commit_message": "Upload bundle", "revision": "new"}
    there = {
        p.relative_to(hub.folder / "me/adapter").as_posix() for p in (hub.folder / "me").rglob("*") if p.is_file()
    }
    assert there == {
        "README.md", "bundle.json", "adapter_config.json", "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors", "profile/head_profile.json", "profile/README.md",
    }  # fmt: skip
    assert 'hsa.load_bundle(model, "me/adapter")' in (hub.folder / "me/adapter/README.md").read_text()
    model = CASES["wan"].build()
    with hsa.load_bundle(model, "me/adapter", patch=False):
        assert torch.equal(output("wan", model), output("wan", adapter.model))
    assert "pytorch_lora_weights.safetensors" not in hub.asked and "adapter_model.safetensors" in hub.asked
    (hub.folder / "me/adapter/adapter_config.json").unlink()
    with pytest.raises(OSError, match=r"all its files, got 'me/adapter' without adapter_config.json"):
        hsa.load_bundle(model, "me/adapter")
    with pytest.raises(OSError, match="`source` must be a bundle on the Hub that can be reached, got 'me/nothing'"):
        hsa.load_bundle(model, "me/nothing")


def test_all_files_are_of_one_revision(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import shutil

    import huggingface_hub

    asked: list[tuple[str, str | None]] = []
    folder = tmp_path / "snapshots" / ("0a" * 20)
    shutil.copytree(saved, folder)

    def download(repo_id: str, name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with hsa.load_bundle(llama(), "me/adapter"):
        pass
    # Another one may be pushed while the first one is downloaded.
    assert asked[0] == ("bundle.json", None) and len(asked) > 2 and {r for _, r in asked[1:]} == {"0a" * 20}


def test_only_a_whole_bundle_is_uploaded(saved: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match="`repo_id` must be a folder that exists or a Hub id"):
        hsa.push_bundle(saved, "../x")
    (saved / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got a changed adapter_model.safetensors"):
        hsa.push_bundle(saved, "me/adapter")
    assert not hub.calls


def test_no_network_is_said_clearly(saved: Path) -> None:
    with pytest.raises(OSError, match="`source` must be a bundle on the Hub that can be reached, got 'some/bundle'"):
        hsa.load_bundle(llama(), "some/bundle")
    with pytest.raises(OSError, match="`repo_id` must be a repository that can be written, got 'some/bundle'"):
        hsa.push_bundle(saved, "some/bundle")


# ------------------------------------------------------------------ card


def test_the_card_is_made_from_the_bundle(saved: Path, tmp_path: Path) -> None:
    text = (saved / "README.md").read_text()
    front = text.split("---\n")[1]
    assert 'base_model: "some/base"' in front and 'library_name: "peft"' in front
    assert 'base_model_relation: "adapter"' in front and '"lora"' in front
    assert "# LoRA adapter and sparse attention for some/base" in text
    assert "| after.loss | 1.25 |" in text and "| lora.rank | 3 |" in text and "| params.window | 24 |" in text
    assert "model.load_adapter(" in text and "pipe.load_lora_weights" not in text
    save(tmp_path / "wan", trained("wan", False), base_model="/home/me/x", part="transformer_2", rope={"factor": 2.0})
    text = (tmp_path / "wan" / "README.md").read_text()
    assert "base_model" not in text.split("---\n")[1]
    assert "load_into_transformer_2=True" in text and "it is put on `transformer_2` alone" in text
    assert "## Scaled positions" in text and "| factor | 2 |" in text
    bad = {"a|b\n---\ntags: x": "<script>`"}
    save(tmp_path / "bad", None, llama(), base_model="x: y\nz/../..", recipe=bad)
    text = card(bundle_file.read(tmp_path / "bad"), "me/x")
    assert "a\\|b --- tags: x" in text and "&lt;script>'" in text
    assert "base_model" not in text.split("---\n")[1] and 'hsa.load_bundle(model, "me/x")' in text


def test_another_base_is_warned_of(saved: Path, caplog: Any) -> None:
    model = llama()
    with caplog.at_level(logging.WARNING):
        model.config._name_or_path = "/a/folder"
        hsa.load_bundle(model, saved).remove()
        model.config._name_or_path = "some/base"
        hsa.load_bundle(model, saved).remove()
        assert not caplog.records
        model.config._name_or_path = "some/other"
        hsa.load_bundle(model, saved).remove()
    assert caplog.messages == ["the bundle was made for some/base, and is put on some/other"]


# ------------------------------------------------------------------ peft is optional


def test_importing_the_names_does_not_import_peft() -> None:
    code = (
        "import sys, hf_sparse_attn as hsa; hsa.load_bundle, hsa.save_bundle, hsa.push_bundle; "
        "import hf_sparse_attn.training.lora.adapter, hf_sparse_attn.training.lora.file; "
        "print('peft' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = run_code(code)
    assert done.stdout.strip() == "False False", done.stderr


def test_without_peft_the_model_is_left(saved: Path, monkeypatch: Any) -> None:
    import importlib.util

    from hf_sparse_attn.extras import MissingExtra

    model = llama()
    before = snapshot(model)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(MissingExtra, match="a LoRA adapter needs peft"):
        hsa.load_bundle(model, saved)
    assert_same(before, snapshot(model))
