"""patch(), unpatch(), attention(): the whole flow on one screen."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn import auto, transforms
from hf_sparse_attn.autocast import cast_inputs, made_on_cpu, no_autocast
from hf_sparse_attn.compiled import is_traced, refuse_method
from hf_sparse_attn.context import Context, Segment, TokenLayout, check_int
from hf_sparse_attn.decoder import Decoder, find_decoder
from hf_sparse_attn.dispatch import FEW_QUERIES, check_tensors, run_exact, run_pattern
from hf_sparse_attn.effect import check_effect
from hf_sparse_attn.family import Found, check_reads, check_requires, find_family, install, provided, why_no_decoder
from hf_sparse_attn.method import NEEDS, Decline, Method, MethodDoesNotApply
from hf_sparse_attn.patching import Patch, active_patch, forget_copies
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.presets import default_params, find_preset
from hf_sparse_attn.profiles.head_profile import HeadProfile, find_profile
from hf_sparse_attn.registry import BACKENDS, METHODS, make_method
from hf_sparse_attn.selection import with_sinks
from hf_sparse_attn.session import Session


def patch(
    model: Any,
    method: str | Method | HeadProfile | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    dense_layers: int | Sequence[int] | None = None,
    dense_steps: float | tuple[float, float] | None = None,
    min_tokens: int | str = "auto",
    decode: str | Method | None = None,
    quality: str | None = None,
    profile: str | None = None,
    cache: str | None = None,
    texts: Iterable[Any] | None = None,
    images: Iterable[Any] | None = None,
    batches: Iterable[Any] | None = None,
    tokenizer: Any = None,
    **params: Any,
) -> Patch:
    """Makes the self-attention of a pretrained model sparse, in place and reversibly.

    Args:
        model: a transformers model, a diffusers transformer, or a diffusers pipeline.
        method: a name (see `list_methods()`), a Method, a HeadProfile, or the folder or Hub id of a saved one. None
            means the best that is known at the `quality`: a head profile of the model that was made here or comes with
            the package, else the preset of the family that did the least damage where it was measured; `notes` and
            `choice` of the Patch say which, and its quality.
        backend: "auto", or a backend by name, which then never falls back.
        strict: raise wherever sparse attention would be given up (by the method, a mask or a model feature) instead of
            running dense and reporting why.
        dense_layers: number of first layers kept dense, or the layers themselves.
        dense_steps: share of the model evaluations of a denoising run kept dense at its start, or (start, end) shares.
        min_tokens: fewest keys for sparse attention; "auto" keeps dense where sparse is predicted not to pay.
        decode: how text is generated, one token at a time: "exact" reads all keys, on the fastest exact path; "sparse"
            lets the method choose among them where it can, else quest; so does the name of a method that decodes, or
            such a Method; "dense" is the model's own attention to the bit. None means "exact", but "dense" for the
            method "dense", and the method itself where it does nothing but decode. `dense_layers` and `min_tokens`
            hold here, too.
        quality: "high", "balanced" or "fast": parameters, dense layers and dense steps from the family's presets
            (`hf-sparse-attn methods` lists them with their sources). What is given besides goes before them. Without a
            method "balanced" if not given.
        cache: "preallocated" lets every DynamicCache that the model is given append in place from then on, as
            `PreallocatedCache` does, to the same results; None leaves caches as they are.
        profile: "auto": a head profile is made of the model at the `quality`, with a bar, and kept in the cache folder
            (under HF_HOME) for these weights; the next time it is read from there, and no inputs are needed. It stands
            in place of a method.
        texts: to profile a model of text on, strings or token ids; or the prompts of a pipeline of diffusers.
        images: to profile a model of images on, pixel values [channels, height, width] each.
        batches: to profile on, as `hsa.profile` takes them.
        tokenizer: for texts that are strings (None means the model's own, if it is on this machine), or an image
            processor for images that are no pixel values.
        **params: the method's parameters. Those that are not given are what the method's authors ran the family with,
            where that differs from the method's defaults (`report()` shows what is in force).

    Returns:
        the Patch: `report()`, `remove()`, and a context manager that removes itself. A deep copy of the model is dense
        and has no patch; pickles, exported and traced programs of it are refused, and so is the backward of
        checkpointed layers after `remove()`.

    Raises:
        TypeError: a model of no known family, a parameter the method does not have, or arguments that exclude one
            another.
        ValueError: an unknown name, a value out of range, layers that the model does not have, a method that does not
            apply to the family, a profile of another model, or a model that is patched already. The model is then
            untouched.
        OSError: the Hub has no such profile, or cannot be reached.
    """
    if backend != "auto":
        BACKENDS.get(backend)
    inputs = {"texts": texts, "images": images, "batches": batches, "tokenizer": tokenizer}
    choice = None
    if profile is not None or method is None:
        _check_choice(method, profile, params)
    if profile is not None:
        choice = auto.profiled(model, _DEFAULT if quality is None else quality, **inputs)
    elif any(value is not None for value in inputs.values()):
        given = [name for name, value in inputs.items() if value is not None]
        raise TypeError(f'`{given[0]}` must come with `profile="auto"`, which is made on it')
    elif method is None:
        choice = auto.choose(model, _DEFAULT if quality is None else quality)
    if choice is not None:
        method, quality = choice.method, None if isinstance(choice.method, HeadProfile) else choice.quality
    chosen_profile = find_profile(method)
    if chosen_profile is not None:
        if params or quality is not None:
            given = sorted({*params, *(["quality"] if quality is not None else [])})
            raise TypeError(f"`method` is a profile, which holds all parameters; got {', '.join(given)} besides")
        chosen_profile.check(model)
        method = chosen_profile.method()
    if quality is not None:
        if not isinstance(method, str):
            raise TypeError(f"`quality` chooses parameters: `method` must then be a name, got {method!r}")
        METHODS.get(method)
        chosen = find_preset(*find_family(model), method, quality)
        params = {**chosen.params, **params}
        dense_layers = chosen.dense_layers if dense_layers is None else dense_layers
        dense_steps = chosen.dense_steps if dense_steps is None else dense_steps
    if isinstance(method, str):
        METHODS.get(method)
    found = find_family(model)
    if isinstance(method, str):
        params = {**default_params(found[0], found[2], method), **params}
    made = make_method(method, params, _KEYWORDS)  # type: ignore[arg-type]  # paths are profiles
    policy = Policy(
        dense_layers=tuple(dense_layers) if hasattr(dense_layers, "__iter__") else dense_layers,  # type: ignore[arg-type]
        dense_steps=dense_steps,
        min_tokens=min_tokens,
    )
    check_requires(found, made, model)
    lacking = sorted(made.needs - provided(*found[1:]))
    if lacking:
        raise MethodDoesNotApply(
            f"`method` {made.name!r} needs {' and '.join(NEEDS[n] for n in lacking)}; "
            f"{type(model).__name__} (family {found[0]}) has none"
        )
    check_reads(found, made.reads, f"`method` {made.name!r}")
    made.check_model(model)
    decoder = _decoder(model, found, made, decode)
    if cache is not None:
        from hf_sparse_attn.hosts.preallocated import check_cache, preallocate_caches

        check_cache(cache, why_no_decoder(found), model)
    applied = install(model, found, Session(made, policy, backend, strict, decoder))
    try:
        check_effect(applied)
        if cache is not None:
            preallocate_caches(applied)
        if chosen_profile is not None and not any(plan.choice.any() for plan in chosen_profile.plans):
            applied.note("nothing can be sparse: every head of the profile is dense")
        if choice is not None:
            applied.choice = choice
            for said in choice.skipped:
                applied.note(said)
            applied.note(choice.why, logging.INFO)
    except BaseException:
        applied.remove()
        raise
    return applied


# The quality where neither it nor a method is given.
_DEFAULT = "balanced"


def _check_choice(method: object, profile: object, params: dict[str, Any]) -> None:
    """Refuses what would be ignored where `patch` chooses the method itself.

    Raises:
        TypeError, ValueError: names the argument.
    """
    if profile is not None and profile != "auto":
        raise ValueError(f'`profile` must be "auto"; a profile is given as `method`, got {profile!r:.100}')
    if profile is not None and method is not None:
        raise TypeError(f'`method` must be left out beside `profile="auto"`, got {method!r:.100}')
    if params:
        raise TypeError(f"`method` must be given with parameters of it, got {', '.join(sorted(params))} alone")


# What patch() takes by keyword besides the parameters of a method.
_KEYWORDS = tuple(name for name, p in signature(patch).parameters.items() if p.kind is Parameter.KEYWORD_ONLY)


def _decoder(model: Any, found: Found, method: Method, decode: str | Method | None) -> Decoder:
    """The decoder of a patch; see `patch` for what is raised."""

    def make(name: str) -> Method:
        return make_method(name, default_params(found[0], found[2], name))

    decoder = find_decoder(method, decode, make)
    why = why_no_decoder(found)
    if decode is not None and why is not None:
        raise ValueError(
            f"`decode` must be left out for {type(model).__name__} (family {found[0]}), which {why}, got {decode!r}"
        )
    if decoder.method is not None:
        decoder.method.check_model(model)
    return decoder


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
    is_causal: bool | None = None,
    grid: tuple[int, int, int] | None = None,
    **params: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention as a function; causal, unless `is_causal`, `grid` or `ctx` says otherwise.

    Args:
        q: [batch, heads, q_len, dim].
        k: [batch, kv_heads, kv_len, dim]; kv_heads divides heads, keys are never repeated in memory.
        v: [batch, kv_heads, kv_len, value dim].
        method: a name, a Method, or a ready BlockPattern.
        ctx: what the tokens are; None means text whose last query is at the last key, causal unless `is_causal` is
            False (not used by a pattern).
        scale: factor on the logits; None means that of `ctx`, else dim ** -0.5.
        backend: "auto", or a backend by name, which then never falls back.
        return_lse: also return the log-sum-exp of the logits, [batch, heads, q_len].
        softcap: the scaled logits x become softcap * tanh(x / softcap); None means that of `ctx`, else 0: no cap.
        sinks: one more logit per query head whose value is 0, [heads] (gpt-oss), or None.
        is_causal: whether a query sees only the keys up to its own; short for a `ctx`. None means yes, for a video no.
        grid: (frames, height, width) of a video in raster order that is all the tokens; short for a `ctx`. With text
            beside the video give `Context(TokenLayout.video(..., text_before=, text_after=))`.
        **params: the method's parameters, where `method` is a name.

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
    if params:
        if isinstance(method, BlockPattern):
            raise TypeError(f"`params` must be empty when `method` is a pattern, got {', '.join(sorted(params))}")
        method = make_method(method, params)
    if is_traced():
        raise RuntimeError("sparse attention must not be traced by torch.jit, which sees no kernel; use torch.export")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"`sinks` must be one logit per query head [{q.shape[1]}], got shape {list(sinks.shape)}")
    short = [name for name, value in (("is_causal", is_causal), ("grid", grid)) if value is not None]
    if short and (ctx is not None or isinstance(method, BlockPattern)):
        whole = "a pattern" if isinstance(method, BlockPattern) else "a `ctx`"
        raise ValueError(f"`{'` and `'.join(short)}` must be left out beside {whole}, which says it")
    # A step of generation, which should cost no more than the attention itself: no context, no pattern.
    is_step = ctx is None and grid is None and is_causal in (None, True) and _is_step(q, k, method)
    if short and not is_step:
        ctx = _context(q, k, is_causal, grid)
    if transforms.are_transformed(q, k, v, sinks):

        def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
            found = attention(q, k, v, method, ctx, scale, backend, True, softcap, sinks)
            assert isinstance(found, tuple)
            return found

        out, lse = transforms.step(plain, q, k, v, sinks)
        return (out, lse) if return_lse else out
    cap = (0.0 if ctx is None else ctx.softcap) if softcap is None else softcap
    if not cap >= 0:
        raise ValueError(f"`softcap` must be 0 or more, got {softcap}")
    if is_step:
        factor = q.shape[3] ** -0.5 if scale is None else scale
        with no_autocast(q.device):
            out, lse, _ = run_exact(q, k, v, factor, cap, backend=backend)
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
        return (out, lse) if return_lse else out
    with no_autocast(q.device), made_on_cpu():
        if isinstance(method, BlockPattern):
            factor = scale if scale is not None else (ctx.softmax_scale if ctx is not None else q.shape[3] ** -0.5)
            out, lse, _ = run_pattern(q, k, v, method, factor, backend, cap)
        else:
            out, lse = _by_method(q, k, v, method, ctx, scale, backend, cap)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def _is_step(q: Tensor, k: Tensor, method: str | Method | BlockPattern) -> bool:
    """Whether few queries read all keys up to their own, whatever the rest of the call is."""
    if not 0 < q.shape[2] <= min(FEW_QUERIES, k.shape[2]) or isinstance(method, BlockPattern):
        return False
    if torch.compiler.is_compiling():
        return False
    if isinstance(method, str):
        return METHODS.get(method).keeps_all
    return isinstance(method, Method) and method.keeps_all


def _context(q: Tensor, k: Tensor, is_causal: bool | None, grid: tuple[int, int, int] | None) -> Context:
    """The context that the short arguments of `attention` stand for."""
    if is_causal is not None and not isinstance(is_causal, bool):
        raise TypeError(f"`is_causal` must be a bool, got {is_causal!r} of type {type(is_causal).__name__}")
    if grid is None:
        return Context.for_tensors(q, k, is_causal)
    if not isinstance(grid, Sequence) or len(grid) != 3:
        raise ValueError(f"`grid` must be (frames, height, width), got {grid!r}")
    frames, height, width = (check_int(f"grid[{i}]", size, 1) for i, size in enumerate(grid))
    tokens = frames * height * width
    if (q.shape[2], k.shape[2]) != (tokens, tokens):
        raise ValueError(
            f"`grid` must have as many tokens as `q` and `k`, got {grid} = {tokens} for {q.shape[2]} queries and "
            f"{k.shape[2]} keys; with text beside the video give a `ctx`"
        )
    layout = TokenLayout.segments([Segment("video", tokens, (frames, height, width))], causal=bool(is_causal))
    return Context(layout, num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[3])


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


def check_device(name: str | None) -> torch.device:
    """The device called `name`; None means `default_device`.

    Raises:
        ValueError: torch does not know it, or cannot use it here.
    """
    try:
        device = default_device() if name is None else torch.device(name)
        torch.empty(0, device=device)
    # Torch raises RuntimeError or AssertionError for a device that it does not know or was not built for.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` must be one that torch can use here, got {name!r}: {error}") from None
    return device


def default_device() -> torch.device:
    """The device programs of this package run on: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
