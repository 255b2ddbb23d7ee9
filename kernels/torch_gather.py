"""Block-sparse attention from PyTorch's own operators: gather the keys of a few rows, run fused attention on them.

The CPU path, and what runs on any other device. One call handles a group of rows of one head whose numbers of keys
are nearly equal; the keys gathered for it are few enough to stay in cache, and never exist for the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.backend import KernelBackend
from hf_sparse_attn.kernels.torch_gather_plan import Group, plan_of
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived
from hf_sparse_attn.pattern.ops import key_validity
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.selection import merge_by_lse

# Added to logits that are masked. Finite, because all keys of a query may be masked, and the fused operator gives
# a row of -inf a log-sum-exp of 0; a log-sum-exp below _NO_KEY tells such a query instead.
_MASKED = -1e30
_NO_KEY = -1e29


@BACKENDS.register("torch_gather")
class TorchGather(KernelBackend):
    """Skips blocks with PyTorch operators alone, forward and backward, on any device and in any float type."""

    # Elsewhere than on the CPU it is the last resort: it materialises the logits of a group.
    auto_rank: ClassVar[Mapping[str, int]] = {"cpu": 10, "cuda": 90, "mps": 90, "xpu": 90}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend: there is no call it cannot run."""
        return None

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """See backend.KernelBackend."""
        p, value_dim = pattern, v.shape[3]
        q, k, v = _one_dim(q, k, v)
        batch, heads = q.shape[:2]
        compute = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(batch, heads, p.rows, p.block_q, q.shape[3])
        lse = torch.full(out.shape[:4], _MASKED, dtype=compute, device=q.device)
        queries = _rows(q, p)
        for b, h, head, groups in _heads(p, k, v, batch, heads):
            for group in groups:
                query = queries[b, h].index_select(0, group.rows)[None]
                o, s = _fused(query, *head.gather(group), head.mask(group, compute), scale, softcap)
                o, s = o[0], s[0]
                if group.again:
                    before = out[b, h].index_select(0, group.rows), lse[b, h].index_select(0, group.rows)
                    o, s = merge_by_lse(before, (o, s))
                out[b, h].index_copy_(0, group.rows, o)
                lse[b, h].index_copy_(0, group.rows, s)
        out, lse = _tokens(out, p, q.shape[2]), _tokens(lse, p, q.shape[2])
        # Rows that no group has visited are queries without keys, too; their output was never written.
        none = lse < _NO_KEY
        if bool(none.any()):
            out = out.masked_fill(none[..., None], 0.0)
            lse = lse.masked_fill(none, -torch.inf)
        return out[..., :value_dim], lse

    @staticmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        pattern: BlockPattern, scale: float, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See backend.KernelBackend."""
        p, dim, value_dim = pattern, q.shape[3], v.shape[3]
        q, k, v = _one_dim(q, k, v)
        grad_out, out = (_widened(x, q.shape[3]) for x in (grad_out, out))
        compute = torch.promote_types(q.dtype, torch.float32)
        # A query without keys has log-sum-exp -inf; a large one instead makes its weights exp(logit - lse) zero.
        lse = lse.masked_fill(lse == -torch.inf, -_MASKED)
        # d(logit) = weight * (d(weight) - sum(grad_out * out) + grad_lse).
        shift = (grad_out.to(compute) * out.to(compute)).sum(-1)
        if grad_lse is not None:
            shift = shift - grad_lse.to(compute)
        padded = [_rows(x, p) for x in (q, grad_out, out, lse, shift)]
        dq = torch.zeros(*padded[0].shape, dtype=compute, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=compute, device=q.device) for x in (k, v))
        batch, heads = q.shape[:2]
        group_size = heads // k.shape[1]
        fused = grad_lse is None and not softcap
        for b, h, head, groups in _heads(p, k, v, batch, heads):
            key_grad, value_grad = (
                torch.zeros(len(x), x.shape[1], dtype=compute, device=q.device) for x in (head.keys, head.values)
            )
            for group in groups:
                query, grad, o, s, c = (x[b, h].index_select(0, group.rows)[None] for x in padded)
                key, value = head.gather(group)
                mask = head.mask(group, compute)
                one, two, three = _fused_backward(query, grad, o, s, c, key, value, mask, scale, softcap, fused)
                dq[b, h].index_add_(0, group.rows, one[0].to(compute))
                places = head.places(group).flatten()
                key_grad.index_add_(0, places, two.to(compute).flatten(0, 2))
                value_grad.index_add_(0, places, three.to(compute).flatten(0, 2))
            head.add_back(key_grad, dk[b, h // group_size])
            head.add_back(value_grad, dv[b, h // group_size])
        dq = _tokens(dq, p, q.shape[2])
        return dq[..., :dim].to(q.dtype), dk[..., :dim].to(k.dtype), dv[..., :value_dim].to(v.dtype)


class _Scratch:
    """Memory that the calls of one run share: fresh pages for each would cost more than what is written to them."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of a shape; the next call with this name may get the same."""
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)


