"""Fidelity of attention calls and of clips, against definitions written out."""

import math

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.evaluation.fidelity import Call, Reference, psnr, ssim


@pytest.mark.parametrize("causal", [True, False])
def test_recall_is_the_dense_mass_on_kept_keys(causal):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 111, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 111, 16, generator=generator).unbind(0)
    layout = hsa.TokenLayout.causal(111) if causal else hsa.TokenLayout.bidirectional(111)
    ctx = hsa.Context(layout, num_heads=4, num_kv_heads=2, head_dim=16)
    method = hsa.get_method("block_topk")(block_size=16, density=0.4)
    found = Reference([Call(q, k, v, ctx)]).compare(method)
    logits = q @ k.repeat_interleave(2, 1).mT / 4
    if causal:
        logits = logits.masked_fill(~torch.ones(111, 111).tril().bool(), -torch.inf)
    weights = logits.softmax(-1)
    kept = method.pattern(q, k, ctx).to_dense()
    assert found.recall == pytest.approx(float((weights * kept).sum(-1).mean()), rel=1e-5)
    values = v.repeat_interleave(2, 1)
    dense, sparse = weights @ values, logits.masked_fill(~kept, -torch.inf).softmax(-1) @ values
    assert found.output_error == pytest.approx(float((dense - sparse).norm() / dense.norm()), rel=1e-4)
    exact = Reference([Call(q, k, v, ctx)]).compare(hsa.get_method("block_topk")(block_size=16, density=1.0))
    assert exact.recall == pytest.approx(1, abs=1e-6) and exact.output_error < 1e-6


def test_psnr_is_the_mean_of_decibels_over_frames():
    clip = torch.zeros(2, 3, 20, 20)
    other = clip.clone()
    other[0] += 0.1
    other[1] += 0.01
    assert psnr(other, clip) == pytest.approx((20 + 40) / 2)
    assert psnr(clip, clip) == 100


def test_ssim_is_the_formula_in_every_window():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 17, 14, generator=generator).double().unbind(0)
    wide = [torch.nn.functional.pad(t, (5,) * 4) for t in (x, y)]
    values = []
    for row in range(17):
        for col in range(14):
            one, two = (t[row : row + 11, col : col + 11].flatten() for t in wide)
            covariance = ((one - one.mean()) * (two - two.mean())).mean()
            top = (2 * one.mean() * two.mean() + 1e-4) * (2 * covariance + 9e-4)
            below = (one.mean() ** 2 + two.mean() ** 2 + 1e-4) * (one.var(correction=0) + two.var(correction=0) + 9e-4)
            values.append(float(top / below))
    assert ssim(x[None], y[None]) == pytest.approx(sum(values) / len(values))
    assert ssim(x.expand(2, 3, 17, 14), y.expand(2, 3, 17, 14)) == pytest.approx(ssim(x[None], y[None]))
    assert ssim(x[None], x[None]) == pytest.approx(1)


def test_ssim_of_constant_pictures():
    x, y = torch.full((1, 3, 40, 40), 0.2), torch.full((1, 3, 40, 40), 0.6)
    inside = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    # The border differs by the zero padding.
    assert ssim(x, y) == pytest.approx(inside, abs=0.2)
    assert ssim(x, y) < 0.75 < ssim(x, x + 0.01)


def test_guards():
    with pytest.raises(ValueError, match=r"`clip` must be .* got shapes \[1, 3, 4, 4\] and \[1, 3, 4, 5\]"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="`clip`"):
        ssim(torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="`calls` must hold at least one"):
        Reference([]).compare(hsa.get_method("dense")())
    assert not math.isnan(psnr(torch.zeros(3, 4, 4), torch.ones(3, 4, 4)))
