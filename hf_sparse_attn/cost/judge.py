"""Whether a call is worth being sparse: what the table of costs predicts, and what earlier calls taught."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.backend import BackendUnavailable, auto_order, choose_backend
from hf_sparse_attn.context import Context
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern

# Calls in a row that were not worth it, after which the method is asked more and more rarely: not in the next 2 calls,
# then not in the next 4, up to 64.
LOSSES = 3
_LONGEST_PAUSE = 64
# The estimate of a method counts once it was timed this often; the fastest of the last few is what it costs.
_FEWEST_ESTIMATES, _LAST_ESTIMATES = 3, 8
_KEPT_SHAPES = 1024

PAUSED = f"asking the method did not pay in {LOSSES} calls or more before"


class Prediction(NamedTuple):
    """What is predicted of a call: seconds sparse and dense, and the share of the visible pairs that is kept."""

    sparse: float
    dense: float
    density: float

    @property
    def pays(self) -> bool:
        """Whether sparse attention is faster by more than what a prediction can be off."""
        return self.sparse < cost.MARGIN * self.dense


class Loss(NamedTuple):
    """Why a call is dense by prediction: what was compared, and the numbers."""

    kind: str
    prediction: Prediction


# What stands before the numbers of a Loss in the report, which gives their mean.
TOO_DENSE = "predicted slower"
TOO_DENSE_AT_BEST = "predicted slower at best"
ESTIMATE = "predicted slower with the method's own time"


def describe(kind: str, mean: Prediction, origin: str) -> str:
    """One line for the report, with the mean numbers of all calls that were dense for it."""
    numbers = f"{milliseconds(mean.sparse)} at density {mean.density:.2f}, dense {milliseconds(mean.dense)}"
    return f"{kind}: {numbers}{NOTES.get(origin, '')}"


NOTES = {"assumed": " (assumed: this device was not measured, see bench --calibrate)"}


def milliseconds(seconds: float) -> str:
    """Two significant digits, in milliseconds."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


class _Streak:
    """Losses in a row at one place, and how many calls are left before the method is asked again."""

    def __init__(self) -> None:
        self.losses = self.pause = 0

    def note(self, won: bool) -> None:
        if won:
            self.losses = self.pause = 0
            return
        self.losses += 1
        if self.losses >= LOSSES:
            self.pause = min(_LONGEST_PAUSE, 2 << (self.losses - LOSSES))


# Seconds per key that the pattern building of a method took lately, by method, device and shape class.
_ESTIMATES: OrderedDict[Any, deque[float]] = OrderedDict()


