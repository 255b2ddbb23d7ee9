"""Latents must be those the pipelines work with, frames those that were asked for, and nothing is encoded twice."""

from __future__ import annotations

import inspect
import json
import logging
import os
import struct
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.video import data as train_videos
from hf_sparse_attn.training.video import source as video_source
from hf_sparse_attn.training.video.data import VideoSettings, latent_shape, open_videos
from hf_sparse_attn.training.video.latents import LatentData, LatentSample
from hf_sparse_attn.training.video.source import Clip, ShortClipError, find_clips, read_clip
from hf_sparse_attn.training.video.vae import (
    denormalised,
    encode_caption,
    encode_first_frame,
    encode_video,
    fingerprint,
    normalised,
    placed,
)
from tests.support import tiny_hunyuan, tiny_prompts, tiny_wan
from tests.support.latents import write_latents
from tests.support.processes import exit_code

FRAMES, HEIGHT, WIDTH = 5, 32, 48
CAPTIONS = {"a": "a cat walks", "b": "", "deep/c": "the grass, seen from above"}


def _pixels(seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def _write_frames(folder: Path, pixels: NDArray[np.uint8]) -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"{number:03}.png")
    return folder


def _videos(folder: Path) -> Path:
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        made = _write_frames(folder / name, _pixels(seed))
        (made.parent / f"{made.name}.txt").write_text(caption + "\n")
    return folder


def _settings(folder: Path, **rest: Any) -> VideoSettings:
    return replace(VideoSettings(source=str(folder), frames=FRAMES, height=HEIGHT, width=WIDTH), **rest)


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return 2.0 * (torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255.0) - 1.0


