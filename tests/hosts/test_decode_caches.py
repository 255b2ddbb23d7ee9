"""What decoding remembers of caches: it follows whatever becomes of them, is never made anew, and leaves nothing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

import hf_sparse_attn as hsa
from hf_sparse_attn.decoding import Step
from hf_sparse_attn.family import tiny_text
from hf_sparse_attn.hosts import transformers_cache
from hf_sparse_attn.patching import active_patch
from tests.support.decoding import Forgetful, Pages

LAYERS = 2


@pytest.fixture(scope="module")
def model() -> Any:
    made, _ = tiny_text(LlamaForCausalLM, num_key_value_heads=2, max_position_embeddings=4096)
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = None
    return made


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


class Told:
    """A cache of a patched model that is fed step by step, and what its steps gave."""

    def __init__(self, model: Any, cache: Cache | None = None, rows: int = 2, prompt: int = 30) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config) if cache is None else cache
        self.given: list[Tensor] = []
        self.rows, self.number = rows, 0
        self.feed(prompt)

    def feed(self, length: int = 1) -> None:
        self.number += 1
        with torch.no_grad():
            out = self.model(tokens(self.rows, length, self.number), past_key_values=self.cache)
        self.given.append(out.logits)


def compare(model: Any, run: Callable[[], Any], rebuilt: int = LAYERS) -> Pages:
    """Runs something under a method with a memory and one without, which must give the same.

    Args:
        model: is patched.
        run: gives tensors, or a list of them.
        rebuilt: memories that are made.
    """
    found, methods = [], (Pages(), Forgetful())
    for method in methods:
        with hsa.patch(model, method, min_tokens=0):
            given = run()
            found.append(given if isinstance(given, list) else [given])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert methods[0].seen["rebuilt"] == rebuilt
    return methods[0]


# ------------------------------------------------------------------ what a cache does


def some_steps(told: Told, then: Callable[[Any], object], steps: int = 3) -> list[Tensor]:
    for _ in range(steps):
        told.feed()
    then(told)
    for _ in range(steps):
        told.feed()
    return told.given


def chosen_rows(told: Told) -> None:
    told.cache.batch_select_indices(torch.tensor([1]))
    told.rows = 1


def repeated_rows(told: Told) -> None:
    told.cache.batch_repeat_interleave(3)
    told.rows = 6


def swapped(told: Told) -> None:
    told.cache.reorder_cache(torch.tensor([1, 0]))


EVENTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "nothing": (lambda told: None, ""),
    "beams": (lambda told: told.cache.reorder_cache(torch.tensor([1, 1])), "selects"),
    "chosen rows": (chosen_rows, "selects"),
    "repeated rows": (repeated_rows, "selects"),
    "a crop": (lambda told: told.cache.crop(-6), "crops"),
    "a crop into the prompt": (lambda told: told.cache.crop(-20), "crops"),
    "a second turn": (lambda told: told.feed(25), ""),
    "few tokens at once": (lambda told: told.feed(5), ""),
    "a crop and a second turn": (lambda told: (told.cache.crop(-6), told.feed(25)), "crops"),
    "beams and a crop": (
        lambda told: (told.cache.reorder_cache(torch.tensor([1, 0])), told.cache.crop(-3)),
        "selects",
    ),
}


@pytest.mark.parametrize("event", EVENTS)
def test_memory_follows_what_a_cache_does_and_is_not_made_anew(event: str, model: Any) -> None:
    then, counted = EVENTS[event]
    method = compare(model, lambda: some_steps(Told(model), then))
    assert not counted or method.seen[counted] == LAYERS


def test_a_reset_begins_anew(model: Any) -> None:
    def again(told: Told) -> None:
        told.cache.reset()
        told.feed(20)

    compare(model, lambda: some_steps(Told(model), again), rebuilt=2 * LAYERS)


def test_every_new_slot_is_taken_in_once(model: Any) -> None:
    method = compare(model, lambda: some_steps(Told(model), lambda told: told.feed(25)))
    assert method.seen["slots"] == LAYERS * (30 + 3 + 25 + 3)


# ------------------------------------------------------------------ what nobody tells


def prune(told: Told) -> None:
    for layer in told.cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]


def write(told: Told) -> None:
    for layer in told.cache.layers:
        layer.keys[:, :, :9] *= 2.0


def replace_keys(told: Told) -> None:
    for layer in told.cache.layers:
        layer.keys = layer.keys.flip(2)


def of_another(told: Told) -> None:
    """Another model writes into the cache: here the same one, unpatched."""
    made, _ = tiny_text(LlamaForCausalLM, num_key_value_heads=2, max_position_embeddings=4096)
    with torch.no_grad():
        made(tokens(told.rows, 3), past_key_values=told.cache)


UNTOLD: dict[str, Callable[[Any], object]] = {
    "pruned": prune, "written": write, "replaced": replace_keys, "by another model": of_another
}  # fmt: skip


@pytest.mark.parametrize("change", UNTOLD)
def test_what_nobody_tells_is_seen_and_made_anew_once(change: str, model: Any) -> None:
    compare(model, lambda: some_steps(Told(model), UNTOLD[change]), rebuilt=2 * LAYERS)


def test_a_prune_within_a_forward_is_seen(model: Any) -> None:
    """As a press does that cuts the keys of a layer when its attention has run."""

    def run() -> list[Tensor]:
        told = Told(model)

        def cut(module: Any, args: Any, output: Any) -> None:
            layer = told.cache.layers[module.layer_idx]
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]

        def then(told: Told) -> None:
            hooks = [layer.self_attn.register_forward_hook(cut) for layer in model.model.layers]
            told.feed(20)
            for hook in hooks:
                hook.remove()

        return some_steps(told, then)

    compare(model, run, rebuilt=2 * LAYERS)


def test_what_a_pause_appends_is_taken_in_like_the_rest(model: Any) -> None:
    def run() -> list[Tensor]:
        told = Told(model)
        patch = active_patch(model.model)
        assert patch is not None

        def then(told: Told) -> None:
            with patch.paused():
                told.feed()

        return some_steps(told, then)

    assert compare(model, run).seen["slots"] == LAYERS * 37


# ------------------------------------------------------------------ other caches


class Rounded(DynamicLayer):
    """Keeps its keys rounded, all but the last few, which it rounds together: as quantised caches do."""

    rest = 8

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.rounded: tuple[Tensor, Tensor] | None = None
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.filled += key_states.shape[2]
        if self.rounded is None:
            self.lazy_initialization(key_states, value_states)
            self.rounded = key_states.bfloat16(), value_states.bfloat16()
            return key_states, value_states
        own = (self.keys, self.values) if self.keys.numel() else (key_states[:, :, :0], value_states[:, :, :0])
        parts = zip(self.rounded, own, (key_states, value_states), strict=True)
        k, v = (torch.cat([old.float(), rest, new], 2) for old, rest, new in parts)
        kept = k.shape[2] - self.rounded[0].shape[2]
        if kept >= self.rest:
            self.rounded = k.bfloat16(), v.bfloat16()
            self.keys = self.values = torch.tensor([])
        else:
            self.keys, self.values = k[:, :, -kept:], v[:, :, -kept:]
        return k, v

    def get_seq_length(self) -> int:
        return self.filled

    def reorder_cache(self, beam_idx: Tensor) -> None:
        assert self.rounded is not None
        self.rounded = tuple(x.index_select(0, beam_idx) for x in self.rounded)  # type: ignore[assignment]
        if self.keys.numel():
            self.keys, self.values = (x.index_select(0, beam_idx) for x in (self.keys, self.values))


class Elsewhere(Rounded):
    """Keeps other tensors than it hands over, as offloaded caches do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = DynamicLayer.update(self, key_states, value_states)
        self.keys, self.values = (x.clone() for x in found)
        return found

    def get_seq_length(self) -> int:
        return DynamicLayer.get_seq_length(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        DynamicLayer.reorder_cache(self, beam_idx)


@pytest.mark.parametrize("event", EVENTS)
def test_an_offloaded_cache_is_looked_at(event: str, model: Any) -> None:
    compare(model, lambda: some_steps(Told(model, Cache([Elsewhere() for _ in range(LAYERS)])), EVENTS[event][0]))


@pytest.mark.parametrize("change", ["written", "replaced", "pruned"])
def test_what_nobody_tells_of_an_offloaded_cache_is_seen(change: str, model: Any) -> None:
    def run() -> list[Tensor]:
        return some_steps(Told(model, Cache([Elsewhere() for _ in range(LAYERS)])), UNTOLD[change])

    compare(model, run, rebuilt=2 * LAYERS)


@pytest.mark.parametrize("event", EVENTS)
def test_a_preallocated_cache(event: str, model: Any) -> None:
    compare(model, lambda: some_steps(Told(model, hsa.PreallocatedCache(model.config)), EVENTS[event][0]))


def rounded_cache() -> Cache:
    return Cache(layers=[Rounded() for _ in range(LAYERS)])


def test_a_quantised_cache_is_looked_at_and_made_anew_when_it_rounds_again(model: Any) -> None:
    method = compare(model, lambda: some_steps(Told(model, rounded_cache()), lambda told: None), rebuilt=LAYERS)
    assert method.seen["slots"] == LAYERS * 36
    # The eighth new token has all of them rounded, which the ninth finds.
    compare(model, lambda: some_steps(Told(model, rounded_cache()), lambda told: None, 5), rebuilt=2 * LAYERS)


def test_beams_of_a_quantised_cache(model: Any) -> None:
    then: Callable[[Told], object] = lambda told: told.cache.reorder_cache(torch.tensor([1, 1]))  # noqa: E731
    assert compare(model, lambda: some_steps(Told(model, rounded_cache()), then)).seen["selects"] == LAYERS


def static(model: Any, slots: int = 96) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=slots)


