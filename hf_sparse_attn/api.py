"""patch(), unpatch(), attention(): the whole flow on one screen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.autocast import cast_inputs, no_autocast
from hf_sparse_attn.compiled import refuse_method
from hf_sparse_attn.context import Context
from hf_sparse_attn.dispatch import check_tensors, run_pattern
from hf_sparse_attn.family import check_reads, find_family, install, provided
from hf_sparse_attn.method import NEEDS, Decline, Method, MethodDoesNotApply
from hf_sparse_attn.patching import Patch, active_patch, forget_copies
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.presets import find_preset
from hf_sparse_attn.profiles.head_profile import HeadProfile, find_profile
from hf_sparse_attn.registry import BACKENDS, METHODS, make_method
from hf_sparse_attn.selection import with_sinks
from hf_sparse_attn.session import Session


def patch(
    model: Any,
    method: str | Method | HeadProfile | os.PathLike[str],
    *,
    backend: str = "auto",
    strict: bool = False,
    dense_layers: int | Sequence[int] | None = None,
    dense_steps: float | tuple[float, float] | None = None,
    min_tokens: int | str = "auto",
    quality: str | None = None,
    **params: Any,
) -> Patch:
    """Makes the self-attention of a pretrained model sparse, in place and reversibly.

    Args:
        model: a transformers model, a diffusers transformer, or a diffusers pipeline.
        method: a name (see `list_methods()`), a Method, a HeadProfile, or the folder or Hub id of a saved one.
        backend: "auto", or a backend by name, which then never falls back.
        strict: raise wherever sparse attention would be given up (by the method, a mask or a model feature) instead of
            running dense and reporting why.
        dense_layers: number of first layers kept dense, or the layers themselves.
        dense_steps: share of the model evaluations of a denoising run kept dense at its start, or (start, end) shares.
        min_tokens: fewest keys for sparse attention; "auto" keeps dense where sparse is predicted not to pay.
        quality: "high", "balanced" or "fast": parameters, dense layers and dense steps from the family's presets
            (`hf-sparse-attn methods` lists them with their sources). What is given besides goes before them.
        **params: the method's parameters.

    Returns:
        the Patch: `report()`, `remove()`, and a context manager that removes itself. A deep copy of the model is dense
        and has no patch; pickles, exported and traced programs of it are refused, and so is the backward of
        checkpointed layers after `remove()`.

    Raises:
        TypeError: a model of no known family, or a parameter the method does not have.
        ValueError: an unknown name, a value out of range, a method that does not apply to the family, a profile of
            another model, or a model that is patched already. The model is then untouched.
        OSError: the Hub has no such profile, or cannot be reached.
    """
    if backend != "auto":
        BACKENDS.get(backend)
    profile = find_profile(method)
    if profile is not None:
        if params or quality is not None:
            given = sorted({*params, *(["quality"] if quality is not None else [])})
            raise TypeError(f"`method` is a profile, which holds all parameters; got {', '.join(given)} besides")
        profile.check(model)
        method = profile.method()
    if quality is not None:
        if not isinstance(method, str):
            raise TypeError(f"`quality` chooses parameters: `method` must then be a name, got {method!r}")
        METHODS.get(method)
        chosen = find_preset(*find_family(model), method, quality)
        params = {**chosen.params, **params}
        dense_layers = chosen.dense_layers if dense_layers is None else dense_layers
        dense_steps = chosen.dense_steps if dense_steps is None else dense_steps
    made = make_method(method, params)  # type: ignore[arg-type]  # paths are profiles
    policy = Policy(
        dense_layers=dense_layers if dense_layers is None or isinstance(dense_layers, int) else tuple(dense_layers),
        dense_steps=dense_steps,
        min_tokens=min_tokens,
    )
    found = find_family(model)
    lacking = sorted(made.needs - provided(*found[1:]))
    if lacking:
        raise MethodDoesNotApply(
            f"`method` {made.name!r} needs {' and '.join(NEEDS[n] for n in lacking)}; "
            f"{type(model).__name__} (family {found[0]}) has none"
        )
    check_reads(found, made.reads, f"`method` {made.name!r}")
    made.check_model(model)
    return install(model, found, Session(made, policy, backend, strict))


def unpatch(model: Any) -> None:
    """Removes the patch of a model or pipeline; it is then as it was, bit for bit.

    A deep copy of a patched model is as if it had been unpatched already: nothing is left to do.

    Raises:
        ValueError: the model is not patched.
    """
    modules = find_family(model)[2]
    patches = {id(p): p for module in modules if (p := active_patch(module)) is not None}
    copied = forget_copies(modules)
    if not patches and not copied:
        raise ValueError(f"`model` must be patched, got a {type(model).__name__} without a patch")
    for found in patches.values():
        found.remove()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: str | Method | BlockPattern,
    ctx: Context | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention as a function.

    Args:
        q: [batch, heads, q_len, dim].
        k: [batch, kv_heads, kv_len, dim]; kv_heads divides heads, keys are never repeated in memory.
        v: [batch, kv_heads, kv_len, value dim].
        method: a name, a Method, or a ready BlockPattern.
        ctx: what the tokens are; None means causal text whose last query is at the last key (not used by a pattern).
        scale: factor on the logits; None means that of `ctx`, else dim ** -0.5.
        backend: "auto", or a backend by name, which then never falls back.
        return_lse: also return the log-sum-exp of the logits, [batch, heads, q_len].
        softcap: the scaled logits x become softcap * tanh(x / softcap); None means that of `ctx`, else 0: no cap.
        sinks: one more logit per query head whose value is 0, [heads] (gpt-oss), or None.

    Returns:
        output [batch, heads, q_len, value dim] in the dtype of `q`, with the log-sum-exp if asked for. Under autocast
        in its dtype, as from F.scaled_dot_product_attention.

    Raises:
        ValueError, TypeError: shapes, types or names that do not fit.
        MethodDoesNotApply: the method declines; there is no dense model attention to fall back to here.
        BackendUnavailable: the backend asked for cannot run the call.
    """
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = cast_inputs(q, k, v)
    check_tensors(q, k, v)
    if torch.jit.is_tracing():
        raise RuntimeError("sparse attention must not be traced by torch.jit, which sees no kernel; use torch.export")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"`sinks` must be one logit per query head [{q.shape[1]}], got shape {list(sinks.shape)}")
    cap = (0.0 if ctx is None else ctx.softcap) if softcap is None else softcap
    if not cap >= 0:
        raise ValueError(f"`softcap` must be 0 or more, got {softcap}")
    with no_autocast(q.device):
        if isinstance(method, BlockPattern):
            factor = scale if scale is not None else (ctx.softmax_scale if ctx is not None else q.shape[3] ** -0.5)
            out, lse, _ = run_pattern(q, k, v, method, factor, backend, cap)
        else:
            out, lse = _by_method(q, k, v, method, ctx, scale, backend, cap)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _by_method(
    q: Tensor, k: Tensor, v: Tensor, method: str | Method, ctx: Context | None, scale: float | None, backend: str,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if torch.compiler.is_exporting():
        refuse_method()
    made = make_method(method, {})
    ctx = Context.for_tensors(q, k) if ctx is None else ctx
    if (ctx.layout.q_len, ctx.layout.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"`ctx` must describe {q.shape[2]} queries and {k.shape[2]} keys, "
            f"got {ctx.layout.q_len} and {ctx.layout.kv_len}"
        )
    factor = ctx.softmax_scale if scale is None else scale
    sizes = (q.shape[1], k.shape[1], q.shape[3])
    if (factor, softcap, *sizes) != (ctx.scale, ctx.softcap, ctx.num_heads, ctx.num_kv_heads, ctx.head_dim):
        heads, kv_heads, dim = sizes
        ctx = replace(ctx, scale=factor, softcap=softcap, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)

    def run(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
        return run_pattern(q, k, v, pattern, factor, backend, softcap)[:2]

    done = made.attention(q, k, v, ctx, run)
    if isinstance(done, Decline):
        raise MethodDoesNotApply(f"`method` {made.name!r} does not apply: {done.reason}")
    return done


def default_device() -> torch.device:
    """The device programs of this package run on: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
