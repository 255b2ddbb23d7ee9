"""Videos, and prompts alone, to train on: encoded once by a pipeline's VAE and text encoders, and kept as latents."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.text.data import tokenizer_identity
from hf_sparse_attn.training.video.latents import INDEX, LatentData, LatentSample, LatentWriter
from hf_sparse_attn.training.video.source import Clip, ShortClipError, find_clips, read_clip
from hf_sparse_attn.training.video.vae import (
    TEXT_ENCODERS,
    check_vae,
    encode_caption,
    encode_first_frame,
    encode_video,
    fingerprint,
    parts_of,
    placed,
)

_LOG = logging.getLogger(__name__)
# What a kill may cost: about five videos of 81 frames in 480p.
_SHARD_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """How large a video is, and how long the text that it goes with.

    Args:
        frames, height, width: of the video, in pixels.
        tokens: longest text; None takes what the pipeline takes when it generates.
    """

    frames: int
    height: int
    width: int
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            check_int(name, getattr(self, name), 1)
        if self.tokens is not None:
            check_int("tokens", self.tokens, 1)


@dataclass(frozen=True, kw_only=True)
class VideoSettings(VideoSize):
    """Where videos come from, and what is taken of each: it is scaled to cover the size and cut around its centre.

    Args:
        source: a folder of video files or of folders of frames, with captions (see training/video/source.py); or a
            folder of latents, as training/video/latents.py leaves it.
        fps: frames a second to take from a video; None takes every frame. Either way the first ones are taken.
        skip_short: whether a video with too few frames is left out, with a warning, or refused.
    """

    source: str
    fps: float | None = None
    skip_short: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise ValueError("`source` must not be empty")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"`fps` must be more than 0, or none, got {self.fps}")


@dataclass(frozen=True, kw_only=True)
class ClipSettings(VideoSize):
    """The videos that a model is to make of prompts; see VideoSize.

    Args:
        negative: what guidance points away from.
    """

    negative: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptSettings(ClipSettings):
    """Prompts, and the videos that a model is to make of them.

    Args:
        source: a text file with a prompt a line; empty lines are passed over.
    """

    source: str


class PromptData:
    """Encoded prompts as samples. Their latents have a shape and nothing in them: they take no memory.

    Args:
        data: the prompts' conditions, as `open_prompts` keeps them.
        shape: of the latents, [channels, frames, height, width].
    """

    def __init__(self, data: LatentData, shape: tuple[int, int, int, int]) -> None:
        self.data, self.shape = data, shape

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> LatentSample:
        return LatentSample(torch.zeros(()).expand(self.shape), self.data[index].conditions)


def open_videos(
    settings: VideoSettings,
    pipe: Any,
    *,
    cache: Path,
    run: Run | None = None,
    first_frame: bool = False,
    shard_bytes: int = _SHARD_BYTES,
) -> LatentData:
    """Opens videos as latents; those that have not been encoded before are encoded now, with a progress bar.

    A latent is the mode of what the VAE gives, normalised as for the transformer; a sample's conditions are what the
    pipeline's `encode_prompt` gives for the caption. All is kept in `cache` under the settings, the files, the VAE and
    the text encoders. A process that is killed loses the last shard; the next one goes on behind it.

    Args:
        settings: where from, and how much.
        pipe: a text-to-video pipeline of diffusers. VAE and text encoders are on the run's device meanwhile. Latents
            need neither.
        cache: folder for latents, made if missing.
        run: where the training runs; the first process encodes and the others wait.
        first_frame: whether a sample's conditions are also those of its first frame; see
            `video_vae.encode_first_frame`.
        shard_bytes: about how large a file of the cache is.

    Raises:
        ValueError: a size that the VAE cannot take, a video that cannot be read or has no caption, or latents of
            another size.
        FileNotFoundError: no such folder, or nothing in it.
        TypeError: a VAE of an unknown class.
        MissingExtra: nothing that reads the videos is installed.
    """
    source = Path(settings.source).expanduser()
    ready = (source / INDEX).is_file()
    if not ready or getattr(pipe, "vae", None) is not None:
        check_vae(getattr(pipe, "vae", None))
    shape = latent_shape(settings, pipe)
    if ready:
        data = LatentData(source)
        _check_latents(data, shape, settings)
        if first_frame and "image_latents" not in data[0].conditions:
            raise ValueError(
                f"`source` must hold `image_latents` of the first frames for image to video, got "
                f"{', '.join(data[0].conditions) or 'no conditions'} in {settings.source}"
            )
        return data
    if run is None:
        return _encoded(settings, pipe, source, Path(cache), None, first_frame, shard_bytes)
    with run.main_first():
        return _encoded(settings, pipe, source, Path(cache), run, first_frame, shard_bytes)


def open_prompts(settings: PromptSettings, pipe: Any, *, cache: Path, run: Run) -> PromptData:
    """Opens prompts; those that have not been encoded before are encoded now, with a progress bar.

    All is kept in `cache` under the prompts and the text encoders. A process that is killed loses the last shard.

    Args:
        settings: which prompts, and the size of a video.
        pipe: a text-to-video pipeline of diffusers. Its text encoders are on the run's device meanwhile.
        cache: folder, made if missing.
        run: where the training runs; the first process encodes and the others wait.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no text or holds no prompt, or the VAE cannot take the size.
        TypeError: a VAE of an unknown class.
    """
    check_vae(getattr(pipe, "vae", None))
    vae: Any = pipe.vae.config
    channels = int(vae.get("z_dim") or vae.latent_channels)
    shape = (channels, *latent_shape(settings, pipe))
    prompts = read_prompts(Path(settings.source).expanduser())
    with run.main_first():
        return PromptData(_encoded_prompts(settings, pipe, prompts, cache, run), shape)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not text in UTF-8, or holds nothing else than empty lines.
    """
    if not file.is_file():
        raise FileNotFoundError(f"`prompts` must be a text file with a prompt a line, got {file}, which is not there")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompts` must be a text file in UTF-8, got {file}: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"`prompts` must hold at least one prompt, got none in {file}")
    return found


def latent_shape(settings: VideoSize, pipe: Any) -> tuple[int, int, int]:
    """Frames, height and width of the latents of a sample.

    Raises:
        ValueError: the VAE, or the transformer's patches, cannot take that size; the nearest that they can are named.
    """
    temporal, spatial = int(pipe.vae_scale_factor_temporal), int(pipe.vae_scale_factor_spatial)
    if (settings.frames - 1) % temporal:
        low = (settings.frames - 1) // temporal * temporal + 1
        raise ValueError(
            f"`frames` must be {temporal}n + 1 for this VAE, such as {low} or {low + temporal}, got {settings.frames}"
        )
    unit = spatial * _patch(pipe)
    for name in ("height", "width"):
        size = getattr(settings, name)
        if size % unit:
            nearest = " or ".join(str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n)
            raise ValueError(f"`{name}` must be a multiple of {unit} for this model, such as {nearest}, got {size}")
    return (settings.frames - 1) // temporal + 1, settings.height // spatial, settings.width // spatial


def _patch(pipe: Any) -> int:
    """Latent pixels along an edge of one token of the transformer."""
    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    config = next((part.config for part in parts if part is not None), None)
    size = getattr(config, "patch_size", 1)
    return int(size) if isinstance(size, int) else int(size[-1])


def _check_latents(data: LatentData, shape: tuple[int, int, int], settings: VideoSettings) -> None:
    for index, sample in enumerate(data.samples):
        found = tuple(sample["latents"][1:])
        if found != shape:
            raise ValueError(
                f"`source` must hold latents of {shape} for {settings.frames} frames of {settings.height} x "
                f"{settings.width}, got {found} for sample {index} in {settings.source}"
            )


def _text_key(pipe: Any, encoders: Sequence[Any]) -> dict[str, Any]:
    """What tells one pipeline's encoding of texts from another's: its encoders and tokenizers."""
    return {
        "text": [fingerprint(encoder) for encoder in encoders],
        "tokenizers": [tokenizer_identity(getattr(pipe, n, None)) for n in ("tokenizer", "tokenizer_2")],
    }


def _encoded(
    settings: VideoSettings,
    pipe: Any,
    source: Path,
    cache: Path,
    run: Run | None,
    first_frame: bool,
    shard_bytes: int,
) -> LatentData:
    clips = find_clips(source)
    encoders = parts_of(pipe, (*TEXT_ENCODERS, *(["image_encoder"] if first_frame else [])))
    asked = {name: value for name, value in asdict(settings).items() if name != "source"}
    key = {
        "settings": asked,
        "clips": [clip.identity() for clip in clips],
        "vae": fingerprint(pipe.vae),
        **_text_key(pipe, encoders),
    }
    if first_frame:
        key["first_frame"] = "alone" if pipe.config.get("expand_timesteps") else "padded"
    folder = _folder(cache, "videos", key)
    # The list of all clips is long, and in the name already.
    writer = LatentWriter(folder, {**key, "clips": len(clips)}, shard_bytes)
    if not writer.complete:
        device = pipe.vae.device if run is None else run.device
        with placed([pipe.vae, *encoders], device):
            shown = run is None or (run.progress and run.is_main)
            _encode(settings, pipe, clips, writer, device, first_frame, shown)
    return LatentData(folder)


def _encode(
    settings: VideoSettings,
    pipe: Any,
    clips: list[Clip],
    writer: LatentWriter,
    device: Any,
    first_frame: bool,
    progress: bool,
) -> None:
    kept = set(writer.names)
    wanted = [clip for clip in clips if clip.name not in kept]
    hidden = None if progress else True
    for clip in tqdm(wanted, "encode videos", len(clips), initial=len(kept), unit="video", disable=hidden):
        try:
            video = read_clip(clip, settings.frames, settings.height, settings.width, settings.fps)
        except ShortClipError:
            if not settings.skip_short:
                raise
            _LOG.warning("%s has too few frames and is left out", clip.name)
            continue
        conditions = encode_caption(pipe, clip.caption, device, settings.tokens)
        if first_frame:
            conditions |= encode_first_frame(pipe, video, device)
        writer.add(LatentSample(encode_video(pipe.vae, video), conditions), clip.name)
    if not len(writer):
        raise ValueError(f"`frames` must be at most what some video has, got {settings.frames}, which none has")
    writer.close()


def _encoded_prompts(settings: PromptSettings, pipe: Any, prompts: list[str], cache: Path, run: Run) -> LatentData:
    encoders = parts_of(pipe, TEXT_ENCODERS)
    key = {
        "tokens": settings.tokens,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        **_text_key(pipe, encoders),
    }
    folder = _folder(cache, "prompts", key)
    writer = LatentWriter(folder, key, _SHARD_BYTES)
    if not writer.complete:
        # The files of latents want some.
        none = torch.zeros(1, 1, 1, 1)
        with placed(encoders, run.device):
            rest = prompts[len(writer) :]
            hidden = not (run.progress and run.is_main)
            for prompt in tqdm(
                rest, "encode prompts", len(prompts), initial=len(writer), unit="prompt", disable=hidden
            ):
                conditions = encode_caption(pipe, prompt, run.device, settings.tokens)
                writer.add(LatentSample(none, conditions), prompt)
        writer.close()
    return LatentData(folder)


def _folder(cache: Path, kind: str, key: dict[str, Any]) -> Path:
    return cache / f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]}"
