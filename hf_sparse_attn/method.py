"""What a sparse attention method is: typed parameters and one function from queries and keys to a BlockPattern."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse_attn.autocast import made_on_cpu
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.decoding import Kept, Step, kept_tokens, token_lists
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import RecentValues

if TYPE_CHECKING:
    from hf_sparse_attn.sharing.fingerprint import Fingerprint

Run = Callable[[Tensor, Tensor, Tensor, BlockPattern], tuple[Tensor, Tensor]]

# Patterns of static methods.
_STATIC: RecentValues[BlockPattern | Decline] = RecentValues(64)

# Tokens that the last query of static methods keeps, of a few lengths: every step of a generation has one of its own.
_ROWS: RecentValues[Tensor | Decline] = RecentValues(8)

# Tokens of a block of which methods look at the mean, about.
_POOLED = 64

# Densities that a profile tries of a method that is told one.
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)

NEEDS = {
    "causal": "a causal layout",
    "bidirectional": "a bidirectional layout",
    "video grid": "exactly one video segment with its (frames, height, width)",
    "own selection": "a model that selects its keys by itself",
}

# Fields of LayerInputs in words.
READS = {
    "hidden": "hidden states",
    "q": "queries before positions",
    "k": "keys before positions",
}


@dataclass(frozen=True)
class Decline:
    """A method's answer where it does not apply: the call is dense, and the reason is counted.

    Raises:
        ValueError: there is no reason.
    """

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not self.reason.strip():
            raise ValueError(f"`reason` must say why, got {self.reason!r}")


class PartlyDense(tuple[Tensor, Tensor]):
    """Output and log-sum-exp where a method applied to some heads alone; `reasons` tell why the others are dense."""

    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Knob:
    """The parameter by which the density of a method is set, so that methods can be compared at equal density.

    Args:
        name: the parameter.
        low, high: the range that is searched; the density goes up, or down, all the way from one to the other.
        log: whether to search the logarithm of the parameter.
        integer: whether the parameter is an int.
    """

    name: str
    low: float
    high: float
    log: bool = False
    integer: bool = False


class MethodDoesNotApply(ValueError):
    """A method was asked for directly where it does not apply."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the parameters and whose `pattern` is the method.

    A subclass states what it `needs` (keys of NEEDS), whether its pattern is `static` (depends on the Context alone,
    so that it is built once per layout), whether a gradient may flow (`trainable`), its `paper`, the `knob` that
    sets its density, where it has one, what it `reads` besides q, k and v (fields of LayerInputs), which the model
    family then puts into `ctx.inputs`, and whether what it keeps goes `by_steps`, by the share of the denoising run: a
    call is then dense where nobody knows how long the run is. It says whether it `decodes`: chooses keys for single
    queries of text that is generated (`decode`), and whether it `reads_prompts` sparsely, which most do. One that
    `keeps_all` leaves nothing out on purpose: to run the model's own attention instead is as good.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    static: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    knob: ClassVar[Knob | None] = None
    reads: ClassVar[frozenset[str]] = frozenset()
    by_steps: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    reads_prompts: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = False

    @classmethod
    def make_gates(cls, model: Fingerprint, settings: Mapping[str, Any]) -> Sequence[nn.Module]:
        """The untrained gates of the method for a model, one module for each layer; see gates.GateSet.

        All their tensors must be weights: gates are also built without memory, to be filled from a file.

        Args:
            model: sizes of the model.
            settings: of the gates, as they stand in their file.

        Raises:
            ValueError: the method has no gates, or settings that are none of its.
        """
        raise ValueError(f"`kind` must be a method with trained gates, got {cls.name!r}, which has none")

    def check_model(self, model: Any) -> None:
        """Raises where the method cannot be used with a model: what it was trained with is missing or is another's.

        Raises:
            ValueError, OSError: why not.
        """

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """Which keys each block of queries reads.

        Args:
            q: [batch, heads, q_len, dim], or None for a static method.
            k: [batch, kv_heads, kv_len, dim], or None for a static method.
            ctx: where the call is.

        Returns:
            the pattern of the call's queries, or of all tokens of the row as queries, of which those of a call that
            goes on from a cache are taken; or a Decline with the reason.
        """
        raise TypeError(f"method {self.name!r} must define pattern()")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> tuple[Tensor, Tensor] | Decline:
        """Output [batch, heads, q_len, value dim] and log-sum-exp [batch, heads, q_len].

        Methods with an extra branch override this and call `run(q, k, v, pattern)` once or more.
        """
        found = self.pattern_for(q, k, ctx)
        return found if isinstance(found, Decline) else run(q, k, v, found)

    def decode(self, step: Step) -> Kept | Decline | None:
        """Which keys the query of each row and head reads where text is generated; asked of a method that `decodes`.

        What it keeps from step to step is in `step.memory`, what one layer tells the next in `step.layers`.

        Args:
            step: the queries, the cache, and where in the model they are.

        The default is for static methods: what the last query of the pattern of as many tokens keeps.

        Returns:
            the pages; None for all keys, as in layers that are kept dense; or a Decline with the reason.
        """
        if not self.static:
            raise TypeError(f"method {self.name!r} must define decode()")
        rows: list[Tensor] = []
        for start in [0] if step.first is None else step.first.tolist():
            found = self._last_row(step, step.length - start)
            if isinstance(found, Decline):
                return found
            rows.append(torch.where(found >= 0, found + start, -1))
        return kept_tokens(rows, step.q.shape[0])

    def _last_row(self, step: Step, tokens: int) -> Tensor | Decline:
        """The tokens that the last of so many keeps by a static pattern: int64 [heads or 1, count], -1 for none."""
        (heads, dim), kv_heads = step.q.shape[1::2], step.k.shape[1]
        ctx = Context(TokenLayout.causal(tokens).continued(tokens - 1), step.layer, step.num_layers, num_heads=heads,
                      num_kv_heads=kv_heads, head_dim=dim, scale=step.scale, softcap=step.softcap)  # fmt: skip
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)

        def build() -> Tensor | Decline:
            with made_on_cpu():
                found = _of_call(self.pattern(None, None, ctx), ctx)
            return found if isinstance(found, Decline) else token_lists(found.to_dense()[0, :, -1]).to(step.k.device)

        return _ROWS.get((self, self.cache_key(ctx), step.k.device), build)

    def pattern_for(self, q: Tensor, k: Tensor, ctx: Context) -> BlockPattern | Decline:
        """`pattern`, after the stated needs are checked; static patterns come from a cache."""
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        return self.static_pattern(ctx, q.device) if self.static else _of_call(self.pattern(q, k, ctx), ctx)

    def static_pattern(self, ctx: Context, device: torch.device) -> BlockPattern | Decline:
        """The pattern of a static method on `device`, built once per parameters and layout (the last 64 are kept)."""

        def build() -> BlockPattern | Decline:
            with made_on_cpu():
                found = _of_call(self.pattern(None, None, ctx), ctx)
            return found if isinstance(found, Decline) else found.to(device)

        return _STATIC.get((self, self.cache_key(ctx), device), build)

    def why_not(self, ctx: Context) -> str | None:
        """Why the method does not apply to the call, or None where it does."""
        layout = ctx.layout
        has = {
            "causal": layout.is_causal,
            "bidirectional": not layout.is_causal,
            "video grid": layout.video_part is not None,
            # Layers that select keys are not asked by a context.
            "own selection": False,
        }
        for need in sorted(self.needs):
            if not has[need]:
                return f"{self.name} needs {NEEDS[need]}, got {layout}"
        unread = [READS[name] for name in sorted(self.reads) if getattr(ctx.inputs, name, None) is None]
        return f"{self.name} reads the {' and '.join(unread)}, which the call has not" if unread else None

    def dense_here(self, ctx: Context) -> str | None:
        """Why the method leaves a call to the model's own attention on purpose, which is no fallback; or None."""
        return None

    def remark(self, ctx: Context) -> str | None:
        """What whoever patched the model should know of calls of this length, told once; or None."""
        return None

    def requested_density(self, layer: int) -> float | None:
        """The density asked for in a layer, for the report; None where the method takes none."""
        return self.params().get("density")

    def call_key(self, ctx: Context) -> Hashable:
        """What tells calls over equal tokens apart, for a method that is not the same in all layers and steps."""
        return None

    def least_density(self, ctx: Context) -> float:
        """Share of the visible pairs of tokens that the pattern is about to keep at least, known before it is built.

        By it the policy leaves calls dense that cannot pay, without asking the method. 0 where only the call tells.
        """
        density = getattr(self, "density", None)
        return float(density) if isinstance(density, (int, float)) else 0.0

    def choosing_pairs(self, ctx: Context) -> float:
        """Logits that a method which is not `static` computes for each head before its pattern is known.

        By it the policy leaves calls dense in which finding a pattern takes longer than the pattern can save. The
        default is that of methods which look at means of blocks alone.
        """
        return ctx.layout.q_len * ctx.layout.kv_len / _POOLED**2

    def choices(self, ctx: Context) -> int:
        """How many times a call chooses, each time with many small operators; see `choosing_pairs`."""
        return 1

    def cache_key(self, ctx: Context) -> tuple[Any, ...]:
        """What a static pattern depends on besides the parameters."""
        return (ctx.layout,)

    def turned(self, value: float) -> Method:
        """This method with its knob at `value`; methods whose knob is no single number override it.

        Raises:
            TypeError: the method has no knob.
        """
        if self.knob is None:
            raise TypeError(f"method {self.name!r} has no parameter that sets its density")
        return replace(self, **{self.knob.name: round(value) if self.knob.integer else value})

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Parameters that a profile should try on such tokens, `block_size` left out; none where it need not try it.

        Given as shares of the tokens rather than as numbers they mean the same at any length. Not asked where the
        method does not apply; those that keep everything, or the same as others, are left out by whoever asks.

        Args:
            layout: the tokens of a call.
            tokens: length of the longest call that is known.
        """
        return [{"density": share} for share in SHARES] if cls.knob is not None and cls.knob.name == "density" else []

    def params(self) -> dict[str, Any]:
        """The parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def has_pattern(cls) -> bool:
        """Whether queries, keys and the Context tell what is kept; not where the model itself selects."""
        return "own selection" not in cls.needs

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Small parameter sets that are worth testing, for a few hundred tokens."""
        return [{}]

    @classmethod
    def full_budget(cls) -> dict[str, Any] | None:
        """Parameters with which every key is kept, for a few hundred tokens; None where the method has no budget."""
        return None


@dataclass(frozen=True, kw_only=True)
class Estimating(Method):
    """A method that chooses in two steps: an estimate of every head by itself, and what is kept by it.

    Settings that differ in what they keep alone have one estimate in common: where heads of one layer have different
    settings, it is made once for all of them.
    """

    def estimate_key(self) -> Hashable:
        """Equal for methods with one estimate; None for a setting that makes none."""
        return None

    def estimate(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """What is chosen by: tensors [batch, heads, ...]; arguments as of `pattern`."""
        raise TypeError(f"method {self.name!r} must define estimate() for its estimate_key()")

    def pattern_by(self, estimate: tuple[Tensor, ...], ctx: Context) -> BlockPattern:
        """The pattern of the heads whose estimate is given.

        Args:
            estimate: as `estimate` gives it, of any heads.
            ctx: the call; its number of heads does not matter.
        """
        raise TypeError(f"method {self.name!r} must define pattern_by() for its estimate_key()")


def _of_call(found: BlockPattern | Decline, ctx: Context) -> BlockPattern | Decline:
    """A method's pattern for the queries of a call, where it was made for all tokens of the row."""
    layout = ctx.layout
    if isinstance(found, Decline) or not layout.query_start or found.q_len != layout.kv_len:
        return found
    if found.q_order is not None:
        return Decline(f"the pattern puts all tokens in another order, and only the last {layout.q_len} are queries")
    return found.last_queries(layout.q_len)