@dataclass
class Judge:
    """Predictions and experience of one method under one patch; nothing is measured apart from what runs anyway.

    Args:
        method: the method.
        backend: "auto" or a backend by name.
    """

    method: Method
    backend: str
    streaks: dict[Any, _Streak] = field(default_factory=dict)
    bounds: dict[Any, tuple[Loss | None, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What the method's own time is noted by: equal methods share it, where they can be compared.
        try:
            hash(self.method)
            self.name: Any = self.method
        except TypeError:
            self.name = id(self.method)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(self, layer: str, q: Tensor, ctx: Context) -> Call:
        """The judge's view of one call of `layer`, whose queries are `q` [batch, heads, q_len, dim]."""
        return Call(self, layer, q, ctx)

    def bound(self, q: Tensor, ctx: Context) -> tuple[Loss | None, str]:
        """Why no pattern of the method can pay for queries `q`, or None; and the origin of the table that says so."""
        key = q.shape, q.dtype, ctx.layout, self.method.call_key(ctx)
        known = self.bounds.get(key)
        if known is None:
            table = cost.table_for(q.device)
            found = self.at_best(table, cost.shape_of(q, ctx), q.device, ctx)
            if len(self.bounds) >= _KEPT_SHAPES:
                self.bounds.clear()
            known = self.bounds[key] = None if found.pays else Loss(TOO_DENSE_AT_BEST, found), table.origin
        return known

    def take_pause(self, layer: str, q: Tensor, ctx: Context) -> int:
        """In how many calls from now the method is not to be asked; whoever takes the number keeps to it."""
        if self.method.static or not self.streaks:
            return 0
        streaks = self.streaks_of(layer, self.class_of(cost.shape_of(q, ctx), q.device, ctx))
        pause = max(streak.pause for streak in streaks)
        for streak in streaks:
            streak.pause = 0
        return pause

    def at_best(self, table: cost.Table, shape: cost.Shape, device: torch.device, ctx: Context) -> Prediction:
        """The prediction for the least that the method can keep, on the fastest backend that may run."""
        least = self.method.least_density(ctx)
        work, new = cost.least_work(shape, least), not self.method.static
        names = _backends(self.backend, device.type)
        best = min(table.sparse_seconds(name, work, shape, new) for name in names)
        return Prediction(best, table.dense_seconds(shape), least)

    def class_of(self, shape: cost.Shape, device: torch.device, ctx: Context) -> Any:
        """Calls that share what is learned: of like shape, and alike to the method."""
        n = shape.kv_len
        # Lengths within a quarter of a power of two, all else equal.
        size = n.bit_length(), n >> max(0, n.bit_length() - 3)
        return (*shape[2:], size, shape.q_len == n, device), self.method.call_key(ctx)

    def streaks_of(self, layer: str, shape: Any) -> tuple[_Streak, _Streak]:
        """The streaks of a shape class over all layers, and of this layer."""
        if len(self.streaks) > _KEPT_SHAPES:
            self.streaks.clear()
        return tuple(self.streaks.setdefault((key, shape), _Streak()) for key in (None, layer))  # type: ignore[return-value]


class Call:
    """One call as the judge sees it: asked before the method is, told of the pattern, and closed at the end."""

    def __init__(self, judge: Judge, layer: str, q: Tensor, ctx: Context) -> None:
        self.judge, self.ctx, self.q = judge, ctx, q
        self.table = cost.table_for(q.device)
        self.shape = cost.shape_of(q, ctx)
        self.dense = self.table.dense_seconds(self.shape)
        self.key = judge.class_of(self.shape, q.device, ctx)
        self.dynamic = not judge.method.static
        self.streaks: Sequence[_Streak] = judge.streaks_of(layer, self.key) if self.dynamic else ()
        self.sparse = self.density = 0.0
        self.begin: Any = None
        self.estimated: float | None = None

    def why_not_ask(self) -> str | Loss | None:
        """Why the method need not be asked by what earlier calls taught, or None."""
        if not self.dynamic:
            return None
        paused = [s for s in self.streaks if s.pause]
        for streak in paused:
            streak.pause -= 1
        if paused:
            return PAUSED
        known = _ESTIMATES.get((self.judge.name, self.key))
        if known is not None and len(known) >= _FEWEST_ESTIMATES and self.streaks[0].losses < LOSSES:
            best = self.judge.at_best(self.table, self.shape, self.q.device, self.ctx)
            with_own = best._replace(sparse=best.sparse + min(known) * self.shape.kv_len)
            if not with_own.pays:
                self._close(False)
                return Loss(ESTIMATE, with_own)
        return None

    def start(self) -> None:
        """Starts the clock of the method's own time."""
        if self.dynamic and self.q.device.type == "cuda":
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
        elif self.dynamic:
            self.begin = time.perf_counter()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def found(self, pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> Prediction:
        """The prediction for the call, now that (another) pattern is known; stops the clock."""
        self._stop()
        work = cost.work_of(pattern, q.shape[0] * q.shape[1])
        name = self._backend(pattern, q, k, v)
        self.sparse += self.table.sparse_seconds(name, work, self.shape, self.dynamic)
        kept = work.pairs + work.column_pairs + (0.5 if self.shape.causal else 1.0) * work.tile_pairs
        self.density = min(1.0, self.density + kept / max(1, self.shape.pairs))
        return Prediction(self.sparse, self.dense, self.density)

    def rejected(self, learns: bool = True) -> Loss:
        """The call ends dense after the method was asked."""
        if learns:
            self._close(False)
        return Loss(TOO_DENSE, Prediction(self.sparse, self.dense, self.density))

    def done(self) -> None:
        """The call ends sparse."""
        spent = self.sparse + (self.estimated or 0.0)
        self._close(spent < cost.MARGIN * self.dense)

    def _close(self, won: bool) -> None:
        for streak in self.streaks:
            streak.note(won)

    def _backend(self, pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> str:
        """The backend that will run, without an error: run_pattern raises it where it is due."""
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        try:
            return choose_backend(self.judge.backend, pattern, q, k, v, needs_grad, self.ctx.softcap)[0]
        except BackendUnavailable:
            return self.judge.backend

    def _stop(self) -> None:
        """Notes what the method took since `start`; on a GPU what earlier calls took, so that nothing waits."""
        begin, self.begin = self.begin, None
        if begin is None:
            return
        key = (self.judge.name, self.key)
        known = _ESTIMATES.setdefault(key, deque(maxlen=_LAST_ESTIMATES))
        if len(_ESTIMATES) > _KEPT_SHAPES:
            _ESTIMATES.popitem(last=False)
        if isinstance(begin, float):
            self.estimated = time.perf_counter() - begin
            known.append(self.estimated / self.shape.kv_len)
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        _PENDING.append((begin, end, known, self.shape.kv_len))
        while _PENDING and _PENDING[0][1].query():
            first, last, noted, tokens = _PENDING.popleft()
            noted.append(first.elapsed_time(last) * 1e-3 / tokens)
        # This call's own time is not known yet: the last one's stands for it.
        self.estimated = known[-1] * self.shape.kv_len if known else None


_PENDING: deque[tuple[Any, Any, deque[float], int]] = deque(maxlen=4096)


def _backends(backend: str, device_type: str) -> tuple[str, ...]:
    """Names of the backends that may run."""
    return (backend,) if backend != "auto" else tuple(auto_order(device_type)) or ("none",)


def fewest_keys(ctx: Context, device: torch.device) -> int:
    """Fewest keys with which any pattern could pay on the device, whatever the method and backend."""
    names = _backends("auto", device.type)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return cost.table_for(device).fewest_keys(names, ctx.num_heads, ctx.head_dim, ctx.layout.is_causal, threads)
