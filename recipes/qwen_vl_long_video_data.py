"""Questions about videos: from a list, through the model's processor, or prepared ahead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.extras import needing
from hf_sparse_attn.training.video.source import Clip, read_clip

# Label of a token that is no part of an answer.
NO_LABEL = -100
_TOKENS = ("input_ids", "mm_token_type_ids", "labels")
_VIDEO = ("pixel_values_videos", "video_grid_thw")
# Seconds between the frames of a grid, by which Qwen2.5-VL numbers positions in time; the others have none.
SECONDS = "second_per_grid_ts"
_VIDEO_TYPE = 2

Sample = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """Where questions about videos come from, and what is taken of each video.

    Args:
        source: a .jsonl file with an object for each question; a folder saved by `datasets`, or the id of a data set
            on the Hub; or a folder of prepared samples, as `write_sample` leaves them, for which the rest is not used.
        frames, height, width: of a video as the model gets it; it is scaled to cover the size and cut around its
            centre. The processor may scale it again to what it takes.
        fps: frames a second to take of a video, from its start; None takes every frame.
        split, name: of a data set.
        video, question, answer: names of the fields. A video is the path of a file, or of a folder of frames, which
            then needs its frames a second in a field `fps` if `fps` is asked for; relative to the .jsonl file.
    """

    source: str
    frames: int = 64
    height: int = 224
    width: int = 224
    fps: float | None = None
    split: str = "train"
    name: str | None = None
    video: str = "video"
    question: str = "question"
    answer: str = "answer"

    def __post_init__(self) -> None:
        for name in ("source", "split", "video", "question", "answer"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must not be empty")
        for name in ("frames", "height", "width"):
            check_int(name, getattr(self, name), 1)
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"`fps` must be more than 0, or none, got {self.fps}")


class QuestionData:
    """Samples by their index, each what the model's forward takes, and `labels`; see `write_sample`.

    Args:
        settings: where from.
        model: folder or Hub id of the model, whose processor is loaded where the samples are not prepared.
        config: of the model.
        processor: in place of the one of `model`.

    Raises:
        FileNotFoundError: the source is not there.
        ValueError: it holds nothing, or something else than questions about videos for this model.
    """

    def __init__(self, settings: QuestionSettings, model: str, config: Any, processor: Any = None) -> None:
        self.settings, self.config = settings, config
        folder = Path(settings.source).expanduser()
        self.files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        self.rows: Sequence[Mapping[str, Any]] = []
        self.processor: Any = None
        if not self.files:
            self.rows = _rows(settings)
            _check_row(settings, self.rows[0])
            self.processor = _processor(model) if processor is None else processor
        self[0]

    def __len__(self) -> int:
        return len(self.files) or len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        # IndexError is what ends a loop over a sequence.
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}")
        if self.files:
            sample, where = read_sample(self.files[index]), str(self.files[index])
        else:
            sample, where = self._processed(index), f"question {index} of {self.settings.source}"
        check_sample(sample, self.config, where)
        return sample

    def _processed(self, index: int) -> Sample:
        s, row = self.settings, self.rows[index]
        _check_row(s, row)
        path = Path(str(row[s.video])).expanduser()
        if not path.is_absolute() and s.source.endswith(".jsonl"):
            path = Path(s.source).expanduser().parent / path
        if not path.exists():
            raise FileNotFoundError(f"`{s.video}` of question {index} must be a video, got {path}, which is not there")
        rate = row.get("fps")
        clip = Clip(str(path), path, "", None if rate is None else float(rate))
        pixels = read_clip(clip, s.frames, s.height, s.width, s.fps)
        frames = ((pixels.transpose(0, 1) + 1) * 127.5).round().to(torch.uint8)
        return process(self.processor, frames, str(row[s.question]), str(row[s.answer]), s.fps)


def process(processor: Any, frames: Tensor, question: str, answer: str, fps: float | None = None) -> Sample:
    """A question about a video as the model reads it, and its answer.

    The answer's tokens are put behind those of the prompt as they are, as the model gives them when it generates.

    Args:
        processor: of the model.
        frames: uint8 [frames, 3, height, width].
        question, answer: texts.
        fps: frames a second, which Qwen3-VL writes between the frames; None leaves that to the processor.
    """
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    told = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = processor.apply_chat_template(told, tokenize=False)
    tokenizer = processor.tokenizer
    # What closes an answer: the template knows, or else it is the end of the text.
    known = whole.startswith(prompt + answer)
    reply = whole[len(prompt) :].rstrip("\n") if known else answer + (tokenizer.eos_token or "")
    given: dict[str, Any] = {"do_sample_frames": False}
    if fps is not None:
        count = len(frames)
        told_of = {"fps": fps, "total_num_frames": count, "frames_indices": list(range(count))}
        given["video_metadata"] = [told_of]
    made = processor(text=[prompt], videos=[frames], return_tensors="pt", **given)
    ids = made["input_ids"][0]
    said = torch.tensor(tokenizer(reply, add_special_tokens=False)["input_ids"], dtype=ids.dtype)
    types = made["mm_token_type_ids"][0]
    seconds = made.get(SECONDS)
    return {
        **({} if seconds is None else {SECONDS: torch.as_tensor(seconds, dtype=torch.float32)}),
        "input_ids": torch.cat([ids, said]),
        "mm_token_type_ids": torch.cat([types, types.new_zeros(len(said))]),
        "labels": torch.cat([torch.full_like(ids, NO_LABEL), said]),
        **{name: made[name] for name in _VIDEO},
    }


def write_sample(path: Path, sample: Mapping[str, Tensor]) -> None:
    """Writes a prepared sample.

    Args:
        path: of the .safetensors file; samples are read in the order of their names.
        sample: int64 [tokens]: `input_ids`, `mm_token_type_ids` (2 at the tokens of a video), `labels` (-100 but for
            the answer, where they are the ids); `pixel_values_videos` [patches, numbers] and `video_grid_thw`
            [videos, 3] as the processor gives them; of Qwen2.5-VL also its `second_per_grid_ts` [videos], without
            which the model takes 1 second.
    """
    from safetensors.torch import save_file

    names = (*_TOKENS, *_VIDEO, *([SECONDS] if SECONDS in sample else []))
    save_file({name: sample[name].contiguous() for name in names}, path)


def read_sample(path: Path) -> Sample:
    """A sample that `write_sample` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`source` must hold prepared samples, got {path}: {error}") from error
    missing = [name for name in (*_TOKENS, *_VIDEO) if name not in found]
    if missing:
        raise ValueError(f"a prepared sample must hold {', '.join((*_TOKENS, *_VIDEO))}; {path} has no {missing[0]}")
    return found


