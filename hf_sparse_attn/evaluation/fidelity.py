"""How near a sparse result is to the dense one: of attention calls, and of video clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.api import attention
from hf_sparse_attn.dispatch import dense_attention
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.observe import Call

# Constants and window of SSIM for pixels in [0, 1].
_C1, _C2, _WINDOW = 0.01**2, 0.03**2, 11


class CallFidelity(NamedTuple):
    """What a method keeps of dense attention.

    Args:
        recall: share of the dense attention mass on kept keys, mean over rows and heads.
        output_error: norm of the difference of the outputs over the norm of the dense one.
    """

    recall: float
    output_error: float


class Reference:
    """The dense output and log-sum-exp of some calls, computed once for all methods.

    Args:
        calls: what to compare on.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self._dense = [dense_attention(*call) for call in self.calls]

    def compare(self, method: Method) -> CallFidelity:
        """Fidelity of a method, mean over the calls.

        Raises:
            ValueError: there is no call.
            MethodDoesNotApply: the method declines a call.
        """
        if not self.calls:
            raise ValueError("`calls` must hold at least one attention call, got none")
        recalls, errors = [], []
        for (q, k, v, ctx), (dense, dense_lse) in zip(self.calls, self._dense, strict=True):
            out, lse = attention(q, k, v, method, ctx, return_lse=True)
            # What sparse attention sums over is part of what dense attention sums over.
            recalls.append(float((lse - dense_lse).exp().clamp(max=1).mean()))
            errors.append(float((out - dense).norm() / dense.norm()))
        return CallFidelity(sum(recalls) / len(recalls), sum(errors) / len(errors))


def psnr(clip: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: of each frame over its pixels and channels, then the mean over frames.

    The mean of decibels, as published for sparse video attention; equal frames count as 100 dB.

    Args:
        clip, reference: [..., channels, height, width] in [0, 1].

    Raises:
        ValueError: the shapes differ or are no pictures.
    """
    _check_clips(clip, reference)
    error = (clip.double() - reference.double()).square().mean((-3, -2, -1))
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


def ssim(clip: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean over pixels, channels and frames.

    With a uniform window of 11 x 11, zero padding and biased variances, as published for sparse video attention; a
    Gaussian window gives other third decimals.

    Args:
        clip, reference: [..., channels, height, width] in [0, 1].

    Raises:
        ValueError: the shapes differ or are no pictures.
    """
    _check_clips(clip, reference)
    x, y = (t.double().flatten(0, -4) if t.ndim > 4 else t.double() for t in (clip, reference))

    def mean(t: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(t, _WINDOW, stride=1, padding=_WINDOW // 2)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    found = (2 * mx * my + _C1) * (2 * both + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return float(found.mean())


def _check_clips(clip: Tensor, reference: Tensor) -> None:
    if clip.shape != reference.shape or clip.ndim < 3:
        raise ValueError(
            "`clip` must be [..., channels, height, width] like `reference`, "
            f"got shapes {list(clip.shape)} and {list(reference.shape)}"
        )
