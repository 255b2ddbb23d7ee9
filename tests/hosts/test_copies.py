"""Copies of patched models: deep copies are dense and their own, pickles are refused, whatever the family."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse_attn as hsa
from tests.support import tiny_wan
from tests.support.tiny_families import MODELS, VIDEO, WINDOW, run

pytestmark = pytest.mark.usefixtures("one_thread")

MARK = "_hf_sparse_attn_patch"


def attributes(model: nn.Module) -> dict[str, Any]:
    """Names of what every module and configuration holds, of its hooks, and the classes of its processors."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        held = {key: len(value) if key.endswith("hooks") else None for key, value in module.__dict__.items()}
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        processor = getattr(module, "processor", None)
        found[name] = held, implementation, type(processor), getattr(processor, "_attention_backend", None)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_deep_copy_is_dense_and_its_own(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, given = MODELS[kind]()
    dense, plain = run(model, given), attributes(model)
    patch = hsa.patch(model, **WINDOW)
    sparse = run(model, given)
    counted = sum(r.sparse_calls for r in patch.report().layers)
    assert not torch.equal(sparse, dense)
    with caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        twin, third = copy.deepcopy(model), copy.deepcopy(model)
    assert caplog.text.count("a deep copy of a patched model is dense") == 1
    assert torch.equal(run(twin, given), dense) and torch.equal(run(copy.deepcopy(twin), given), dense)
    assert torch.equal(run(model, given), sparse)
    assert sum(r.sparse_calls for r in patch.report().layers) == 2 * counted
    assert pickle.loads(pickle.dumps(twin)).training == twin.training
    # The one is patched and unpatched while the other is.
    own = hsa.patch(twin, **WINDOW)
    assert torch.equal(run(twin, given), sparse)
    patch.remove()
    assert torch.equal(run(twin, given), sparse) and torch.equal(run(model, given), dense)
    own.remove()
    assert torch.equal(run(twin, given), dense)
    for one in (twin, third):
        hsa.unpatch(one)
        assert attributes(one) == plain == attributes(model)
    with pytest.raises(ValueError, match="must be patched"):
        hsa.unpatch(twin)


@pytest.mark.parametrize("kind", MODELS)
def test_a_deep_copy_keeps_nothing_of_the_model_alive(kind: str) -> None:
    model, given = MODELS[kind]()
    patch = hsa.patch(model, **WINDOW)
    run(model, given)
    twin = copy.deepcopy(model)
    gone = [weakref.ref(value) for value in (*model.parameters(), patch.session)]
    del model, patch
    gc.collect()
    assert not any(ref() is not None for ref in gone)
    hsa.patch(twin, **WINDOW).remove()


def test_what_a_method_watches_is_not_in_a_copy() -> None:
    """Hooks that are put on projections while the model runs."""
    model, given = MODELS["llama"]()
    plain, dense = attributes(model), run(model, given)
    gates = hsa.GateSet("seer_attention", model, {"block_size": 16, "hidden": 12})
    patch = hsa.patch(model, "seer_attention", gates=gates, min_tokens=0)
    run(model, given)
    assert patch.report().layers[0].sparse_calls == 1
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, given), dense)
    hsa.unpatch(twin)
    assert attributes(twin) == plain
    hsa.unpatch(model)
    assert attributes(model) == plain


@pytest.mark.parametrize("way", ["wrapped", "in place", "part"])
def test_a_copy_of_a_compiled_model_or_of_a_part(way: str) -> None:
    model, given = MODELS["llama"]()
    dense = run(model, given)
    hsa.patch(model, **WINDOW)
    if way == "part":
        twin = copy.deepcopy(model.model.layers)
        assert not any(name.startswith(("_hsa", MARK)) for m in twin.modules() for name in m.__dict__)
        return
    if way == "wrapped":
        twin = copy.deepcopy(torch.compile(model, backend="eager"))
        assert torch.equal(run(twin._orig_mod, given), dense)
    else:
        model.compile(backend="eager")
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, given), dense)
    hsa.unpatch(twin)


def test_a_copy_of_a_wrapper_that_hands_on_what_it_lacks() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model, given = MODELS["wan"]()
    dense = run(model, given)
    wrapper = Wrapper(model)
    hsa.patch(wrapper, **WINDOW)
    twin = copy.deepcopy(wrapper)
    assert type(twin) is Wrapper and torch.equal(run(twin.inner, given), dense)
    hsa.unpatch(twin)


def test_copies_of_a_pipeline() -> None:
    pipe = tiny_wan.pipeline("experts")
    dense = tiny_wan.generate(pipe)
    patch = hsa.patch(pipe, **{**WINDOW, "window": 2, "sink": 1})
    sparse = tiny_wan.generate(pipe)
    deep, shallow = copy.deepcopy(pipe), copy.copy(pipe)
    assert (tiny_wan.generate(deep) == dense).all() and not (sparse == dense).all()
    hsa.unpatch(deep)
    # A shallow copy is another pipeline around the same transformers.
    assert (tiny_wan.generate(shallow) == sparse).all()
    hsa.unpatch(shallow)
    assert patch.removed and (tiny_wan.generate(pipe) == dense).all()


def test_a_shallow_copy_of_a_patched_module_is_unpatched_with_it() -> None:
    model, given = MODELS["llama"]()
    dense = run(model, given)
    patch = hsa.patch(model.model, **WINDOW)
    shallow = copy.copy(model.model)
    with pytest.raises(ValueError, match="patched already"):
        hsa.patch(shallow, **WINDOW)
    hsa.unpatch(shallow)
    assert patch.removed and torch.equal(run(model, given), dense)


def test_a_model_that_must_not_be_copied_says_so_itself() -> None:
    class Whole(type(MODELS["llama"]()[0].model)):  # type: ignore[misc]
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise RuntimeError("no copies of shards")

    model, _ = MODELS["llama"]()
    model.model.__class__ = Whole
    hsa.patch(model, **WINDOW)
    with pytest.raises(RuntimeError, match="no copies of shards"):
        copy.deepcopy(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["pickle", "save"])
def test_a_patched_model_is_not_pickled_and_says_what_to_do(kind: str, how: str) -> None:
    model, given = MODELS[kind]()
    with hsa.patch(model, **WINDOW):
        run(model, given)
        with pytest.raises(TypeError, match=r"must not be pickled: unpatch\(\) it first, or save its state_dict"):
            pickle.dumps([model]) if how == "pickle" else torch.save({"model": model}, io.BytesIO())
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()


def test_a_patched_pipeline_is_not_pickled_and_says_what_to_do() -> None:
    pipe = tiny_wan.pipeline()
    with hsa.patch(pipe, **WINDOW), pytest.raises(TypeError, match=r"unpatch\(\) it first"):
        pickle.dumps(pipe)


@pytest.mark.parametrize("kind", VIDEO)
def test_saving_a_patched_model_writes_nothing_of_it(kind: str, tmp_path: Any) -> None:
    model, given = MODELS[kind]()
    dense = run(model, given)
    with hsa.patch(model, **WINDOW):
        model.save_pretrained(tmp_path)
    assert not any(b"hsa" in p.read_bytes() or b"hf_sparse" in p.read_bytes() for p in tmp_path.glob("*.json"))
    assert torch.equal(run(type(model).from_pretrained(tmp_path), given), dense)
