"""Whether a call is worth being sparse: what the table of costs predicts from its shape, and from its pattern.

No clock is read here, and no call is judged by those before it: equal inputs must give equal outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.backend import BackendUnavailable, auto_order, choose_backend
from hf_sparse_attn.context import Context
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern

_KEPT_SHAPES = 1024


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
OWN_TIME = "predicted slower with the method's own time"


def describe(kind: str, mean: Prediction, origin: str) -> str:
    """One line for the report, with the mean numbers of all calls that were dense for it."""
    numbers = f"{milliseconds(mean.sparse)} at density {mean.density:.2f}, dense {milliseconds(mean.dense)}"
    return f"{kind}: {numbers}{NOTES.get(origin, '')}"


NOTES = {"assumed": " (assumed: this device was not measured, see bench --calibrate)"}


def milliseconds(seconds: float) -> str:
    """Two significant digits, in milliseconds."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


@dataclass
class Judge:
    """Predictions for one method under one patch: functions of shape, device, method and table.

    Args:
        method: the method.
        backend: "auto" or a backend by name.
    """

    method: Method
    backend: str
    bounds: dict[Any, tuple[Loss | None, str]] = field(default_factory=dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(self, q: Tensor, ctx: Context) -> Call:
        """The judge's view of one call, whose queries are `q` [batch, heads, q_len, dim]."""
        return Call(self, q, ctx)

    def bound(self, q: Tensor, ctx: Context) -> tuple[Loss | None, str]:
        """Why no pattern of the method can pay for queries `q`, or None; and the origin of the table that says so."""
        key = q.shape, q.dtype, q.device, ctx.layout, self.method.call_key(ctx)
        known = self.bounds.get(key)
        if known is None:
            table = cost.table_for(q.device)
            known = self._loss_at_best(table, cost.shape_of(q, ctx), q.device, ctx), table.origin
            if len(self.bounds) >= _KEPT_SHAPES:
                self.bounds.clear()
            self.bounds[key] = known
        return known

    def _loss_at_best(self, table: cost.Table, shape: cost.Shape, device: torch.device, ctx: Context) -> Loss | None:
        """Whether the least that the method can keep, on the fastest backend that may run, is a loss."""
        least = self.method.least_density(ctx)
        work, new = cost.least_work(shape, least), not self.method.static
        names = _backends(self.backend, device.type)
        best = min(table.sparse_seconds(name, work, shape, new) for name in names)
        found = Prediction(best, table.dense_seconds(shape), least)
        if not found.pays:
            return Loss(TOO_DENSE_AT_BEST, found)
        if not self.method.static:
            own = table.choosing_seconds(shape, self.method.choosing_pairs(ctx), self.method.choices(ctx))
            found = found._replace(sparse=best + own)
        return None if found.pays else Loss(OWN_TIME, found)


class Call:
    """One call as the judge sees it: told of the pattern, once or more often."""

    def __init__(self, judge: Judge, q: Tensor, ctx: Context) -> None:
        self.judge, self.ctx = judge, ctx
        self.table = cost.table_for(q.device)
        self.shape = cost.shape_of(q, ctx)
        self.dense = self.table.dense_seconds(self.shape)
        self.sparse = self.density = 0.0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def found(self, pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> Prediction:
        """The prediction for the call, now that (another) pattern is known."""
        work = cost.work_of(pattern, q.shape[0] * q.shape[1])
        name = self._backend(pattern, q, k, v)
        self.sparse += self.table.sparse_seconds(name, work, self.shape, not self.judge.method.static)
        kept = work.pairs + work.column_pairs + (0.5 if self.shape.causal else 1.0) * work.tile_pairs
        self.density = min(1.0, self.density + kept / max(1, self.shape.pairs))
        return Prediction(self.sparse, self.dense, self.density)

    def _backend(self, pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> str:
        """The backend that will run, without an error: run_pattern raises it where it is due."""
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        try:
            return choose_backend(self.judge.backend, pattern, q, k, v, needs_grad, self.ctx.softcap)[0]
        except BackendUnavailable:
            return self.judge.backend


def _backends(backend: str, device_type: str) -> tuple[str, ...]:
    """Names of the backends that may run."""
    return (backend,) if backend != "auto" else tuple(auto_order(device_type, prompts=True)) or ("none",)


def fewest_keys(ctx: Context, device: torch.device) -> int:
    """Fewest keys with which any pattern could pay on the device, whatever the method and backend."""
    names = _backends("auto", device.type)
    return cost.table_for(device).fewest_keys(names, ctx.num_heads, ctx.head_dim, ctx.layout.is_causal)
