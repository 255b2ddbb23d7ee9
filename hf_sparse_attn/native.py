"""Every method under "hsa:<name>" as an attention implementation of transformers, without patch()."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from hf_sparse_attn.hosts import NATIVE_PREFIX, PATCHED_PREFIX
from hf_sparse_attn.nearest import nearest

if TYPE_CHECKING:
    from torch import nn

    from hf_sparse_attn.hosts.transformers_hook import LayerState, Output
    from hf_sparse_attn.report import Report

log = logging.getLogger(__name__)

# The module of transformers that holds the table of attention implementations.
_AWAITED = "transformers.modeling_utils"


def install() -> None:
    """Registers all methods with transformers: now where it is imported already, else as soon as it is."""
    if _AWAITED in sys.modules:
        _register_all()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register(name: str) -> None:
    """Adds a method registered later; before transformers is imported nothing, for its import adds them all."""
    if _AWAITED not in sys.modules or any(isinstance(finder, _Watch) for finder in sys.meta_path):
        return
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    find = _finder(name)

    # The hook is imported by the first call: it may be what imports transformers just now.
    def attention(*args: Any, **kwargs: Any) -> Output:
        from hf_sparse_attn.hosts.transformers_hook import attend

        return attend(find, None, *args, **kwargs)

    def mask(**wanted: Any) -> Any:
        from hf_sparse_attn.hosts.transformers_hook import describe_mask

        return describe_mask(None, **wanted)

    AttentionInterface.register(f"{NATIVE_PREFIX}{name}", attention)
    AttentionMaskInterface.register(f"{NATIVE_PREFIX}{name}", mask)


def report(model: nn.Module) -> Report:
    """What the layers of a model loaded with attn_implementation="hsa:<name>" did so far.

    Raises:
        ValueError: no layer has run sparse attention natively.
    """
    from hf_sparse_attn.report import Report

    states = [s for s in (_STATES.get(m) for m in model.modules()) if s is not None]
    if not states:
        raise ValueError(f"`model` must have run with attn_implementation='hsa:<name>', got {type(model).__name__}")
    method = states[0].session.asked
    layers = [s.record.report(method.params().get("density")) for s in states]
    notes = tuple(dict.fromkeys(text for s in states for text in s.session.notes))
    return Report(method.name, method.params(), "native", layers, notes, decode=str(states[0].session.decoder))


def _register_all() -> None:
    from hf_sparse_attn.registry import METHODS

    for name in METHODS.names():
        register(name)
    _tell_unknown_names()


def _tell_unknown_names() -> None:
    """Has transformers say of an unknown "hsa:<name>" which methods there are; all other names go as they did."""
    file = sys.modules[_AWAITED]
    owner: Any = file.PreTrainedModel
    check = getattr(owner, "get_correct_attn_implementation", None)
    if check is None or hasattr(check, "_hsa"):
        return

    @wraps(check)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        known = file.ALL_ATTENTION_FUNCTIONS.valid_keys()
        if str(requested_attention).startswith(NATIVE_PREFIX) and requested_attention not in known:
            own = sorted(n for n in known if n.startswith(NATIVE_PREFIX) and not n.startswith(PATCHED_PREFIX))
            raise ValueError(
                f"`attn_implementation` must be one of {', '.join(own)}, or another one of transformers; "
                f"got {requested_attention!r}{nearest(requested_attention, own)}"
            )
        return check(self, requested_attention, *args, **kwargs)

    checked._hsa = True  # type: ignore[attr-defined]
    owner.get_correct_attn_implementation = checked


# The state of every attention module that ran natively, or None for those that are no text attention.
_STATES: WeakKeyDictionary[nn.Module, LayerState | None] = WeakKeyDictionary()
_MAKING = RLock()


def _finder(name: str) -> Callable[[nn.Module], LayerState | None]:
    """Finds the state of a module under the method `name`, made at its first forward."""

    def find(module: nn.Module) -> LayerState | None:
        states = _STATES
        state: LayerState | None = states.get(module)
        if module in states and (state is None or state.session.asked.name == name):
            return state
        with _MAKING:
            state = states.get(module)
            if module not in states or (state is not None and state.session.asked.name != name):
                states[module] = state = _make_state(name, module, state)
        return state

    return find


def _make_state(name: str, module: nn.Module, before: LayerState | None) -> LayerState | None:
    from dataclasses import replace

    from hf_sparse_attn.hosts.natively_sparse_kind import is_sparse_by_itself
    from hf_sparse_attn.hosts.transformers_compile import CompiledLayer
    from hf_sparse_attn.hosts.transformers_encoder import is_encoder_attention, other_tokens
    from hf_sparse_attn.hosts.transformers_hook import LayerState, default_dense, dense_function, is_text_attention
    from hf_sparse_attn.method import NEEDS, MethodDoesNotApply
    from hf_sparse_attn.policy import Policy
    from hf_sparse_attn.record import LayerRecord
    from hf_sparse_attn.registry import METHODS
    from hf_sparse_attn.session import Session

    text = is_text_attention(module)
    if not text and (not is_encoder_attention(module) or other_tokens(module)):
        # Classes that do cross-attention too are told apart by where they stand, which is not known here.
        return None
    method = METHODS.get(name)()
    if is_sparse_by_itself(module.config):
        raise MethodDoesNotApply(
            f"`attn_implementation` 'hsa:{name}' cannot be used with {type(module).__name__}, which selects its keys "
            'by itself: use hf_sparse_attn.patch(model, "native")'
        )
    lacking = sorted(method.needs - {"causal"}) if text else []
    if lacking:
        raise MethodDoesNotApply(
            f"`attn_implementation` 'hsa:{name}' needs {' and '.join(NEEDS[n] for n in lacking)}; "
            "a language model has none"
        )
    if method.reads:
        raise MethodDoesNotApply(
            f"`attn_implementation` 'hsa:{name}' reads more of a layer than q, k and v: use hf_sparse_attn.patch()"
        )
    config: Any = module.config
    if text and module.layer_idx >= 0:  # type: ignore[operator]
        index = int(module.layer_idx)  # type: ignore[arg-type]
    elif before is not None:
        index = before.record.index
    else:
        # Encoders do not number their layers: by the order in which they run first.
        index = sum(s is not None and m.config is config for m, s in _STATES.items())
    layers = getattr(config, "num_hidden_layers", index + 1)
    if not text and "causal" in method.needs and index == 0:
        # The towers of a model of several parts get the name with the rest: no reason to refuse it.
        log.warning("method %s needs causal attention: %s stays dense unless it is", name, type(module).__name__)
    record = LayerRecord(f"{type(module).__name__}.{index}", index)
    session, dense = Session(method, Policy(), "auto", False), default_dense(module)
    # Layers of one model tell what is to be known once.
    for other, known in list(_STATES.items()):
        if known is not None and other.config is config:
            session.notes = known.session.notes
    state = LayerState(record, session, layers, dense)
    return replace(state, compiled=CompiledLayer(state, module, dense_function(dense, module)))


class _Watch(MetaPathFinder):
    """Waits for the import of transformers, lets it happen, registers the methods, and is gone."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(Loader):
    """Runs a module as its own loader does, then registers the methods."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self._loader = loader
        self._watch = watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._watch in sys.meta_path:
            sys.meta_path.remove(self._watch)
        try:
            _register_all()
        except Exception:
            # An error in some method's file must not make transformers fail to import.
            log.warning("the names 'hsa:<method>' could not be registered with transformers", exc_info=True)
