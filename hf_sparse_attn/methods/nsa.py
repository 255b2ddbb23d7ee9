"""Native sparse attention: means of blocks, the best blocks and a window, weighed by trained gates."""

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
from hf_sparse_attn.trained.nsa import (
    blocks_pattern,
    check_sizes,
    compressed_branch,
    select_blocks,
    weighed,
    window_pattern,
)


@METHODS.register("nsa")
@dataclass(frozen=True, kw_only=True)
class Nsa(Method):
    """Each query reads the means of all blocks, the best blocks in full and a window; gates weigh the three.

    Compressed branch: keys and values are the means of blocks, of those that ended with the query or before it.
    Selected branch: the first block, the query's own and the one before it, and those with the highest weight in the
    compressed branch, averaged over the query heads of a group, which share the choice; their keys up to the query go
    into one softmax. Window: the last tokens. The output is the sum of the three, each times its gate, the sigmoid of
    a linear function of what the layer's projections read. A gradient flows through all branches, the means and the
    gates, none through the choice. Ties go to the earlier block. `nsa_attention` is the same as a function.

    Deviations from the paper, in which keys and values are compressed by a trained network over blocks of 32 with a
    stride of 16: by means of the selected blocks themselves, as in flash-linear-attention. Deviations from that code:
    of fewer than three blocks the own is kept first, then the one before it, where there the choice is arbitrary; any
    number of heads in a group; prompts in parts. The log-sum-exp is that of the selected branch. What runs dense in a
    patched model, short prompts (unless `min_tokens=0`) and the decoding of single tokens, is plain attention without
    branches and gates, which `report()` tells.

    Formula:
        o_cmp = attention over mean(K_c), mean(V_c) of blocks c that ended up to t, with the weights p_c
        o_slc = attention over {0, own - 1, own} and the best others by the mean p_c of the group, block_count in all
        o_swa = attention over t - window_size < j <= t;  o = g_cmp o_cmp + g_slc o_slc + g_swa o_swa

    When:
        Take it for a model that was trained with it and has its gates. There is nothing that it could do for others.

    Args:
        gates: trained gates: a folder, a Hub id or a GateSet.
        block_size: tokens in a block, at least 1.
        block_count: blocks that a query reads in full, at least 1.
        window_size: tokens of the window, the query itself among them; 0 leaves the branch and its gate out.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Yuan et al. 2025, Native Sparse Attention (arXiv 2502.11089)"
    needs = frozenset({"causal"})
    reads = frozenset({"hidden"})

    gates: Gates = ""
    block_size: int = 64
    block_count: int = 16
    window_size: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", checked_gates(self.gates, "nsa"))
        check_sizes(self.block_size, self.block_count, self.window_size)

    @classmethod
    def make_gates(cls, model: Fingerprint, settings: Mapping[str, Any]) -> Sequence[nn.Module]:
        """One NsaGate for each layer; see Method.make_gates.

        Args:
            model: sizes of the model.
            settings: `width` of the hidden states, where it is not that of all heads together.
        """
        unknown_settings(cls.name, settings, ("width",))
        width = check_int("width", settings.get("width", model.heads * model.head_dim), 1)
        return [NsaGate(width, model.heads) for _ in range(model.layers)]

    def check_model(self, model: Any) -> None:
        """Refuses missing gates and those of another model; see Method.check_model."""
        find_gates(self.gates, self.name).check(model)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> tuple[Tensor, Tensor] | Decline:
        """All branches; see Method.attention."""
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        assert ctx.inputs is not None and ctx.inputs.hidden is not None
        hidden = ctx.inputs.hidden
        gate = gate_of(self.gates, self.name, ctx.layer, hidden)
        assert isinstance(gate, NsaGate)
        if (gate.linear.in_features, gate.heads) != (hidden.shape[2], ctx.num_heads):
            return Decline(
                f"the gates of nsa are for {gate.linear.in_features} hidden states and {gate.heads} heads, the call "
                f"has {hidden.shape[2]} and {ctx.num_heads}"
            )
        chosen = select_blocks(q, k, self.block_size, self.block_count, ctx.softmax_scale, ctx.softcap)
        out, lse = run(q, k, v, blocks_pattern(chosen, self.block_size, ctx.layout, ctx.num_heads))
        compressed, _ = compressed_branch(q, k, v, self.block_size, ctx.softmax_scale, ctx.softcap)
        window = None if not self.window_size else run(q, k, v, window_pattern(self.window_size, ctx, q.device))[0]
        return weighed(gate(hidden), (compressed, out, window)), lse

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The selected branch; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: nsa chooses by content, got None")
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        chosen = select_blocks(q, k, self.block_size, self.block_count, ctx.softmax_scale, ctx.softcap)
        return blocks_pattern(chosen, self.block_size, ctx.layout, ctx.num_heads)

    def remark(self, ctx: Context) -> str | None:
        """What dense calls are, which are not what the model was trained with; see Method.remark."""
        return "nsa: calls that run dense, decoding among them, lack the branches and gates the model was trained with"

    def least_density(self, ctx: Context) -> float:
        """The selected branch, in which the content does not change how much is kept; see Method.least_density."""
        layout, size = ctx.layout, self.block_size
        if not layout.is_causal:
            return 0.0
        token = torch.arange(layout.query_start, layout.kv_len)
        others = (token // size).clamp(max=self.block_count - 1)
        return min(1.0, float((others * size + token % size + 1).sum()) / float((token + 1).sum()))

    def choosing_pairs(self, ctx: Context) -> float:
        """Every query with every mean, in both branches; see Method.choosing_pairs."""
        return 2 * ctx.layout.q_len * ctx.layout.kv_len / self.block_size

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """None: it needs gates that were trained for the model; see Method.candidates."""
        return []

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """The blocks that every query reads, with gates that pass the selected branch alone."""
        return [
            {"gates": _example(), "block_size": 32, "block_count": 3, "window_size": 0},
            {"gates": _example(), "block_size": 24, "block_count": 2, "window_size": 0},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All blocks."""
        return {"gates": _example(), "block_size": 32, "block_count": 4096, "window_size": 0}


class NsaGate(nn.Module):
    """The gates of one layer: three weights in (0, 1) for each token and query head.

    Args:
        width: of the hidden states.
        heads: query heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # In its rows the heads of the compressed branch, then of the selected one, then of the window.
        self.linear = nn.Linear(width, 3 * heads)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates of the three branches, each [batch, heads, tokens], from hidden states [batch, tokens, width]."""
        found = self.linear(hidden.to(self.linear.weight.dtype)).sigmoid().transpose(1, 2)
        compressed, selected, window = found.unflatten(1, (3, self.heads)).unbind(1)
        return compressed, selected, window


def _example() -> GateSet:
    """Gates for one layer of four heads of 16 that pass the selected branch alone."""
    found = GateSet("nsa", Fingerprint("example", "llama", 1, 4, 2, 16, "", ""))
    with torch.no_grad():
        for gate in found.layers:
            assert isinstance(gate, NsaGate)
            gate.linear.weight.zero_()
            # Far enough out that a sigmoid is 0 or 1 to the bit.
            gate.linear.bias.view(3, -1).copy_(torch.tensor([[-200.0], [200.0], [-200.0]]).expand(3, 4))
    return found.requires_grad_(False)
