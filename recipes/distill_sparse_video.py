"""Video models for recipe distill_sparse: velocities that are matched, and clips that are sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_sparse_attn.evaluation.fidelity import psnr, ssim
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.video_models import open_material
from hf_sparse_attn.training.flow_matching import flow_error
from hf_sparse_attn.training.matching import AttentionMatch, layer_figures
from hf_sparse_attn.training.video.material import (
    HELD_OUT,
    Material,
    VideoBatch,
    announced,
    check_drop,
    draw_batch,
    sparse_span,
)
from hf_sparse_attn.training.video.scenes import SceneMaterial

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.distill_sparse import DistillSparse, Mode


class VideoStudent:
    """A video model that learns the velocities of its dense self; see distill_sparse.Student.

    Args:
        recipe: the settings.
        run: where it runs.
    """

    def __init__(self, recipe: DistillSparse, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.material: Material
        if recipe.scenes is not None:
            self.material = SceneMaterial(run, recipe.scenes, recipe.model, recipe.torch_dtype)
        elif recipe.videos is not None:
            options, drops = {"expert": recipe.expert, "guidance": recipe.guidance}, recipe.flow.drop > 0
            held_out = recipe.evaluation_samples
            self.material = open_material(recipe, run, recipe.videos, options, held_out=held_out, drops=drops)
        check_drop(recipe.flow, self.material)
        self.model: nn.Module = self.material.model
        self.patch: Patch | None = None

    def attach(self, patch: Patch) -> None:
        """Takes the patch of the model; see distill_sparse.Student."""
        sparse_span(patch)
        self.patch = patch

    def bundle_parts(self) -> dict[str, str]:
        return {"part": self.material.part}

    def batch(self, numbers: Sequence[int]) -> VideoBatch:
        """Samples with noise, at the levels of those steps of a sampler in which attention is sparse."""
        flow = self.recipe.flow
        shift = self.material.shift if flow.shift is None else flow.shift
        start, end = sparse_span(self.patch)
        # How much noise is left at a share of the steps, in a schedule that is shifted as the noise is.
        high, low = (shift * left / (1 + (shift - 1) * left) for left in (1 - start, 1 - end))
        return draw_batch(self.material, numbers, flow, self.recipe.seed, self.run.device, (low, high))

    def weights(self, batch: VideoBatch) -> Tensor:
        return torch.ones(len(batch.velocity), device=batch.velocity.device)

    def forward(self, batch: VideoBatch) -> Tensor:
        with announced(self.model, self.patch):
            return batch.predicted(self.model(**batch.given, return_dict=False)[0])

    def output_loss(self, batch: VideoBatch, mine: Tensor, taught: Tensor, teacher: Mode) -> Tensor:
        return flow_error(mine, taught).sum()

    def evaluate(self, teacher: Mode, dense: Mode, match: AttentionMatch) -> dict[str, float]:
        """Means over held-out samples.

        `loss`: squared error of the velocity of the sparse student; `loss_dense` of the teacher, `loss_run_dense` of
        the student run dense. `output_error`: squared error between student and teacher. `attention_error`: root of
        the relative squared error, by layer and mean. Where clips are sampled: `psnr` (dB) and `ssim` against the
        teacher's of the same seeds, and figures of both, the teacher's ending in `_dense`.
        """
        sums: dict[str, float] = defaultdict(float)
        errors: list[tuple[int, Tensor]] = []
        samples = self.recipe.evaluation_samples
        for number in range(samples):
            batch = self.batch([HELD_OUT + number])
            with teacher():
                taught = self.forward(batch)
            with match.collecting() as found:
                mine = self.forward(batch)
            errors += found
            with dense():
                run_dense = self.forward(batch)
            sums["loss"] += float(flow_error(mine, batch.velocity).sum()) / samples
            sums["loss_dense"] += float(flow_error(taught, batch.velocity).sum()) / samples
            sums["loss_run_dense"] += float(flow_error(run_dense, batch.velocity).sum()) / samples
            sums["output_error"] += float(flow_error(mine, taught).sum()) / samples
        return {**sums, **layer_figures(errors), **self._clip_figures(teacher)}

    def _clip_figures(self, teacher: Mode) -> dict[str, float]:
        with teacher():
            told = self.material.sampled()
        clips = self.material.sampled()
        if told is None or clips is None:
            return {}
        theirs = {f"{name}_dense": value for name, value in self.material.clip_figures(told).items()}
        return {"psnr": psnr(clips, told), "ssim": ssim(clips, told), **self.material.clip_figures(clips), **theirs}