class _Head:
    """Keys and values of one head as the groups read them: in the pattern's order, with spare keys at the end."""

    def __init__(
        self, p: BlockPattern, k: Tensor, v: Tensor, batch: int, head: int, spare: bool, scratch: _Scratch
    ) -> None:
        self.pattern, self.scratch = p, scratch
        order = p.kv_order
        self.order = None if order is None else order[min(batch, order.shape[0] - 1), min(head, order.shape[1] - 1)]
        valid = key_validity(p)
        self.limited = valid is not None
        self.as_it_is = valid is None and not spare
        here = torch.zeros(p.kv_len + p.block_k, dtype=torch.bool, device=k.device)
        here[: p.kv_len] = True if valid is None else valid[min(batch, len(valid) - 1), min(head, valid.shape[1] - 1)]
        # What is added to the logits of the key at each place.
        self.bias = torch.zeros(len(here), dtype=torch.float32, device=k.device).masked_fill_(~here, _MASKED)
        self.here = here
        self.keys, self.values = self._lay_out("keys", k), self._lay_out("values", v)

    def _lay_out(self, name: str, x: Tensor) -> Tensor:
        if self.as_it_is and self.order is None and x.is_contiguous():
            return x
        laid = self.scratch.take(name, len(x) if self.as_it_is else len(self.here), x.shape[1])
        if self.order is not None:
            torch.index_select(x, 0, self.order, out=laid[: len(x)])
        else:
            laid[: len(x)].copy_(x)
        # Keys outside the valid range are zeroed, not only masked: weight 0 times NaN would be NaN.
        return laid if self.as_it_is else laid.masked_fill_(~self.here[:, None], 0.0)

    def places(self, group: Group) -> Tensor:
        """Key places of a group, int64 [n, keys]."""
        n = len(group.rows)
        lane = torch.arange(self.pattern.block_k, device=group.starts.device)
        places = (group.starts[:, :, None] + lane).view(n, -1)
        return places if group.columns is None else torch.cat([places, group.columns], dim=1)

    def gather(self, group: Group) -> tuple[Tensor, Tensor]:
        """Keys and values of a group, [1, n, keys, dim] each."""
        whole = group.columns is None
        index = (group.starts if whole else self.places(group)).flatten()
        parts = []
        for name, x in (("gathered keys", self.keys), ("gathered values", self.values)):
            source = self._windows(x, self.pattern.block_k) if whole else x
            out = self.scratch.take(name, len(index), source.shape[1])
            torch.index_select(source, 0, index, out=out)
            parts.append(out.view(1, len(group.rows), -1, x.shape[1]))
        return parts[0], parts[1]

    @staticmethod
    def _windows(x: Tensor, block: int) -> Tensor:
        """Every run of `block` tokens as a row, overlapping in memory: an unaligned block is one copy, too."""
        tokens, dim = x.shape
        return x.as_strided((tokens - block + 1, block * dim), (dim, 1))

    def mask(self, group: Group, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits of a group, [1, n or 1, block_q or 1, keys], or None."""
        p = self.pattern
        mask = None
        if group.tiles is not None:
            table = _tile_bias(p, dtype)
            mask = table[group.tiles].transpose(1, 2).flatten(2)
            if group.columns is not None:
                mask = torch.nn.functional.pad(mask, (0, group.columns.shape[1]))
        if self.limited or group.spare:
            keys = self.bias[self.places(group)].to(dtype)[:, None, :]
            mask = keys if mask is None else mask + keys
        if mask is None:
            return None
        return mask.expand(len(group.rows), -1, -1)[None]

    def add_back(self, grad: Tensor, total: Tensor) -> None:
        """Adds the gradient of the laid-out keys to that of the head's tokens [kv_len, dim]."""
        grad = grad[: self.pattern.kv_len].masked_fill(~self.here[: self.pattern.kv_len, None], 0.0)
        if self.order is None:
            total += grad
        else:
            total.index_add_(0, self.order, grad)


def _tile_bias(p: BlockPattern, dtype: torch.dtype) -> Tensor:
    """The tiles as numbers to add to logits, [tiles, block_q, block_k]."""
    blank = partial(torch.zeros, p.tiles.shape, dtype=dtype, device=p.device)
    return derived(p, ("gather", "tiles", dtype), lambda: blank().masked_fill_(~p.tiles, _MASKED))


def _one_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one head size, as the fused operator wants them: zeros change neither logits nor kept output."""
    dim = max(q.shape[3], v.shape[3])
    return _widened(q, dim), _widened(k, dim), _widened(v, dim)


def _widened(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[3] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[3]))


def _heads(
    p: BlockPattern, k: Tensor, v: Tensor, batch: int, heads: int
) -> Iterator[tuple[int, int, _Head, list[Group]]]:
    """(batch item, query head, its keys and values, its groups); the heads of a group share what is laid out."""
    size = heads // k.shape[1]
    own_order = p.kv_order is not None and p.kv_order.shape[1] > 1
    key_bytes = 2 * k.shape[3] * k.element_size()
    scratch = _Scratch(k)
    for b in range(batch):
        for first in range(0, heads, size):
            plans = [plan_of(p, b, h, key_bytes) for h in range(first, first + size)]
            spare = any(group.spare for plan in plans for group in plan)
            head: _Head | None = None
            for h, plan in enumerate(plans, first):
                if head is None or own_order:
                    head = _Head(p, k[b, first // size], v[b, first // size], b, h, spare, scratch)
                yield b, h, head, plan


def _rows(x: Tensor, p: BlockPattern) -> Tensor:
    """[batch, heads, q_len, ...] in the pattern's order as [batch, heads, rows, block_q, ...], zeros at the end."""
    if p.q_order is not None:
        index = p.q_order.expand(*x.shape[:2], -1)
        x = x.gather(2, index if x.ndim == 3 else index[..., None].expand_as(x))
    spare = p.rows * p.block_q - x.shape[2]
    if spare:
        x = torch.nn.functional.pad(x, (0, spare) if x.ndim == 3 else (0, 0, 0, spare))
    return x.unflatten(2, (p.rows, p.block_q))


def _tokens(x: Tensor, p: BlockPattern, q_len: int) -> Tensor:
    """The inverse of _rows."""
    x = x.flatten(2, 3)[:, :, :q_len]
    if p.q_order is None:
        return x.contiguous()
    index = p.q_order.expand(*x.shape[:2], -1)
    return torch.empty_like(x).scatter_(2, index if x.ndim == 3 else index[..., None].expand_as(x), x)


def _has_fused(device: torch.device) -> bool:
    """Whether PyTorch has a fused operator there that takes a mask and gives the log-sum-exp."""
    return device.type == "cpu"


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention [1, n, queries, dim] over [1, n, keys, dim] and its log-sum-exp."""
    if _has_fused(q.device) and not softcap:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    logits = _logits(q, k, scale, softcap)[0]
    logits = logits if mask is None else logits + mask
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp().to(v.dtype) @ v), lse


def _fused_backward(
    q: Tensor, grad: Tensor, out: Tensor, lse: Tensor, shift: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    scale: float, softcap: float, fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v of one call.

    The fused operator where the log-sum-exp has no gradient of its own and the logits no cap.
    """
    if fused and _has_fused(q.device):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    logits, slope = _logits(q, k, scale, softcap)
    weight = ((logits if mask is None else logits + mask) - lse[..., None]).exp()
    grad, v = grad.to(weight.dtype), v.to(weight.dtype)
    d_logit = weight * (grad @ v.mT - shift[..., None]) * slope
    return d_logit @ k.to(weight.dtype), d_logit.mT @ q.to(weight.dtype), weight.mT @ grad


def _logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Logits before the mask, and their derivative by the product of query and key."""
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(compute) @ k.to(compute).mT * scale
    if not softcap:
        return logits, scale
    bounded = torch.tanh(logits / softcap)
    return softcap * bounded, scale * (1 - bounded * bounded)