def check_sample(sample: Sample, config: Any, where: str) -> None:
    """Raises ValueError where a sample is none for a model of this configuration."""
    ids = sample["input_ids"]
    for name in _TOKENS:
        if sample[name].shape != ids.shape or ids.ndim != 1 or sample[name].is_floating_point():
            raise ValueError(f"`{name}` must be whole numbers [tokens], got {list(sample[name].shape)} in {where}")
    answer = sample["labels"] != NO_LABEL
    if not bool(answer[1:].any()) or not torch.equal(sample["labels"][answer], ids[answer]):
        raise ValueError(f"`labels` must be the ids of the answer and {NO_LABEL} elsewhere, got others in {where}")
    grid = sample["video_grid_thw"]
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise ValueError(f"`video_grid_thw` must be [videos, 3], got {list(grid.shape)} in {where}")
    seconds = sample.get(SECONDS)
    if seconds is not None and (seconds.shape != grid.shape[:1] or not bool((seconds > 0).all())):
        raise ValueError(f"`{SECONDS}` must be more than 0, [videos], got {list(seconds.shape)} in {where}")
    patches, merge = int(grid.prod(1).sum()), config.vision_config.spatial_merge_size
    if len(sample["pixel_values_videos"]) != patches:
        raise ValueError(
            f"`pixel_values_videos` must have {patches} patches for its grids, got "
            f"{len(sample['pixel_values_videos'])} in {where}"
        )
    for name, tokens in (("input_ids", ids == config.video_token_id), ("mm_token_type_ids", None)):
        here = sample["mm_token_type_ids"] == _VIDEO_TYPE if tokens is None else tokens
        if int(here.sum()) != patches // merge**2:
            raise ValueError(
                f"`{name}` must tell of {patches // merge**2} tokens of video, got {int(here.sum())} in {where}"
            )


def _rows(settings: QuestionSettings) -> Sequence[Mapping[str, Any]]:
    path = Path(settings.source).expanduser()
    rows: Any
    if settings.source.endswith(".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"`source` must be a .jsonl file that is there, got {settings.source}")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"`source` must hold an object of JSON in each line, got {path}: {error}") from error
    elif path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise ValueError(f"`source` must hold prepared samples (.safetensors) or a saved data set, got {path}")
    else:
        rows = _data_set(settings, path)
    if not len(rows):
        raise ValueError(f"`source` must hold at least one question, got none in {settings.source}")
    return rows


def _data_set(settings: QuestionSettings, path: Path) -> Any:
    with needing("questions from a data set"):
        import datasets
    if not path.is_dir():
        return datasets.load_dataset(settings.source, settings.name, split=settings.split)
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if settings.split not in found:
            raise ValueError(f"`split` must be one of {', '.join(found)}, got {settings.split!r}")
        return found[settings.split]
    return found


def _check_row(settings: QuestionSettings, row: Any) -> None:
    wanted = [settings.video, settings.question, settings.answer]
    if not isinstance(row, Mapping) or any(not isinstance(row.get(name), str) for name in wanted):
        raise ValueError(f"a question must have texts {', '.join(wanted)}, got {row!r:.200}")


def _processor(model: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model)
    except ImportError as error:
        raise ImportError(
            f"the processor of {model} cannot be loaded here ({error}); it needs torchvision, without which "
            "`data.source` must be a folder of prepared samples"
        ) from error