@pytest.fixture
def ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest diffusers needs it to read any prompt; without changes to make it is the identity."""
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v, pipeline_wan_video2video

    for file in (pipeline_wan, pipeline_wan_i2v, pipeline_wan_video2video):
        if not hasattr(file, "ftfy"):
            monkeypatch.setattr(file, "ftfy", types.SimpleNamespace(fix_text=lambda text: text), raising=False)


@pytest.fixture(scope="module")
def wan() -> Any:
    return tiny_prompts.wan()


@pytest.fixture(scope="module")
def hunyuan() -> Any:
    return tiny_prompts.hunyuan()


def _clip(path: Path, fps: float | None = None) -> Clip:
    return Clip(path.name, path, "", fps)


# ---------------------------------------------------------------------- latents and conditions


@pytest.mark.usefixtures("ftfy")
def test_wan_latents_are_those_of_the_video_to_video_pipeline(tmp_path: Path) -> None:
    pipe = tiny_prompts.wan("v2v")
    data = open_videos(_settings(_videos(tmp_path / "videos"), tokens=8), pipe, cache=tmp_path / "cache")
    # Without noise, what its latents start from.
    pipe.scheduler.scale_noise = lambda sample, timestep, noise: sample
    assert len(data) == 3 and [data.name(i) for i in range(3)] == ["a", "b", "deep/c"]
    for number in range(3):
        frames = [Image.fromarray(frame) for frame in _pixels(number)]
        video = pipe.video_processor.preprocess_video(frames, height=HEIGHT, width=WIDTH)
        given = {"height": HEIGHT, "width": WIDTH, "dtype": torch.float32, "device": torch.device("cpu")}
        with torch.no_grad():
            expected = pipe.prepare_latents(video, **given, timestep=torch.tensor([500.0]))
        assert data[number].latents.shape == (16, 2, 4, 6)
        assert torch.equal(data[number].latents, expected[0])


def test_hunyuan_latents_are_those_of_the_image_to_video_pipeline(hunyuan: Any) -> None:
    import diffusers

    pipe = tiny_hunyuan.pipeline("token_replace")
    assert isinstance(pipe, diffusers.HunyuanVideoImageToVideoPipeline)
    video = _tensor(_pixels(3, frames=1))
    with torch.no_grad():
        _, expected = pipe.prepare_latents(video[None, :, 0], 1, 4, HEIGHT, WIDTH, 1, torch.float32)
    assert torch.equal(encode_video(pipe.vae, video), expected[0])
    assert pipe.vae.config.scaling_factor != 1


@pytest.mark.parametrize("kind", ["i2v", "i2v_clip", "ti2v_image"])
def test_first_frames_are_those_of_the_image_to_video_pipeline(kind: str) -> None:
    pipe = tiny_wan.pipeline(kind)
    pixels = _pixels(6)
    found = encode_first_frame(pipe, _tensor(pixels), torch.device("cpu"))
    image = pipe.video_processor.preprocess(Image.fromarray(pixels[0]), height=HEIGHT, width=WIDTH)
    with torch.no_grad():
        made = pipe.prepare_latents(image, 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu"))[1]
    # The pipeline puts a mask of four channels before them, but where they take the place of noise.
    expected = made if kind == "ti2v_image" else made[:, 4:]
    assert torch.equal(found.pop("image_latents"), expected[0])
    assert expected.shape[2] == (1 if kind == "ti2v_image" else 2)
    if kind == "i2v_clip":
        embeds = pipe.encode_image(Image.fromarray(pixels[0]), torch.device("cpu"))
        assert torch.equal(found.pop("image_embeds"), embeds[0])
    assert not found


def test_an_image_encoder_that_is_missing_is_told() -> None:
    pipe = tiny_wan.pipeline("i2v_clip")
    pipe.image_encoder = None
    with pytest.raises(ValueError, match="`pipe` must have an image encoder"):
        encode_first_frame(pipe, _tensor(_pixels(6)), torch.device("cpu"))


@pytest.mark.usefixtures("ftfy")
def test_first_frames_are_kept_apart_from_videos_without(tmp_path: Path) -> None:
    pipe = tiny_prompts.wan("i2v")
    settings = _settings(_videos(tmp_path / "videos"), tokens=8)
    without, with_ = (
        open_videos(settings, pipe, cache=tmp_path / "cache", first_frame=first) for first in (False, True)
    )
    assert set(without[0].conditions) == {"prompt_embeds"}
    assert set(with_[0].conditions) == {"prompt_embeds", "image_latents"}
    assert with_[0].conditions["image_latents"].shape == with_[0].latents.shape
    assert not torch.equal(with_[0].conditions["image_latents"], with_[1].conditions["image_latents"])
    ready = replace(settings, source=str(with_.folder))
    assert len(open_videos(ready, pipe, cache=tmp_path / "none", first_frame=True)) == 3
    with pytest.raises(ValueError, match=r"`source` must hold `image_latents` of the first frames.*got prompt_embeds"):
        open_videos(replace(settings, source=str(without.folder)), pipe, cache=tmp_path / "none", first_frame=True)


@pytest.mark.parametrize("kind", ["wan", "hunyuan", "hunyuan 1.5"])
def test_latents_decode_to_what_the_vae_makes_of_the_video(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = tiny_hunyuan.pipeline("1.5") if kind == "hunyuan 1.5" else request.getfixturevalue(kind)
    video = _tensor(_pixels(4))
    with torch.no_grad():
        z = pipe.vae.encode(video[None]).latent_dist.mode()
        own = pipe.vae.decode(z).sample
        latents = encode_video(pipe.vae, video)
        again = pipe.vae.decode(denormalised(pipe.vae, latents[None])).sample
    assert torch.equal(latents, normalised(pipe.vae, z)[0]) and not torch.equal(latents, z[0])
    assert torch.allclose(denormalised(pipe.vae, latents), z[0], rtol=1e-6, atol=1e-6)
    # Far below the VAE's own error, for the two latents differ by rounding alone.
    assert (again - own).abs().max() < 1e-3 * (own - video[None, :, : own.shape[2]]).abs().max()


@pytest.mark.usefixtures("ftfy")
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_conditions_generate_what_the_caption_generates(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(kind)
    data = open_videos(_settings(_videos(tmp_path / "videos")), pipe, cache=tmp_path / "cache")
    conditions = data[0].conditions
    names = {"wan": {"prompt_embeds"}, "hunyuan": {"prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"}}
    assert set(conditions) == names[kind]
    # The longest prompt of the pipeline's call, which is another for Wan than that of its encode_prompt.
    longest = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    assert conditions["prompt_embeds"].shape[0] == longest
    call = {"height": HEIGHT, "width": WIDTH, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    if kind == "wan":
        # Guidance would need a negative prompt.
        call["guidance_scale"] = 1.0

    def generate(**prompt: Any) -> torch.Tensor:
        return pipe(**call, **prompt, generator=torch.Generator().manual_seed(0)).frames

    expected = generate(prompt=CAPTIONS["a"])
    assert torch.equal(generate(**{name: value[None] for name, value in conditions.items()}), expected)
    assert not torch.equal(data[1].conditions["prompt_embeds"], conditions["prompt_embeds"])


def test_longest_caption_is_a_setting(tmp_path: Path) -> None:
    data = open_videos(_settings(_videos(tmp_path / "videos"), tokens=17), FakePipe(), cache=tmp_path / "cache")
    assert {sample.conditions["prompt_embeds"].shape for sample in data} == {(17, 3)}


def test_hunyuan_15_has_two_texts_and_two_masks() -> None:
    pipe = tiny_hunyuan.pipeline("1.5")
    made = [torch.randn(1, 7, 16), torch.ones(1, 7), torch.randn(1, 5, 6), torch.ones(1, 5)]
    pipe.tokenizer = pipe.text_encoder = object()
    pipe.encode_prompt = lambda prompt, device=None: made
    found = encode_caption(pipe, "a", torch.device("cpu"))
    accepted = inspect.signature(type(pipe).__call__).parameters
    assert set(found) <= set(accepted) and len(found) == 4
    assert all(torch.equal(value, m[0]) for value, m in zip(found.values(), made, strict=True))


def test_a_longest_caption_that_the_pipeline_cannot_have_is_refused() -> None:
    pipe = tiny_hunyuan.pipeline("1.5")
    pipe.tokenizer = pipe.text_encoder = object()
    with pytest.raises(ValueError, match=r"`tokens` must be none for .*15Pipeline, whose prompts .* length, got 7"):
        encode_caption(pipe, "a", torch.device("cpu"), 7)


# ---------------------------------------------------------------------- the cache


class AutoencoderKLWan(nn.Module):
    """As far as the VAE of Wan is used, without the seconds that importing diffusers and encoding take."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 3.0))
        self.config = types.SimpleNamespace(latents_mean=[0.5], latents_std=[2.0], to_dict=lambda: {"z_dim": 1})
        self.dtype, self.device, self.use_tiling = torch.float32, torch.device("cpu"), False

    def encode(self, video: torch.Tensor) -> Any:
        found = self.factor * video[:, :1, ::4, ::8, ::8]
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: found))


