"""DeepSeek sparse attention: the tokens that a small trained indexer finds for each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Method, Run
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.gates import Gates, GateSet, checked_gates, find_gates, gate_of, unknown_settings
from hf_sparse_attn.trained.dsa import attend, dsa_select_tokens, tokens_pattern

# Width of an indexer over that of all heads of attention, where there is none: that of DeepSeek-V3.2, whose 64 index
# heads of 128 serve 128 heads that read latents of 576.
_SHARE = 1 / 9


@METHODS.register("dsa")
@dataclass(frozen=True, kw_only=True)
class Dsa(Method):
    """Each query keeps the tokens up to itself that a trained indexer scores highest, one list for all heads.

    The indexer of a layer (lightning indexer of DeepSeek-V3.2) makes a few queries, one key and weights of each token
    from what the layer's projections read; keys pass a LayerNorm, and the first channels of queries and keys are
    rotated by their positions. Scores are in float32; the rest is dropped. A gradient flows to q, k and v, none
    through the choice: the indexer is trained by a loss of its own. Ties go to the earlier token. `dsa_attention` is
    the same as a function, for models with an indexer of their own; DeepSeek-V3.2 and its kin in transformers, which
    bring theirs, are not patched with this.

    Deviations from DeepSeek-V3.2, whose attention is over latents: index queries come from the hidden states, not
    from the compressed queries; keys are read as the model has them. A part of a prompt whose earlier tokens come
    from a cache is dense: the cache holds no index keys.

    Formula:
        I(t, s) = sum over index heads h of w_h(t) * relu(q_h(t) . k(s) / sqrt(index dim))
        keep(t) = the top_k tokens s <= t with the highest I(t, s)

    When:
        Take it for a model that was trained with it and has its indexers. There is nothing that it could do for
        others.

    Args:
        gates: trained indexers: a folder, a Hub id or a GateSet.
        top_k: tokens that a query keeps, at least 1.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "DeepSeek-AI 2025, DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models (arXiv 2512.02556)"
    needs = frozenset({"causal"})
    reads = frozenset({"hidden"})

    gates: Gates = ""
    top_k: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", checked_gates(self.gates, "dsa"))
        check_int("top_k", self.top_k, 1)

    @classmethod
    def make_gates(cls, model: Fingerprint, settings: Mapping[str, Any]) -> Sequence[nn.Module]:
        """One Indexer for each layer; see Method.make_gates.

        Args:
            model: sizes of the model.
            settings: `heads` (16) and `dim` (128) of the indexer, `rope_dim` (64, even: the channels that are
                rotated), `rope_theta` (10000.0), and `width` of the hidden states, where it is not that of all
                heads together.
        """
        unknown_settings(cls.name, settings, ("heads", "dim", "rope_dim", "rope_theta", "width"))
        width = check_int("width", settings.get("width", model.heads * model.head_dim), 1)
        heads, dim = (
            check_int(name, settings.get(name, default), 1) for name, default in (("heads", 16), ("dim", 128))
        )
        rope_dim, theta = check_int("rope_dim", settings.get("rope_dim", 64), 0), settings.get("rope_theta", 10000.0)
        if rope_dim % 2 or rope_dim > dim:
            raise ValueError(f"`rope_dim` must be even and at most `dim` = {dim}, got {rope_dim}")
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 1:
            raise ValueError(f"`rope_theta` must be a number more than 1, got {theta!r}")
        return [Indexer(width, heads, dim, rope_dim, float(theta)) for _ in range(model.layers)]

    def check_model(self, model: Any) -> None:
        """Refuses missing indexers and those of another model; see Method.check_model."""
        find_gates(self.gates, self.name).check(model)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> tuple[Tensor, Tensor] | Decline:
        """Attention over the lists; see Method.attention."""
        indices = self._indices(ctx)
        return indices if isinstance(indices, Decline) else attend(q, k, v, indices, run)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The lists as single keys; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: dsa chooses by content, got None")
        indices = self._indices(ctx)
        return indices if isinstance(indices, Decline) else tokens_pattern(indices, ctx.layout.kv_len)

    def why_not(self, ctx: Context) -> str | None:
        """Also where earlier tokens come from a cache; see Method.why_not."""
        cached = "dsa reads the hidden states of all tokens, and those of the first are in a cache"
        return super().why_not(ctx) or (cached if ctx.layout.query_start else None)

    def _indices(self, ctx: Context) -> Tensor | Decline:
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        assert ctx.inputs is not None and ctx.inputs.hidden is not None
        hidden = ctx.inputs.hidden.detach()
        indexer = gate_of(self.gates, self.name, ctx.layer, hidden)
        assert isinstance(indexer, Indexer)
        if indexer.query.in_features != hidden.shape[2]:
            return Decline(f"the indexers are for {indexer.query.in_features} hidden states, got {hidden.shape[2]}")
        with torch.no_grad():
            query, key, weights = indexer(hidden)
            return dsa_select_tokens(query, key, weights, self.top_k)

    def least_density(self, ctx: Context) -> float:
        """What is kept, which the content does not change; see Method.least_density."""
        if not ctx.layout.is_causal:
            return 0.0
        seen = torch.arange(ctx.layout.query_start, ctx.layout.kv_len) + 1
        return float(seen.clamp(max=self.top_k).sum()) / float(seen.sum())

    def choosing_pairs(self, ctx: Context) -> float:
        """All visible pairs in all index heads, once for all heads of attention; see Method.choosing_pairs."""
        share = _SHARE
        if self.gates:
            indexer = find_gates(self.gates, self.name).layers[0]
            assert isinstance(indexer, Indexer)
            share = indexer.query.out_features / (ctx.num_heads * ctx.head_dim)
        return share / 2 * ctx.layout.q_len * ctx.layout.kv_len

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """None: it needs indexers that were trained for the model; see Method.candidates."""
        return []

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Untrained indexers for one layer of four heads of 16."""
        return [{"gates": _example(), "top_k": 40}, {"gates": _example(), "top_k": 1}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All tokens."""
        return {"gates": _example(), "top_k": 4096}


