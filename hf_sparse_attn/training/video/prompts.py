"""Prompts alone to train on: encoded once by a pipeline's text encoders, and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.video.data import VideoSize, latent_shape, text_key
from hf_sparse_attn.training.video.latents import LatentData, LatentSample, LatentWriter
from hf_sparse_attn.training.video.vae import TEXT_ENCODERS, check_vae, encode_caption, parts_of, placed

_SHARD_BYTES = 64 << 20


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
        return PromptData(_encoded(settings, pipe, prompts, cache, run), shape)


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


def _encoded(settings: PromptSettings, pipe: Any, prompts: list[str], cache: Path, run: Run) -> LatentData:
    from tqdm import tqdm

    encoders = parts_of(pipe, TEXT_ENCODERS)
    key = {
        "tokens": settings.tokens,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        **text_key(pipe, encoders),
    }
    folder = cache / ("prompts-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20])
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