class FakePipe:
    """A pipeline around it; what it makes of a prompt is its length."""

    vae_scale_factor_temporal, vae_scale_factor_spatial = 4, 8
    tokenizer = types.SimpleNamespace(get_vocab=dict, eos_token_id=None)

    def __init__(self) -> None:
        self.vae, self.text_encoder = AutoencoderKLWan(), AutoencoderKLWan()

    def encode_prompt(self, prompt: str, max_sequence_length: int = 1) -> tuple[torch.Tensor, None]:
        return torch.full((1, max_sequence_length, 3), float(len(prompt))), None

    def __call__(self, prompt: str, max_sequence_length: int = 4) -> None:
        """Nothing is generated."""


@contextmanager
def _counted(vae: Any) -> Iterator[list[int]]:
    calls: list[int] = []
    real = vae.encode
    vae.encode = lambda *given, **options: (calls.append(0), real(*given, **options))[1]
    try:
        yield calls
    finally:
        del vae.encode


def test_videos_are_encoded_once(tmp_path: Path) -> None:
    wan = FakePipe()
    settings = _settings(_videos(tmp_path / "videos"))
    with _counted(wan.vae) as calls:
        first = open_videos(settings, wan, cache=tmp_path / "cache")
        assert len(calls) == 3
        again = open_videos(settings, wan, cache=tmp_path / "cache")
    assert len(calls) == 3
    for index in range(3):
        assert torch.equal(first[index].latents, again[index].latents)


@pytest.mark.parametrize("change", ["caption", "frames", "tokens", "vae", "text encoder", "file", "tiling"])
def test_what_changes_is_encoded_again(change: str, tmp_path: Path) -> None:
    pipe, source, asked = FakePipe(), _videos(tmp_path / "videos"), {}
    open_videos(_settings(source), pipe, cache=tmp_path / "cache")
    if change == "caption":
        (source / "b.txt").write_text("a dog")
    elif change == "frames":
        asked = {"frames": 1}
    elif change == "tokens":
        asked = {"tokens": 9}
    elif change == "file":
        Image.fromarray(_pixels(9)[0]).save(source / "a" / "000.png")
    elif change == "tiling":
        pipe.vae.use_tiling = True
    else:
        part = pipe.vae if change == "vae" else pipe.text_encoder
        with torch.no_grad():
            next(part.parameters()).mul_(1.5)
    with _counted(pipe.vae) as calls:
        open_videos(_settings(source, **asked), pipe, cache=tmp_path / "cache")
    assert len(calls) == 3


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wan = FakePipe()
    settings = _settings(_videos(tmp_path / "videos"))
    real = train_videos.read_clip

    def read(clip: Clip, *given: Any) -> torch.Tensor:
        if clip.name == "deep/c":
            raise RuntimeError("interrupted")
        return real(clip, *given)

    with monkeypatch.context() as patched:
        patched.setattr(train_videos, "read_clip", read)
        with _counted(wan.vae) as calls, pytest.raises(RuntimeError, match="interrupted"):
            open_videos(settings, wan, cache=tmp_path / "cache", shard_bytes=1)
    assert len(calls) == 2
    (folder,) = (tmp_path / "cache").iterdir()
    with pytest.raises(ValueError, match="got 2 samples of a run that stopped"):
        LatentData(folder)
    with _counted(wan.vae) as calls:
        data = open_videos(settings, wan, cache=tmp_path / "cache", shard_bytes=1)
    assert len(calls) == 1 and len(data) == 3
    whole = open_videos(settings, wan, cache=tmp_path / "other")
    for index in range(3):
        assert torch.equal(data[index].latents, whole[index].latents)
        assert torch.equal(data[index].conditions["prompt_embeds"], whole[index].conditions["prompt_embeds"])