class Indexer(nn.Module):
    """The indexer of one layer.

    Args:
        width: of the hidden states.
        heads: index heads.
        dim: channels of index queries and keys.
        rope_dim: first channels that are rotated, halves against each other.
        theta: base of the rotation.
    """

    def __init__(self, width: int, heads: int, dim: int, rope_dim: int, theta: float) -> None:
        super().__init__()
        self.heads, self.rope_dim, self.theta = heads, rope_dim, theta
        self.query = nn.Linear(width, heads * dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weight = nn.Linear(width, heads, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `dsa_select_tokens` takes, from hidden states [batch, tokens, width] of a prompt from its start on."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.to(self.query.weight.dtype)
            query = self._rotated(self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2))
            key = self._rotated(self.key_norm(self.key(x)))
            return query, key, self.weight(x).transpose(1, 2) * self.heads**-0.5

    def _rotated(self, x: Tensor) -> Tensor:
        """Features [..., tokens, dim] with the first channels rotated by their position."""
        half, device = self.rope_dim // 2, x.device
        # Angles of a million tokens are too large for float32.
        speed = self.theta ** -(torch.arange(half, dtype=torch.float64, device=device) / max(1, half))
        angle = torch.arange(x.shape[-2], dtype=torch.float64, device=device)[:, None] * speed
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


def _example() -> GateSet:
    """Untrained indexers that read all heads of a token alike."""
    model = Fingerprint("example", "llama", 1, 4, 2, 16, "", "")
    found = GateSet("dsa", model, {"heads": 16, "dim": 12, "rope_dim": 8}, seed=1)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "norm" not in name:
                weight.copy_(weight[:, :16].repeat(1, 4))
    return found.requires_grad_(False)
