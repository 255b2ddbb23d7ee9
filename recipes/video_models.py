"""What the families of video models differ in: which transformer is trained, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.adapter_task import AdapterRecipe
from hf_sparse_attn.training.video.data import PromptSettings, VideoSettings
from hf_sparse_attn.training.video.material import TIMES, PipelineMaterial, load_pipeline
from hf_sparse_attn.training.video.task import VideoRecipe

Expert = Literal["high", "low"]


class WanMaterial(PipelineMaterial):
    """A transformer of a Wan pipeline, for text or image to video.

    Image to video comes in two ways. Wan 2.1 and 2.2 (A14B) have channels for the latents of the first frame and for a
    mask, and 2.1 takes embeddings of it besides. TI2V-5B is given the first frame in place of its noise, and need not
    predict it.

    Args:
        run, pipe, videos: see PipelineMaterial.
        expert: which transformer of Wan 2.2 is trained, the one for much noise ("high") or for little ("low"), each at
            the noise levels it is responsible for; None where there is only one.
        image_to_video: whether the first frame is given; None goes by the class of the pipeline. A TI2V-5B loads as
            one for text, and learns images, too, by True.
        samples: see PipelineMaterial.

    Raises:
        ValueError: `expert` or `image_to_video` does not fit the pipeline; see also PipelineMaterial.
    """

    transformers = ("WanTransformer3DModel",)
    options = ("expert", "image_to_video")

    def __init__(
        self,
        run: Run,
        pipe: Any,
        videos: VideoSettings | PromptSettings,
        *,
        expert: Expert | None = None,
        image_to_video: bool | None = None,
        **samples: Any,
    ) -> None:
        boundary = pipe.config.get("boundary_ratio")
        if (expert is None) != (boundary is None):
            rule = "none for a model with one transformer" if boundary is None else '"high" or "low" for Wan 2.2'
            raise ValueError(f"`expert` must be {rule}, got {expert!r}")
        name = "transformer_2" if expert == "low" else "transformer"
        if boundary is not None:
            self.part = name
            self.bounds = (boundary, 1.0) if expert == "high" else (0.0, min(boundary, 1.0))
            if not 0 <= self.bounds[0] < self.bounds[1]:
                raise ValueError(f"`expert` must be one that the pipeline asks, got {expert!r} of boundary {boundary}")
        # TI2V-5B: a timestep for each token.
        self.by_token = bool(pipe.config.get("expand_timesteps"))
        of_images = "ImageToVideo" in type(pipe).__name__
        self.first_frame = of_images if image_to_video is None else image_to_video
        if self.first_frame != of_images and not self.by_token:
            raise ValueError(
                f"`image_to_video` must be none, or {str(of_images).lower()} for a {type(pipe).__name__}, "
                f"got {str(image_to_video).lower()}"
            )
        self.given_frames = 1 if self.first_frame and self.by_token else 0
        # The mask has one for each frame of a latent one.
        self.masks = int(pipe.vae_scale_factor_temporal)
        super().__init__(run, pipe, videos, name=name, first_frame=self.first_frame, **samples)

    def channels(self, latents: int, pipe: Any) -> int:
        return 2 * latents + self.masks if self.first_frame and not self.by_token else latents

    def inputs(self, noisy: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        hidden, time = noisy, level * TIMES
        if self.by_token:
            config: Any = self.model.config
            frames, height, width = (n // p for n, p in zip(noisy.shape[2:], config.patch_size, strict=True))
            time = time[:, None, None].repeat(1, frames, height * width)
            time[:, : self.given_frames] = 0
            time = time.flatten(1)
        if self.given_frames:
            hidden = torch.cat([conditions["image_latents"], noisy[:, :, self.given_frames :]], dim=2)
        elif self.first_frame:
            mask = noisy.new_zeros(len(noisy), self.masks, *noisy.shape[2:])
            mask[:, :, 0] = 1
            hidden = torch.cat([noisy, mask, conditions["image_latents"]], dim=1)
        given = {
            "hidden_states": hidden.to(self.dtype),
            "timestep": time,
            "encoder_hidden_states": conditions["prompt_embeds"].to(self.dtype),
        }
        if "image_embeds" in conditions:
            given["encoder_hidden_states_image"] = conditions["image_embeds"].to(self.dtype)
        return given


class HunyuanMaterial(PipelineMaterial):
    """The transformer of a HunyuanVideo pipeline.

    Args:
        run, pipe, videos: see PipelineMaterial.
        guidance: the scale that the model is told, where it has an embedding of it.
        samples: see PipelineMaterial.
    """

    transformers = ("HunyuanVideoTransformer3DModel",)
    options = ("guidance",)

    def __init__(
        self, run: Run, pipe: Any, videos: VideoSettings | PromptSettings, *, guidance: float = 1.0, **samples: Any
    ) -> None:
        super().__init__(run, pipe, videos, **samples)
        self.guidance = guidance

    def inputs(self, noisy: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        config: Any = self.model.config
        given = {
            "hidden_states": noisy.to(self.dtype),
            "timestep": level * TIMES,
            "encoder_hidden_states": conditions["prompt_embeds"].to(self.dtype),
            "encoder_attention_mask": conditions["prompt_attention_mask"].to(self.dtype),
            "pooled_projections": conditions["pooled_prompt_embeds"].to(self.dtype),
        }
        if config.guidance_embeds:
            given["guidance"] = level.new_full(level.shape, self.guidance * TIMES).to(self.dtype)
        return given


KINDS: tuple[type[PipelineMaterial], ...] = (WanMaterial, HunyuanMaterial)


def long_material(recipe: VideoRecipe, run: Run, kind: type[PipelineMaterial], **options: Any) -> PipelineMaterial:
    """A recipe's transformer, and its videos with the frames that are trained at; see open_material."""
    videos, drops = recipe.long_videos(), recipe.flow.drop > 0
    return open_material(recipe, run, videos, options, (kind,), held_out=recipe.held_out, drops=drops)


def open_material(
    recipe: AdapterRecipe,
    run: Run,
    videos: VideoSettings | PromptSettings,
    options: Mapping[str, Any],
    kinds: Sequence[type[PipelineMaterial]] = KINDS,
    **samples: Any,
) -> PipelineMaterial:
    """The transformer of a pipeline, and its samples.

    Args:
        recipe: tells the model, its dtype and the seed.
        run: where it runs.
        videos: what it learns from; see PipelineMaterial.
        options: what only some families take, by name; None for what is not asked for.
        kinds: families that are taken.
        samples: see PipelineMaterial.

    Raises:
        ValueError: a transformer of none of the families, or an option that its family does not take; see also
            PipelineMaterial.
    """
    pipe = load_pipeline(recipe.model, recipe.torch_dtype)
    name = type(pipe.transformer or pipe.transformer_2).__name__
    kind = next((kind for kind in kinds if name in kind.transformers), None)
    if kind is None:
        known = sorted(name for kind in kinds for name in kind.transformers)
        raise ValueError(f"`model` must be a pipeline with a {' or '.join(known)}, got {name}")
    asked = {option: value for option, value in options.items() if value is not None}
    for option, value in asked.items():
        if option not in kind.options:
            raise ValueError(f"`{option}` must be none for a {name}, got {value!r}")
    return kind(run, pipe, videos, **asked, seed=recipe.seed, **samples)
