"""FlexPrefill: the published selection, a plain rewriting of it for every layout, and planted heads of both kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_sparse_attn import Context, TokenLayout
from hf_sparse_attn.methods.flexprefill import FlexPrefill, js_distance
from hf_sparse_attn.selection import last_query_sums
from tests.support.golden import golden

GOLDEN = {key: torch.from_numpy(value) for key, value in golden("flexprefill").items()}
VERTICAL_SLASH, QUERY_AWARE = {"tau": 0.0}, {"tau": 1.0}


def context(layout: TokenLayout, heads: int = 4, kv_heads: int = 2, dim: int = 16, softcap: float = 0.0) -> Context:
    return Context(layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, softcap=softcap)


def inputs(layout: TokenLayout, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16):
    """Queries and keys with neighbours that are alike, so that blocks differ clearly."""
    q, k = (torch.randn(batch, h, layout.kv_len, dim).cumsum(2) for h in (heads, kv_heads))
    q, k = (x / x.norm(dim=-1, keepdim=True) * 5 for x in (q, k))
    return q[:, :, layout.query_start :], k


def block_map(method: FlexPrefill, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    return method.pattern(q, k, ctx).validate().block_map()


def means(x: Tensor, size: int) -> Tensor:
    return torch.stack([part.mean(0) for part in x.split(size)])


def distance(p: Tensor, q: Tensor) -> float:
    """By the definition: half the sum of both divergences from the middle, terms without a share left out."""
    middle = (p + q) / 2
    return max(0.0, float(sum((x[x > 0] * (x[x > 0] / middle[x > 0]).log()).sum() for x in (p, q)) / 2)) ** 0.5


def number(share: Tensor, method: FlexPrefill, blocks: int) -> int:
    """Blocks for as many columns, or diagonals, as hold gamma."""
    held, needed = 0.0, 0
    for x in sorted(share.tolist(), reverse=True):
        held += x
        if held > method.gamma:
            break
        needed += 1
    most = method.max_budget or blocks * method.block_size
    fewest = -(-method.min_budget // method.block_size)
    wanted = (needed + 1) // (method.unit or method.block_size) + 1
    return max(fewest, min(wanted, -(-most // method.block_size)))


def plain(method: FlexPrefill, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, bool]:
    """Kept blocks of one head, bool [rows, cols], and whether it is query-aware; one step of the paper at a time."""
    layout, size = ctx.layout, method.block_size
    q, k = q.double(), k.double()
    last, n = min(size, len(q)), len(k)
    position = torch.arange(n - last, n)[:, None]
    weights = (q[-last:] @ k.T * ctx.softmax_scale).masked_fill(torch.arange(n) > position, -torch.inf).softmax(-1)
    vertical = weights.mean(0)
    slash = torch.stack([weights[position - torch.arange(n) == o].sum() / last for o in range(n)])
    by_column, by_diagonal = (torch.stack([part.sum() for part in x.split(size)]) for x in (vertical, slash))
    keys, queries = means(k, size), means(q, size)
    guess = (q[-last:].mean(0) @ keys.T * ctx.softmax_scale).softmax(-1)
    aware = distance(guess, by_column) < method.tau
    cols, rows = len(keys), len(queries)
    fewest = -(-method.min_budget // size)
    counts = [fewest, fewest] if aware else [number(x, method, cols) for x in (vertical, slash)]
    chosen = [
        sorted(range(cols), key=lambda i, share=share: (i > 0, -float(share[i])))[:count]
        for share, count in zip((by_column, by_diagonal), counts, strict=True)
    ]
    kept = torch.zeros(rows, cols, dtype=torch.bool)
    first = layout.query_start + torch.arange(rows) * size
    final = (first + size).clamp(max=n) - 1
    for row in range(rows):
        kept[row, chosen[0]] = True
        for own in (int(first[row]) // size, int(final[row]) // size):
            kept[row, [own - o for o in chosen[1] if own >= o]] = True
    visible = torch.arange(cols) * size <= final[:, None]
    if aware:
        shares = (queries @ keys.T * ctx.softmax_scale).masked_fill(~visible, -torch.inf).softmax(-1).flatten()
        held = 0.0
        for i in shares.argsort(descending=True, stable=True).tolist():
            held += float(shares[i])
            if held > method.gamma * rows:
                break
            kept[i // cols, i % cols] = True
    return kept & visible, aware


def test_the_published_selection() -> None:
    q, k = (GOLDEN[x].transpose(1, 2) for x in "qk")
    ctx = context(TokenLayout.causal(512), dim=32)
    # The published code counts blocks by 128 columns whatever the block.
    method = FlexPrefill(gamma=0.9, tau=0.1, min_budget=64, block_size=64, unit=128)
    assert torch.equal(block_map(method, q, k, ctx)[0], GOLDEN["block_mask"])
    # By its own blocks of 64 more are needed for the share; none is lost.
    own = block_map(FlexPrefill(gamma=0.9, tau=0.1, min_budget=64, block_size=64), q, k, ctx)[0]
    assert bool(own[GOLDEN["block_mask"]].all()) and int(own.sum()) > int(GOLDEN["block_mask"].sum())


def test_the_distance_is_finite_where_the_published_one_is_not() -> None:
    q, k = (GOLDEN[x].transpose(1, 2) for x in "qk")
    ctx = context(TokenLayout.causal(512), dim=32)
    vertical, _ = last_query_sums(q, k, 64, ctx.softmax_scale)
    keys = k.unflatten(2, (-1, 64)).mean(3).repeat_interleave(2, 1)
    guess = (q[:, :, -64:].mean(2, keepdim=True) @ keys.mT * ctx.softmax_scale).softmax(-1)[:, :, 0]
    found = js_distance(guess, (vertical / 64).unflatten(-1, (-1, 64)).sum(-1))
    assert bool(GOLDEN["sqrt_js"].isnan()[0, 0])
    torch.testing.assert_close(found[:, 1:], GOLDEN["sqrt_js"][:, 1:], rtol=1e-4, atol=1e-5)
    assert float(found[0, 0]) == pytest.approx(0.0791, abs=1e-4)
    # Below tau, it is the one head that is query-aware.
    aware = FlexPrefill(tau=0.1, block_size=64).choose(q, k, ctx)[2]
    assert aware.tolist() == [[True, False, False, False]]


def test_distances_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    # Half of log(4/3) and half of the mean of log(2/3) and log(2).
    third = (0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)) ** 0.5
    torch.testing.assert_close(js_distance(p, q), torch.tensor([0.0, np.log(2) ** 0.5, third], dtype=torch.float32))


LAYOUTS = {
    "causal": TokenLayout.causal(256),
    "odd": TokenLayout.causal(333),
    "short": TokenLayout.causal(5),
    "chunk": TokenLayout.causal(333).continued(128),
    "odd_chunk": TokenLayout.causal(333).continued(77),
    "short_chunk": TokenLayout.causal(333).continued(320),
}
METHODS = {
    "vertical_slash": FlexPrefill(gamma=0.5, min_budget=16, block_size=16, **VERTICAL_SLASH),
    "query_aware": FlexPrefill(gamma=0.5, min_budget=16, block_size=16, **QUERY_AWARE),
    "both": FlexPrefill(gamma=0.6, tau=0.2, min_budget=40, block_size=32),
    "limited": FlexPrefill(gamma=0.7, min_budget=16, max_budget=48, block_size=16, unit=8, **VERTICAL_SLASH),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_paper_step_by_step(layout: str, method: str) -> None:
    ctx, (q, k) = context(LAYOUTS[layout]), inputs(LAYOUTS[layout])
    got, aware = block_map(METHODS[method], q, k, ctx), METHODS[method].choose(q, k, ctx)[2]
    for b, h in ((0, 0), (1, 3)):
        want, is_aware = plain(METHODS[method], q[b, h], k[b, h // 2], ctx)
        assert bool(aware[b, h]) == is_aware
        assert torch.equal(got[b, h], want)


def test_heads_of_both_kinds_in_one_pattern() -> None:
    ctx, (q, k) = context(LAYOUTS["odd"], 8, 2), inputs(LAYOUTS["odd"], heads=8)
    fixed = {"gamma": 0.6, "min_budget": 16, "block_size": 16}
    aware = FlexPrefill(tau=0.2, **fixed).choose(q, k, ctx)[2]
    assert bool(aware.any()) and not bool(aware.all())
    got, slashes, singles = (block_map(FlexPrefill(tau=tau, **fixed), q, k, ctx) for tau in (0.2, 0.0, 1.0))
    assert torch.equal(got, torch.where(aware[..., None, None], singles, slashes))
    assert not torch.equal(singles[aware], slashes[aware])


def test_a_planted_column_and_diagonal_are_kept() -> None:
    n, layout = 512, TokenLayout.causal(512)
    # Keys have directions of their own; query i looks for key i - 208, and all queries for the keys from 144 on.
    k = torch.nn.functional.normalize(torch.randn(1, 1, n, 64), dim=-1) * 8
    q = torch.roll(k, 208, 2)
    q[:, :, :, 0] += 30
    k[:, :, :, 0] = 0
    k[:, :, 144:150, 0] = 1.5
    method = FlexPrefill(gamma=0.3, min_budget=64, block_size=32, **VERTICAL_SLASH)
    columns, diagonals, _ = method.choose(q, k, context(layout, 1, 1, 64))
    assert columns[0, 0].nonzero()[:, 0].tolist() == [0, 144 // 32]
    assert diagonals[0, 0].nonzero()[:, 0].tolist() == [0, 208 // 32]
    kept = block_map(method, q, k, context(layout, 1, 1, 64))[0, 0]
    distance = torch.arange(16)[:, None] - torch.arange(16)
    want = (distance >= 0) & ((distance == 0) | (distance == 6) | (torch.arange(16) == 0) | (torch.arange(16) == 4))
    assert torch.equal(kept, want)


def test_planted_blocks_are_kept_by_query_aware_heads() -> None:
    n, size, layout = 512, 32, TokenLayout.causal(512)
    # Row r looks for block r // 2: neither a column nor a diagonal.
    mean = torch.eye(16, 64) * 10
    k = mean.repeat_interleave(size, 0)[None, None] + torch.randn(1, 1, n, 64) * 0.1
    q = mean[torch.arange(16) // 2].repeat_interleave(size, 0)[None, None] + torch.randn(1, 1, n, 64) * 0.1
    method = FlexPrefill(gamma=0.9, min_budget=size, block_size=size)
    kept = block_map(method, q, k, context(layout, 1, 1, 64))[0, 0]
    assert bool(method.choose(q, k, context(layout, 1, 1, 64))[2].all())
    row = torch.arange(16)
    found = kept[row, row // 2]
    # 0.9 of sixteen rows are fourteen whole ones; two may go without theirs.
    assert int(found.sum()) >= 14 and int(kept.sum()) <= 3 * 16


def test_one_share_for_all_rows_together() -> None:
    """Sharp rows take what they need; rows without a preference get what is left."""
    size, layout = 32, TokenLayout.causal(320)
    mean = torch.eye(10, 16) * 12
    k = mean.repeat_interleave(size, 0)[None, None]
    q = mean[torch.arange(10) // 2].repeat_interleave(size, 0)[None, None].clone()
    q[:, :, 5 * size : 9 * size] = 0
    method = FlexPrefill(gamma=0.6, min_budget=1, block_size=size, **QUERY_AWARE)
    kept = block_map(method, q, k, context(layout, 1, 1))[0, 0].int()
    # Six sharp rows hold 6 of the 10 shares (two of them not wholly, by rounding): nothing is left for flat rows
    # beyond the first block and their own.
    assert kept[5:9].sum(1).tolist() == [2, 2, 2, 2]
    assert kept[4].nonzero()[:, 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("start", [64, 160, 288])
def test_chunks_of_whole_blocks_end_as_the_whole(start: int) -> None:
    """The last queries are the same, and so are the columns and diagonals that they choose."""
    method = FlexPrefill(gamma=0.5, min_budget=16, block_size=32, **VERTICAL_SLASH)
    layout = TokenLayout.causal(333)
    q, k = inputs(layout)
    whole = method.pattern(q, k, context(layout)).to_dense()
    chunk = method.pattern(q[:, :, start:], k, context(layout.continued(start))).to_dense()
    assert torch.equal(whole[:, :, start:], chunk)


@pytest.mark.parametrize("method", ["vertical_slash", "query_aware", "both"])
def test_heads_and_rows_are_made_in_strips(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, (q, k) = context(LAYOUTS["odd"]), inputs(LAYOUTS["odd"])
    whole = block_map(METHODS[method], q, k, ctx)
    for most in (1, 500):
        monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", most)
        assert torch.equal(block_map(METHODS[method], q, k, ctx), whole)


@pytest.mark.parametrize("n, q_len, last", [(1, 1, 64), (5, 1, 3), (64, 64, 64), (63, 63, 128), (300, 77, 50)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("most", [1 << 25, 700, 1])
def test_sums_of_the_last_queries(
    n: int, q_len: int, last: int, softcap: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse_attn.selection._WEIGHTS_AT_A_TIME", most)
    q, k = torch.randn(2, 4, q_len, 8) * 2, torch.randn(2, 2, n, 8)
    columns, diagonals = last_query_sums(q, k, last, 0.3, softcap)
    last = min(last, q_len)
    logits = q[:, :, -last:].double() @ k.double().repeat_interleave(2, 1).mT * 0.3
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    ahead = torch.arange(n - last, n)[:, None] - torch.arange(n)
    weights = logits.masked_fill(ahead < 0, -torch.inf).softmax(-1)
    want = torch.stack([weights[..., ahead == o].sum(-1) for o in range(n)], -1)
    torch.testing.assert_close(columns.double(), weights.sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(diagonals.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_density_rises_with_gamma(tau: float) -> None:
    layout = TokenLayout.causal(777)
    ctx, (q, k), base = context(layout), inputs(layout), FlexPrefill(min_budget=16, block_size=16, tau=tau)
    assert base.knob is not None
    values = (base.knob.low, 0.2, 0.4, 0.6, 0.8, base.knob.high)
    found = [base.turned(x).pattern(q, k, ctx).density("causal") for x in values]
    assert found == sorted(found) and found[0] < 0.25 and found[-1] == 1.0


def test_budgets_bound_columns_and_diagonals() -> None:
    ctx, (q, k) = context(LAYOUTS["odd"]), inputs(LAYOUTS["odd"])
    for params, want in (({"min_budget": 70}, 5), ({"min_budget": 16, "max_budget": 33, "unit": 1}, 3)):
        method = FlexPrefill(gamma=1e-6 if "unit" not in params else 0.9, block_size=16, **VERTICAL_SLASH, **params)
        columns, diagonals, _ = method.choose(q, k, ctx)
        assert bool((columns.sum(-1) == want).all()) and bool((diagonals.sum(-1) == want).all())


def test_softcap_changes_the_estimate() -> None:
    ctx, (q, k) = context(LAYOUTS["odd"]), inputs(LAYOUTS["odd"])
    capped = context(LAYOUTS["odd"], softcap=1.0)
    for method in ("vertical_slash", "query_aware"):
        assert not torch.equal(block_map(METHODS[method], q, k, ctx), block_map(METHODS[method], q, k, capped))


@pytest.mark.parametrize("n", [20, 64, 333, 1000])
def test_least_density_is_what_is_forced(n: int) -> None:
    layout = TokenLayout.causal(n)
    q, k = torch.zeros(1, 4, n, 16), torch.zeros(1, 2, n, 16)
    method = FlexPrefill(gamma=1e-6, min_budget=1, block_size=32, unit=1 << 20)
    assert method.least_density(context(layout)) == pytest.approx(
        method.pattern(q, k, context(layout)).density("causal")
    )
    assert method.least_density(context(layout.continued(n // 2))) == 0.0


def test_defaults_are_dense_where_the_published_rule_is() -> None:
    """The published code attends densely up to 1024 tokens; here the smallest budget keeps as many blocks."""
    layout = TokenLayout.causal(1000)
    q, k = inputs(layout, 1)
    assert FlexPrefill().pattern(q, k, context(layout)).density("causal") == 1.0


def test_no_gradient_goes_through_the_estimate() -> None:
    layout = TokenLayout.causal(111)
    q, k = (x.requires_grad_() for x in inputs(layout))
    sums = last_query_sums(q, k, 16, 0.25)
    assert not sums[0].requires_grad and not sums[1].requires_grad
    assert METHODS["both"].pattern(q, k, context(layout)).starts.numel()


BAD = [
    ({"gamma": 0.0}, ValueError, "`gamma` must be more than 0 and at most 1, got 0.0"),
    ({"gamma": None}, TypeError, "`gamma` must be a number, got None"),
    ({"tau": -0.1}, ValueError, "`tau` must be at least 0, got -0.1"),
    ({"tau": float("nan")}, ValueError, "`tau` must be at least 0, got nan"),
    ({"tau": "0.1"}, TypeError, "`tau` must be a number, got '0.1'"),
    ({"min_budget": 0}, ValueError, "`min_budget` must be at least 1, got 0"),
    ({"max_budget": 512}, ValueError, "`max_budget` must be at least 1024, got 512"),
    ({"unit": 0}, ValueError, "`unit` must be at least 1, got 0"),
    ({"block_size": 8}, ValueError, "power of two from 16 to 256, got 8"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_parameters_are_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlexPrefill(**params)


def test_it_needs_tensors_and_a_causal_layout() -> None:
    with pytest.raises(TypeError, match="`q` and `k` must be tensors: flexprefill chooses by content"):
        FlexPrefill().pattern(None, None, context(TokenLayout.causal(64)))
    assert "needs a causal layout" in str(FlexPrefill().why_not(context(TokenLayout.bidirectional(64))))