def test_a_kill_keeps_what_was_encoded(tmp_path: Path) -> None:
    """The process ends at once while its third video is encoded."""
    source, cache = _videos(tmp_path / "videos"), tmp_path / "cache"

    def run() -> None:
        real, calls = train_videos.encode_video, []

        def encode(*given: Any) -> Any:
            calls.append(0)
            return os._exit(9) if len(calls) == 3 else real(*given)

        train_videos.encode_video = encode
        open_videos(_settings(source), FakePipe(), cache=cache, shard_bytes=1)

    assert exit_code(run) == 9
    pipe = FakePipe()
    with _counted(pipe.vae) as calls:
        data = open_videos(_settings(source), pipe, cache=cache, shard_bytes=1)
    assert len(calls) == 1 and len(data) == 3
    assert torch.equal(data[1].latents, encode_video(pipe.vae, _tensor(_pixels(1))))


def test_the_first_process_goes_first(tmp_path: Path) -> None:
    seen, wan = [], FakePipe()
    with _counted(wan.vae) as calls:

        @contextmanager
        def main_first() -> Iterator[None]:
            seen.append(len(calls))
            yield
            seen.append(len(calls))

        run = Run(tmp_path, torch.device("cpu"), progress=False, main_first=main_first)
        open_videos(_settings(_videos(tmp_path / "videos")), wan, cache=tmp_path / "cache", run=run)
    assert seen == [0, 3]


# ---------------------------------------------------------------------- frames


def test_frames_are_scaled_to_cover_and_cut_around_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((1, 64, 160, 3), np.uint8)
    # Scaled by half to 32 x 80: columns 16 to 64 stay, which are 32 to 128 here.
    pixels[:, :, :32, 0] = pixels[:, :, 128:, 0] = 255
    pixels[:, :32, :, 1] = 200
    found = read_clip(_clip(_write_frames(tmp_path / "a", pixels)), 1, 32, 48, None)
    assert found.shape == (3, 1, 32, 48) and found.dtype == torch.float32
    assert found[0, 0, :, 4:-4].max() == -1
    assert found[1, 0, :12].sub(200 / 127.5 - 1).abs().max() < 1e-5
    assert found[1, 0, -12:].max() == -1
    assert found.min() >= -1 and found.max() <= 1