@pytest.mark.parametrize("event", ["nothing", "beams", "a second turn", "few tokens at once"])
def test_static_caches(event: str, model: Any) -> None:
    compare(model, lambda: some_steps(Told(model, static(model)), EVENTS[event][0]))


def test_a_static_cache_that_is_wound_back(model: Any) -> None:
    def back(told: Told) -> None:
        for layer in told.cache.layers:
            layer.cumulative_length.sub_(5)
        told.feed(20)

    compare(model, lambda: some_steps(Told(model, static(model)), back))


def test_a_static_cache_gives_what_a_dynamic_one_gives(model: Any) -> None:
    with hsa.patch(model, Pages(), min_tokens=0):
        one, other = (some_steps(Told(model, cache), lambda told: None) for cache in (static(model), None))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ nothing is left


def plain(cache: Cache) -> bool:
    return all(not type(layer).__dict__.get(transformers_cache._TELLS, False) for layer in cache.layers)


@pytest.mark.parametrize("way", ["deepcopy", "copy of a layer", "pickle", "torch.save"])
def test_copies_of_a_cache_are_plain_and_go_on(way: str, model: Any) -> None:
    def copied(told: Told) -> None:
        assert not plain(told.cache)
        before = told.cache
        if way == "deepcopy":
            told.cache = copy.deepcopy(before)
        elif way == "copy of a layer":
            told.cache = Cache(layers=[copy.copy(layer) for layer in before.layers])
        elif way == "pickle":
            told.cache = pickle.loads(pickle.dumps(before))
        else:
            file = io.BytesIO()
            torch.save(before, file)
            file.seek(0)
            told.cache = torch.load(file, weights_only=False)
        assert plain(told.cache) and all(type(layer) is DynamicLayer for layer in told.cache.layers)
        before.crop(-3)

    def run() -> list[Tensor]:
        told = Told(model)
        for _ in range(3):
            told.feed()
        if any(type(layer) is not DynamicLayer for layer in told.cache.layers):
            copied(told)
        for _ in range(3):
            told.feed()
        return told.given

    compare(model, run, rebuilt=2 * LAYERS)


