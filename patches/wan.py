"""Wan: self-attention of the video transformers, reached through the attention dispatcher of diffusers."""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from weakref import ref

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import LayerRecord, Patch
from hf_sparse_attn.registry import FAMILIES

log = logging.getLogger(__name__)

_PARTS = ("transformer", "transformer_2")
_CLASSES = {
    "diffusers.models.transformers.transformer_wan": "WanTransformer3DModel",
    "diffusers.models.transformers.transformer_wan_vace": "WanVACETransformer3DModel",
}
_NUMBERS = itertools.count()
# What the dispatcher keeps for a backend: its function, its checks, the arguments it is given.
_TABLES = ("_backends", "_constraints", "_supported_arg_names")
_NO_SCHEDULE = (
    "dense_steps: number of steps unknown (patch the pipeline, or call the transformer inside "
    "cache_context(name, step_index=..., num_inference_steps=...))"
)


@FAMILIES.register("wan")
class Wan:
    """Wan transformers of diffusers, bare, wrapped (PEFT, torch.compile) or in a pipeline; see family.Family.

    Only self-attention (`attn1`) is touched. The tokens are one video of frames x height x width patches.

    Step of a call: `step_index` and `num_inference_steps` where they are given to `cache_context` (the patched one
    takes both with any version of diffusers); else falls of `timestep` are counted, an equal one being the second
    guidance pass and a rise a new video, and the number of steps is that of the pipeline's current run. Both experts
    count as one run. A bare transformer in a loop of its own tells nobody how long the run is: with `dense_steps`
    every call is then dense for that reason; without it the step is only counted.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"bidirectional", "video grid"})
    models: ClassVar[str] = "diffusers: Wan 2.1, Wan 2.2 (two experts), TI2V-5B, VACE; text, image and video to video"

    @staticmethod
    def targets(model: object) -> list[nn.Module] | Decline:
        """The Wan transformers in a module or pipeline; imports nothing: what was never imported cannot be given."""
        kind = type(model).__name__
        if isinstance(model, nn.Module):
            parts = [model]
        else:
            if not any(hasattr(model, name) for name in _PARTS):
                return Decline(f"{kind} is neither a module nor a pipeline with a `transformer`")
            held = [getattr(model, name, None) for name in _PARTS]
            if all(part is None for part in held):
                return Decline(f"{kind} has no transformer: `transformer` and `transformer_2` are None or absent")
            parts = [part for part in held if isinstance(part, nn.Module)]
        loaded = [(sys.modules[file], name) for file, name in _CLASSES.items() if file in sys.modules]
        classes = tuple(getattr(file, name) for file, name in loaded if hasattr(file, name))
        found = dict.fromkeys(m for part in parts for m in part.modules() if isinstance(m, classes))
        if not found:
            return Decline(f"{kind} holds no {' or '.join(_CLASSES.values())}")
        return list(found)

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family.

        Raises:
            RuntimeError: this version of diffusers has another dispatcher.
            ValueError: a self-attention layer has a processor of its own that does not use the dispatcher.
        """
        _Hooks(patch).install()

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """Two layers, two heads of 12, and latents of 5 x 7 x 13 tokens."""
        from diffusers import WanTransformer3DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "ffn_dim": 48,
                "text_dim": 32,
            }
            model: Any = WanTransformer3DModel(**sizes, rope_max_seq_len=32)
            inputs = {
                "hidden_states": torch.randn(1, 16, 5, 14, 26),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, 12, 32),
            }
        return model.eval(), inputs


@dataclass(frozen=True)
class _Layer:
    """One patched attention: its record, its index, how many layers its transformer has, and the backend it had."""

    record: LayerRecord
    index: int
    num_layers: int
    backend: Any


@dataclass(frozen=True)
class _Call:
    """What all layers of one forward share; `num_steps` is None where nobody knows it."""

    layout: TokenLayout
    step: int
    num_steps: int | None
    branch: str | None


@dataclass
class _Clock:
    """Which denoising step it is: announced through `cache_context`, else counted from the timesteps."""

    branch: str | None = None
    announced: tuple[int | None, int | None] = (None, None)
    time: float | None = None
    count: int = 0

    def step(self, timestep: Tensor) -> int:
        """The step of a forward at `timestep` (TI2V gives one per token, 0 on the given frame)."""
        if self.announced[0] is not None:
            return self.announced[0]
        now = float(timestep.max())
        if self.time is not None and now != self.time:
            self.count = self.count + 1 if now < self.time else 0
        self.time = now
        return self.count