@pytest.mark.parametrize("size", [(32, 48), (33, 48), (31, 50), (17, 200), (400, 3)], ids=str)
def test_every_size_is_cut_to_the_one_asked_for(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = _pixels(0, 1, *size)
    found = read_clip(_clip(_write_frames(tmp_path / "a", pixels)), 1, 32, 48, None)
    assert found.shape == (3, 1, 32, 48) and bool(found.isfinite().all())
    if size == (32, 48):
        assert torch.equal(found, _tensor(pixels))


def _numbered(count: int) -> NDArray[np.uint8]:
    """Frames whose brightness is their number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3)).copy()


@pytest.mark.parametrize(
    ("rate", "fps", "picked"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (30.0, None, [0, 1, 2, 3, 4]),
        (30.0, 10.0, [0, 3, 6, 9, 12]),
        (24.0, 16.0, [0, 2, 3, 5, 6]),
        (29.97, 30.0, [0, 1, 2, 3, 4]),
        (25.0, 16.0, [0, 2, 3, 5, 6]),
    ],
)
def test_frames_are_taken_at_the_rate_asked_for(
    rate: float | None, fps: float | None, picked: list[int], tmp_path: Path
) -> None:
    clip = _clip(_write_frames(tmp_path / "a", _numbered(picked[-1] + 1)), rate)
    found = read_clip(clip, 5, 8, 8, fps)
    assert ((found[0, :, 0, 0] + 1) * 127.5).round().tolist() == picked
    # One frame fewer is too short.
    (clip.path / f"{picked[-1]:03}.png").unlink()
    with pytest.raises(ShortClipError, match=rf"got 5, for which a must have {picked[-1] + 1} frames and has fewer"):
        read_clip(clip, 5, 8, 8, fps)


@pytest.mark.parametrize(
    ("rate", "message"), [(None, "nothing says the rate"), (12.0, "at most the 12 of the video, got 16 for a")]
)
def test_a_rate_that_cannot_be_had_is_refused(rate: float | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`fps` must be .*{message}"):
        read_clip(_clip(_write_frames(tmp_path / "a", _numbered(9)), rate), 5, 8, 8, 16.0)


def test_moving_pictures_need_no_reader(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in _numbered(7) * 30]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=50)
    found = read_clip(_clip(tmp_path / "a.gif"), 3, 8, 8, 10.0)
    # 20 frames a second, of which every other one is taken.
    assert ((found[0, :, 0, 0] + 1) * 127.5).round().tolist() == [0, 60, 120]


class _Closing:
    def __init__(self, frames: Any) -> None:
        self.frames, self.closed = frames, False

    def __enter__(self) -> _Closing:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


def _fake_av(pixels: NDArray[np.uint8]) -> dict[str, types.ModuleType]:
    """As far as PyAV's interface is used."""

    class Frame:
        def __init__(self, array: NDArray[np.uint8]) -> None:
            self.array, self.time = array, None

        def to_ndarray(self, format: str) -> NDArray[np.uint8]:
            assert format == "rgb24"
            return self.array

    class Container(_Closing):
        streams = types.SimpleNamespace(video=[types.SimpleNamespace(average_rate=20)])

        def decode(self, stream: Any) -> Iterator[Frame]:
            assert stream is self.streams.video[0]
            return iter([Frame(frame) for frame in self.frames])

    module: Any = types.ModuleType("av")
    module.open = lambda path: Container(pixels)
    return {"av": module}


def _fake_imageio(pixels: NDArray[np.uint8]) -> dict[str, types.ModuleType]:
    class Reader(_Closing):
        def __iter__(self) -> Iterator[NDArray[np.uint8]]:
            return iter(self.frames)

        def get_meta_data(self) -> dict[str, float]:
            return {"fps": 20.0}

    module: Any = types.ModuleType("imageio")
    module.v2 = types.ModuleType("imageio.v2")
    module.v2.get_reader = lambda path: Reader(pixels)
    return {"imageio": module, "imageio.v2": module.v2}


def _fake_decord(pixels: NDArray[np.uint8]) -> dict[str, types.ModuleType]:
    class VideoReader:
        def __init__(self, path: str) -> None:
            assert path.endswith("a.mp4")

        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> Any:
            return types.SimpleNamespace(asnumpy=lambda: pixels[index])

        def get_avg_fps(self) -> float:
            return 20.0

    module: Any = types.ModuleType("decord")
    module.VideoReader = VideoReader
    return {"decord": module}


READERS = {"av": _fake_av, "imageio": _fake_imageio, "decord": _fake_decord}


def _only(reader: str | None, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in READERS:
        monkeypatch.setitem(sys.modules, name, None)
    for name, module in (READERS[reader](pixels) if reader else {}).items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("reader", READERS)
def test_video_files_are_read_by_what_is_installed(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = _pixels(2, 7)
    _only(reader, pixels, monkeypatch)
    (tmp_path / "a.mp4").write_bytes(b"")
    found = read_clip(_clip(tmp_path / "a.mp4"), 4, HEIGHT, WIDTH, 10.0)
    assert torch.equal(found, _tensor(pixels[::2]))
    with pytest.raises(ShortClipError, match="must have 9 frames and has fewer"):
        read_clip(_clip(tmp_path / "a.mp4"), 5, HEIGHT, WIDTH, 10.0)


def test_a_reader_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(None, _pixels(0), monkeypatch)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(MissingExtra, match=r"video files needs av \(pip install 'hf-sparse-attn\[video\]'\)"):
        read_clip(_clip(tmp_path / "a.mp4"), 1, 8, 8, None)
    frames = _clip(_write_frames(tmp_path / "b", _pixels(0)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match="needs pillow"):
        read_clip(frames, 1, 8, 8, None)


def test_a_broken_video_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("av")

    def fail(path: str) -> None:
        raise OSError("invalid data")

    module.open = fail
    monkeypatch.setitem(sys.modules, "av", module)
    for name in ("a.mp4", "a.gif"):
        (tmp_path / name).write_bytes(b"none")
        with pytest.raises(ValueError, match=f"`source` must hold videos that can be read, got .*{name}: "):
            read_clip(_clip(tmp_path / name), 1, 8, 8, None)
    folder = _write_frames(tmp_path / "frames", _pixels(0))
    (folder / "001.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"`source` must hold videos that can be read, got .*frames: "):
        read_clip(_clip(folder), 2, 8, 8, None)


# ---------------------------------------------------------------------- captions


def test_captions_are_found_in_three_places(tmp_path: Path) -> None:
    for name in ("a", "b/c", "d"):
        _write_frames(tmp_path / name, _pixels(0, 1, 4, 4))
    for name in ("e.mp4", "b/f.gif", "g.webm"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("of a\n")
    (tmp_path / "b" / "c.txt").write_text("of c")
    (tmp_path / "captions.json").write_text(json.dumps({"d": "of d", "e.mp4": "of e"}))
    rows = [{"file_name": "b/f.gif", "caption": "of f", "fps": 12}, {"file_name": "g", "text": "of g"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    found = find_clips(tmp_path)
    assert [(clip.name, clip.caption, clip.fps) for clip in found] == [
        ("a", "of a", None),
        ("b/c", "of c", None),
        ("b/f.gif", "of f", 12),
        ("d", "of d", None),
        ("e.mp4", "of e", None),
        ("g.webm", "of g", None),
    ]


def test_files_of_other_systems_are_read(tmp_path: Path) -> None:
    # Frames without leading zeros, files that macOS puts beside others, and the marks and line ends of other editors.
    folder = tmp_path / "a"
    pixels = _numbered(11)
    folder.mkdir()
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    (folder / "._frame0.png").write_bytes(b"none")
    (tmp_path / "._b.mp4").write_bytes(b"none")
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("of a", encoding="utf-8-sig")
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "b.mp4", "text": "one\u2028two"}, ensure_ascii=False), encoding="utf-8-sig"
    )
    clips = find_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in clips] == [("a", "of a"), ("b.mp4", "one\u2028two")]
    found = read_clip(clips[0], 11, 8, 8, None)
    assert ((found[0, :, 0, 0] + 1) * 127.5).round().tolist() == list(range(11))


@pytest.mark.parametrize("name", ["a.txt", "captions.json", "metadata.jsonl"])
def test_captions_in_another_encoding_are_refused_by_name(name: str, tmp_path: Path) -> None:
    _write_frames(tmp_path / "a", _pixels(0, 1, 4, 4))
    (tmp_path / name).write_bytes("Straße".encode("latin-1"))
    with pytest.raises(ValueError, match=f"captions must be UTF-8, got .*{name}"):
        find_clips(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.json", "{", "`captions.json` must hold an object from names to captions"),
        ("captions.json", '{"a": 5}', "`captions.json` must hold an object from names to captions"),
        ("metadata.jsonl", '{"file_name": "a"}', "`metadata.jsonl` must hold objects with .* in line 1"),
        ("metadata.jsonl", '{"file_name": "a", "text": "a"}\n[]', "another in line 2"),
        ("metadata.jsonl", '{"file_name": "a", "text": "a", "fps": "x"}', "another in line 1"),
        ("captions.json", "{}", "a caption of every video, in a.txt beside it, .* got none for a in"),
    ],
    ids=["no json", "no text", "no caption", "no object", "no rate", "no entry"],
)
def test_captions_that_are_none_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    _write_frames(tmp_path / "a", _pixels(0, 1, 4, 4))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_clips(tmp_path)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"frames": 6}, r"`frames` must be 4n \+ 1 for this VAE, such as 5 or 9, got 6"),
        ({"frames": 4}, "such as 1 or 5, got 4"),
        ({"height": 40}, "`height` must be a multiple of 16 for this model, such as 32 or 48, got 40"),
        ({"width": 8}, "`width` must be a multiple of 16 for this model, such as 16, got 8"),
        ({"frames": 0}, "`frames` must be at least 1, got 0"),
        ({"tokens": 0}, "`tokens` must be at least 1, got 0"),
        ({"fps": 0.0}, "`fps` must be more than 0, or none, got 0"),
        ({"source": ""}, "`source` must not be empty"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_sizes_that_the_model_cannot_take_are_refused(
    asked: dict[str, Any], message: str, wan: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_videos(_settings(tmp_path, **asked), wan, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_shape_of_latents_is_that_of_the_vae(wan: Any, hunyuan: Any) -> None:
    settings = VideoSettings(source="x", frames=9, height=32, width=64)
    assert latent_shape(settings, wan) == (3, 4, 8) == latent_shape(settings, hunyuan)
    assert latent_shape(settings, tiny_hunyuan.pipeline("1.5")) == (5, 8, 16)
    low_only = tiny_prompts.wan("low_only")
    with pytest.raises(ValueError, match="`width` must be a multiple of 16"):
        latent_shape(replace(settings, width=72), low_only)


def test_folders_without_videos_are_refused(wan: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"`source` must be a folder of videos, got .*none"):
        open_videos(_settings(tmp_path / "none"), wan, cache=cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"`source` must hold video files \(.mp4.* got none in"):
        open_videos(_settings(tmp_path / "empty"), wan, cache=cache)
    with pytest.raises(ValueError, match="every video in a folder of its own, got frames in"):
        open_videos(_settings(_write_frames(tmp_path / "flat", _pixels(0))), wan, cache=cache)


def test_pipelines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    settings = _settings(_videos(tmp_path / "videos"))
    cache = tmp_path / "cache"
    with pytest.raises(TypeError, match=r"`vae` must be AutoencoderKLWan or .*; got NoneType"):
        open_videos(settings, types.SimpleNamespace(vae=None), cache=cache)
    with pytest.raises(ValueError, match="`pipe` must have a text encoder and a tokenizer, got a Hunyuan"):
        open_videos(settings, tiny_hunyuan.pipeline(), cache=cache)
    with pytest.raises(ValueError, match="from text alone, got HunyuanVideoImageToVideoPipeline, which needs image"):
        encode_caption(tiny_hunyuan.pipeline("token_replace"), "a", torch.device("cpu"))
    odd: Any = FakePipe()
    odd.encode_prompt = lambda prompt: (1, 2, 3)
    with pytest.raises(ValueError, match="`pipe` must give 2 values for a prompt, got 3 from FakePipe"):
        encode_caption(odd, "a", torch.device("cpu"))


def test_a_missing_ftfy_is_named() -> None:
    def encode_prompt(prompt: str) -> None:
        raise NameError("name 'ftfy' is not defined", name="ftfy")

    pipe: Any = FakePipe()
    pipe.encode_prompt = encode_prompt
    with pytest.raises(MissingExtra, match=r"needs ftfy \(pip install 'hf-sparse-attn\[video\]'\)"):
        encode_caption(pipe, "a", torch.device("cpu"))


def test_short_videos_are_refused_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _videos(tmp_path / "videos")
    (source / "b" / "004.png").unlink()
    wan = FakePipe()
    with pytest.raises(ShortClipError, match="for which b must have 5 frames and has fewer; `skip_short`"):
        open_videos(_settings(source), wan, cache=tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        data = open_videos(_settings(source, skip_short=True), wan, cache=tmp_path / "cache")
    assert [data.name(i) for i in range(len(data))] == ["a", "deep/c"]
    assert "b has too few frames and is left out" in caplog.text
    with pytest.raises(ValueError, match="`frames` must be at most what some video has, got 9, which none has"):
        open_videos(_settings(source, skip_short=True, frames=9), wan, cache=tmp_path / "cache")


def test_a_vae_that_overflows_is_noticed(tmp_path: Path) -> None:
    pipe = FakePipe()
    with torch.no_grad():
        next(pipe.vae.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="`latents` must be finite, got infinite or undefined values for 'a'"):
        open_videos(_settings(_videos(tmp_path / "videos")), pipe, cache=tmp_path / "cache")


# ---------------------------------------------------------------------- latents as the source


def test_a_folder_of_latents_is_taken_as_it_is(wan: Any, tmp_path: Path) -> None:
    samples = [LatentSample(torch.randn(16, 2, 4, 6), {"prompt_embeds": torch.randn(7, 32)}) for _ in range(3)]
    write_latents(tmp_path / "latents", samples)
    data = open_videos(_settings(tmp_path / "latents"), wan, cache=tmp_path / "cache")
    assert torch.equal(data[2].latents, samples[2].latents) and not (tmp_path / "cache").exists()
    message = r"latents of \(3, 4, 6\) for 9 frames of 32 x 48, got \(2, 4, 6\) for sample 0"
    with pytest.raises(ValueError, match=message):
        open_videos(_settings(tmp_path / "latents", frames=9), wan, cache=tmp_path / "cache")


# ---------------------------------------------------------------------- where models are meanwhile


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.inner = nn.Dropout()
        self.config = {"size": 3}

    @property
    def device(self) -> torch.device:
        return self.weight.device


def test_models_are_put_back_where_and_as_they_were() -> None:
    moved, offloaded = _Part(), _Part()
    moved.train()
    moved.inner.eval()
    offloaded._hf_hook = object()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="inside"), placed([moved, offloaded], torch.device("meta")):
        assert moved.device.type == "meta" and offloaded.device.type == "cpu"
        assert not any(part.training for part in (*moved.modules(), *offloaded.modules()))
        # What is on the meta device cannot come back.
        moved.weight = nn.Parameter(torch.ones(3))
        raise RuntimeError("inside")
    assert moved.device.type == offloaded.device.type == "cpu"
    assert moved.training and not moved.inner.training and offloaded.training


def test_fingerprints_know_weights_and_config_and_nothing_else() -> None:
    part, other = _Part(), _Part()
    assert fingerprint(part) == fingerprint(other)
    other.config = {"size": 3, "_name_or_path": "/elsewhere", "_diffusers_version": "9", "transformers_version": "9"}
    assert fingerprint(part) == fingerprint(other)
    for change in (lambda: other.weight.data.add_(1), lambda: other.config.update(size=4), other.double):
        before = fingerprint(other)
        change()
        assert fingerprint(other) != before
    other.to("meta")
    assert len(fingerprint(other)) == 20


def test_a_real_video_file_is_read(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "grey.mp4"
    with av.open(str(file), "w") as made:
        stream = made.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in range(20):
            picture = np.full((16, 32, 3), 10 * level, np.uint8)
            made.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        made.mux(stream.encode())
    frames, fps = video_source._by_av(file)
    read, times = zip(*frames, strict=True)
    assert times == pytest.approx([number / 8 for number in range(20)])
    assert fps == 8.0 and len(read) == 20 and all(frame.shape == (16, 32, 3) for frame in read)
    # The format loses a little.
    assert [float(frame.mean()) for frame in read] == pytest.approx([10 * level for level in range(20)], abs=4)


def _written(file: Path, pictures: list[NDArray[np.uint8]], times: list[int], rate: int) -> None:
    """A video file with each picture at a time of its own, in units of 1 / rate seconds."""
    import av

    with av.open(str(file), "w") as made:
        stream = made.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            made.mux(stream.encode(frame))
        made.mux(stream.encode())


def test_a_video_of_variable_rate_is_read_by_its_times(tmp_path: Path) -> None:
    pytest.importorskip("av")
    # A second with 10 frames, and then one every half second.
    times = [*range(10), 10, 15, 20, 25, 30, 35, 39]
    _written(tmp_path / "a.mp4", [np.full((16, 16, 3), 6 * time, np.uint8) for time in times], times, 10)
    found = read_clip(_clip(tmp_path / "a.mp4"), 8, 16, 16, 2.0)
    read = ((found.mean((0, 2, 3)) + 1) * 127.5 / 6).tolist()
    # The rate of the whole file is a little more than 4, to which times are rounded.
    assert read == pytest.approx([0, 5, 10, 15, 20, 25, 30, 35], abs=1.3)
    # Without a rate every frame is taken.
    every = read_clip(_clip(tmp_path / "a.mp4"), len(times), 16, 16, None)
    assert ((every.mean((0, 2, 3)) + 1) * 127.5 / 6).tolist() == pytest.approx(times, abs=1)


def test_a_video_held_upright_is_read_upright(tmp_path: Path) -> None:
    pytest.importorskip("av")
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 200
    file = tmp_path / "phone.mp4"
    _written(file, [picture] * 2, [0, 1], 8)
    data = bytearray(file.read_bytes())
    # The matrix of the track: a quarter turn clockwise, as of a phone that was held upright.
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 16 << 16, 0, 1 << 30)
    file.write_bytes(data)
    found = read_clip(_clip(file), 2, 32, 16, None)
    assert found[:, :, :14].mean() > 0.5 and found[:, :, 18:].mean() < -0.9


def test_the_readers_come_in_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in READERS:
        monkeypatch.setitem(sys.modules, name, None)
    for name in reversed(READERS):
        for key, module in READERS[name](_pixels(0)).items():
            monkeypatch.setitem(sys.modules, key, module)
        chosen: Callable[..., Any] = video_source._reader()
        assert chosen.__name__ == f"_by_{name}"