def test_a_patch_that_goes_leaves_plain_layers(model: Any) -> None:
    told = None
    patch = hsa.patch(model, Pages(), min_tokens=0)
    told = Told(model)
    told.feed()
    kinds = [type(layer) for layer in told.cache.layers]
    assert kinds != [DynamicLayer] * LAYERS and [kind.__name__ for kind in kinds] == ["DynamicLayer"] * LAYERS
    assert all(isinstance(layer, DynamicLayer) for layer in told.cache.layers)
    patch.remove()
    assert [type(layer) for layer in told.cache.layers] == [DynamicLayer] * LAYERS
    assert all(
        set(layer.__dict__) == set(DynamicLayer().__dict__) | {"dtype", "device"} for layer in told.cache.layers
    )
    assert not transformers_cache._TRACKS.get(told.cache.layers[0])
    told.feed()


def test_memory_goes_with_the_cache(model: Any) -> None:
    gc.collect()
    with hsa.patch(model, Pages(), min_tokens=0):
        before = len(transformers_cache._TRACKS)
        told = Told(model)
        told.feed()
        assert len(transformers_cache._TRACKS) == before + LAYERS
        del told
        gc.collect()
        assert len(transformers_cache._TRACKS) == before


def test_two_models_take_turns_with_one_cache(model: Any) -> None:
    other, _ = tiny_text(LlamaForCausalLM, num_key_value_heads=2, max_position_embeddings=4096)
    methods = [Pages(), Pages()]
    given = []
    with hsa.patch(model, methods[0], min_tokens=0) as first:
        with hsa.patch(other, methods[1], min_tokens=0):
            told = Told(model)
            for turn in (model, model, other, other, model, other):
                told.model = turn
                told.feed()
        assert not plain(told.cache)
        given.append(told.given)
    assert plain(told.cache) and first.removed
    # Each finds what the other has written, and makes its memory anew.
    assert [method.seen["rebuilt"] for method in methods] == [2 * LAYERS, 2 * LAYERS]
    with hsa.patch(model, Forgetful(), min_tokens=0), hsa.patch(other, Forgetful(), min_tokens=0):
        told = Told(model)
        for turn in (model, model, other, other, model, other):
            told.model = turn
            told.feed()
    for one, two in zip(given[0], told.given, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_a_class_of_layers_of_its_own_type_keeps_its_place(model: Any) -> None:
    """A subclass of such a class would take its place in the table of transformers."""
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as table

    class Own(DynamicLayer):
        _layer_type = "own_of_a_test"

    try:
        with hsa.patch(model, Pages(), min_tokens=0):
            told = Told(model, Cache(layers=[Own() for _ in range(LAYERS)]))
            told.feed()
            assert not plain(told.cache) and told.cache.layers[0]._layer_type == "own_of_a_test"
        assert table.get("own_of_a_test") in (None, Own)
    finally:
        table.pop("own_of_a_test", None)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("kind", ["known layers", "growing", "static"])
def test_a_cache_of_another_model_is_refused(kind: str, layers: int, model: Any) -> None:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    other = LlamaForCausalLM(config).eval()
    caches = {"known layers": DynamicCache(config=config), "growing": DynamicCache()}
    cache = caches.get(kind, StaticCache(config=config, max_cache_len=50))
    with hsa.patch(model, Pages(), min_tokens=0) as patch, torch.no_grad():
        other(tokens(1, 30), past_key_values=cache)
        with pytest.raises(ValueError, match=f"which has 2 layers, got one of {layers}"):
            model(tokens(1, 1), past_key_values=cache)
        Told(model).feed()
    assert patch.removed and plain(cache) and model.config._attn_implementation == "sdpa"


@contextmanager
def failing(module: Any) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_a_step_that_fails_half_way_does_no_harm(model: Any) -> None:
    def then(told: Told) -> None:
        with failing(model.model.layers[1]), pytest.raises(RuntimeError, match="stop here"):
            told.feed()
        # The first layer has one token more now; whoever goes on takes it away.
        told.cache.layers[0].crop(-1)

    compare(model, lambda: some_steps(Told(model), then))


def test_a_method_that_fails_leaves_all_as_it_was(model: Any) -> None:
    class Fails(Pages):
        def decode(self, step: Step) -> Any:
            raise RuntimeError("not now")

    before = model.config._attn_implementation
    with hsa.patch(model, Fails(), min_tokens=0):
        told = Told(model)
        with pytest.raises(RuntimeError, match="not now"):
            told.feed()
    assert plain(told.cache) and model.config._attn_implementation == before
    told.cache.layers[0].crop(-1)
    told.feed()