class _Hooks:
    """What one patch puts into its transformers. The dispatcher is told neither module nor grid; hooks note both."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.session = patch.session
        self.layers: dict[nn.Module, _Layer] = {}
        self.attentions: dict[nn.Module, list[nn.Module]] = {}
        self.clock = _Clock()
        self.call: _Call | None = None
        self.active: tuple[_Layer, _Call | None] | None = None
        # Backward may recompute a layer long after its forward, or after another one: its rotary tensor, which
        # checkpointing hands over unchanged and every forward makes anew, says which forward it was.
        from torch.utils.weak import WeakTensorKeyDictionary

        self.calls = WeakTensorKeyDictionary()
        self.warned: set[str] = set()
        policy = patch.session.policy
        self.needs_schedule = policy.dense_steps is not None and policy.dense_steps not in (0, (0, 0))

    def install(self) -> None:
        """Adds backend, hooks and records; every step is undone by the patch."""
        self.dispatch, tables, backend_type = _dispatcher()
        for number, transformer in enumerate(self.patch.modules):
            self._collect(transformer, self._name(transformer, number))
        self.member = self._register(tables, backend_type)
        # Compiled graphs stop at the hooks: what they note are numbers, and a number in a graph is a recompilation.
        enter, leave, enter_layer = map(
            torch.compiler.disable, (self.enter_forward, self.leave_forward, self.enter_layer)
        )
        for transformer, attentions in self.attentions.items():
            self.patch.set_attribute(transformer, "cache_context", self._cache_context(transformer))
            self._hold(transformer.register_forward_pre_hook(enter, with_kwargs=True))
            self._hold(transformer.register_forward_hook(leave, always_call=True))
            for attention in attentions:
                self.patch.set_attribute(attention.processor, "_attention_backend", self.member)
                self._hold(attention.register_forward_pre_hook(enter_layer, with_kwargs=True))

    @property
    def pipeline(self) -> Any:
        """The pipeline that was patched, which alone knows how many steps a run has; None for a bare transformer."""
        return None if isinstance(self.patch.model, nn.Module) else self.patch.model

    def _hold(self, handle: Any) -> None:
        self.patch.on_remove(handle.remove)

    def _name(self, transformer: nn.Module, number: int) -> str:
        """Its name in the pipeline; a bare transformer is called like the pipeline's first, so that reports agree."""
        pipeline = self.pipeline
        for name in _PARTS:
            part = getattr(pipeline, name, None)
            if isinstance(part, nn.Module) and any(m is transformer for m in part.modules()):
                return name
        return "transformer" if number == 0 else f"transformer_{number + 1}"

    def _collect(self, transformer: Any, name: str) -> None:
        blocks = [(f"blocks.{i}", i, block) for i, block in enumerate(transformer.blocks)]
        # A control block of VACE belongs to the layer that its output is added to.
        places = getattr(transformer.config, "vace_layers", ())
        control = zip(places, getattr(transformer, "vace_blocks", ()), strict=True)
        blocks += [(f"vace_blocks.{i}", place, block) for i, (place, block) in enumerate(control)]
        self.attentions[transformer] = []
        for path, index, block in blocks:
            attention, full_name = block.attn1, f"{name}.{path}.attn1"
            if not hasattr(attention.processor, "_attention_backend"):
                raise ValueError(
                    f"`model` must reach attention through the dispatcher of diffusers, got a "
                    f"{type(attention.processor).__name__} without `_attention_backend` at {full_name}"
                )
            record = self.session.record(full_name, index)
            before = attention.processor._attention_backend
            self.layers[attention] = _Layer(record, index, len(transformer.blocks), before)
            self.attentions[transformer].append(attention)

    def _register(self, tables: Any, backend_type: Any) -> Any:
        """A backend that the Enum does not list: isinstance and table look-ups are all that is asked of it."""
        member = str.__new__(backend_type, value := f"hf_sparse_attn_{next(_NUMBERS)}")
        member._name_ = member._value_ = value
        # A deep copy (EMA weights) may outlive the patch: it gets back the backend from before.
        first = self.first_backend = next((layer.backend for layer in self.layers.values()), None)
        member.__deepcopy__ = lambda memo: first
        # The tables live as long as the process and must not keep a model alive that is dropped while patched; the
        # small entry then stays, for a finalizer could change the tables while dynamo or a dispatch reads them.
        hooks, names = ref(self), set(inspect.signature(self.attend).parameters)
        attend = torch.compiler.disable(lambda **given: cast(_Hooks, hooks()).attend(**given))
        for name, entry in zip(_TABLES, (attend, [], names), strict=True):
            getattr(tables, name)[member] = entry
            self.patch.on_remove(getattr(tables, name).pop, member, None)
        return member

    def _cache_context(self, transformer: Any) -> Any:
        """`transformer.cache_context` that also tells the clock; bound, so that a deep copy has its own."""
        clock, own = self.clock, type(transformer).cache_context
        before = transformer.__dict__.get("cache_context")
        parameters = inspect.signature(before or own).parameters.values()
        # Older versions take the name alone.
        takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)

        @contextmanager
        def cache_context(self: nn.Module, name: str, **told: Any) -> Iterator[None]:
            passed = told if takes_more else {}
            outer = clock.branch, clock.announced
            clock.branch, clock.announced = name, (told.get("step_index"), told.get("num_inference_steps"))
            try:
                with own(self, name, **passed) if before is None else before(name, **passed):
                    yield
            finally:
                clock.branch, clock.announced = outer

        return types.MethodType(cache_context, transformer)

    def enter_forward(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes grid, step and branch before a transformer runs, and looks whether its backend is still ours."""
        self.call = self.active = None
        attentions = self.attentions.get(transformer)
        if attentions is None:
            self._warn("a deep copy of a patched model runs dense: make the copy first and patch it")
            return
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        grid = (size // patch for size, patch in zip(latents.shape[2:], transformer.config.patch_size, strict=True))
        step, num_steps = self.clock.step(timestep), self.clock.announced[1] or self._run_length()
        step = step if num_steps is None else min(step, num_steps - 1)
        for attention in attentions:
            now = getattr(attention.processor, "_attention_backend", None)
            if now is not self.member:
                reason = f"attention backend changed after the patch to {getattr(now, 'value', now)}"
                self._warn(f"{reason}: set the backend first, then call patch()")
                self.session.give_up(self.layers[attention].record, reason)
        self.call = _Call(TokenLayout.video(*grid), step, num_steps, self.clock.branch)

    def leave_forward(self, *_: object) -> None:
        """Ends what `enter_forward` began; runs after an exception too."""
        self.call = self.active = None

    def enter_layer(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes which layer asks the dispatcher next; in a recomputation also which forward it belongs to."""
        layer, call, rotary = self.layers.get(attention), self.call, _rotary(args, kwargs)
        if rotary is not None and call is None:
            call = self.calls.get(rotary)
        elif rotary is not None:
            self.calls[rotary] = call
        self.active = None if layer is None else (layer, call)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        """What the dispatcher calls instead of a backend; the names of the arguments say which it passes."""
        # Taken, not read: a cross-attention that shares the processor must not pass for the layer before it.
        active, self.active = self.active, None
        if active is not None:
            odd = {
                "mask": attn_mask is not None,
                "dropout": dropout_p != 0.0,
                "causal order": is_causal,
                "context parallel plan": _parallel_config is not None,
            }
            out = self.sparse(*active, query, key, value, scale, [name for name, has in odd.items() if has])
            if out is not None:
                return out
        before = self.first_backend if active is None else active[0].backend
        last = {"enable_gqa": enable_gqa, "parallel_config": _parallel_config}
        return self.dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, backend=before, **last)

    def sparse(
        self, layer: _Layer, call: _Call | None, q: Tensor, k: Tensor, v: Tensor, scale: float | None, odd: list[str]
    ) -> Tensor | None:
        """Sparse attention of one layer in the dispatcher's layout [batch, tokens, heads, dim], or None for dense."""
        reason = None
        if odd:
            reason = f"the call has a {' and a '.join(odd)}, which is not supported"
        elif call is None:
            reason = "called outside of the transformer's forward: grid and step are unknown"
        elif (q.shape[1], k.shape[1]) != (call.layout.q_len, call.layout.kv_len):
            reason = f"{q.shape[1]} queries and {k.shape[1]} keys do not fit the grid {call.layout}"
        elif self.needs_schedule and call.num_steps is None:
            reason = _NO_SCHEDULE
        if reason is not None or call is None:
            self.session.give_up(layer.record, str(reason))
            return None
        context = Context(
            call.layout,
            layer=layer.index,
            num_layers=layer.num_layers,
            step=call.step,
            num_steps=call.step + 1 if call.num_steps is None else call.num_steps,
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            scale=scale,
            branch=call.branch,
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        done = self.session.sparse(layer.record, q, k, v, context)
        # The copy is made by the processor otherwise; dense attention has these strides too, so graphs fit both.
        return None if done is None else done[0].transpose(1, 2).contiguous()

    def _run_length(self) -> int | None:
        """Steps of the pipeline's current run, or None."""
        pipeline: Any = self.pipeline
        # Set only while the pipeline itself runs; its own number counts the steps that are left after `strength`.
        if getattr(pipeline, "_current_timestep", None) is not None:
            return getattr(pipeline, "_num_timesteps", None)
        scheduler: Any = getattr(pipeline, "scheduler", None)
        return len(scheduler.timesteps) if getattr(scheduler, "num_inference_steps", None) else None

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            log.warning("%s", text)


def _rotary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first rotary table given to an attention layer."""
    tables = kwargs.get("rotary_emb", args[3] if len(args) > 3 else None)
    return tables[0] if isinstance(tables, (tuple, list)) and isinstance(tables[0], Tensor) else None


def _dispatcher() -> tuple[Callable[..., Tensor], Any, Any]:
    """The dispatch function of diffusers, its backend tables and the type of a backend's name.

    Raises:
        RuntimeError: they are not where versions 0.36 to 0.42 have them.
    """
    import diffusers

    try:
        from diffusers.models import attention_dispatch as file

        tables = file._AttentionBackendRegistry
        if all(isinstance(getattr(tables, name), dict) for name in _TABLES):
            return file.dispatch_attention_fn, tables, file.AttentionBackendName
    except (ImportError, AttributeError) as error:
        log.debug("diffusers %s: %s", diffusers.__version__, error)
    raise RuntimeError(f"`diffusers` must have the attention dispatcher of 0.36 to 0.42, got {diffusers.__version__}")
