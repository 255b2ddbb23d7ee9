"""Recipe qwen_vl_long_video: the loss of the answers alone, on prepared samples and through a processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.recipe import Run, read_recipe
from hf_sparse_attn.recipes.qwen_vl_long_video import QwenVLTask
from hf_sparse_attn.recipes.qwen_vl_long_video_data import NO_LABEL, process, read_sample, write_sample
from hf_sparse_attn.training.loop import train
from tests.support.tiny_qwen import BEGIN, END, MERGE, PIXELS, VIDEO, prompt, tiny_qwen

pytest.importorskip("peft")
pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [(4, 3, 5), (3, 4, 4), (5, 3, 3), (4, 2, 6), (2, 5, 5)]
ANSWER = 4


def sample_of(kind: str, number: int) -> dict[str, Tensor]:
    """A question about a video, and an answer that its first word tells."""
    given = prompt(kind, [5 + number, SIZES[number % len(SIZES)], 9], seed=number)
    ids = torch.cat([given["input_ids"][0], torch.arange(40, 40 + ANSWER)])
    types = torch.cat([given["mm_token_type_ids"][0], torch.zeros(ANSWER, dtype=torch.int32)])
    labels = torch.full_like(ids, NO_LABEL)
    labels[-ANSWER:] = ids[-ANSWER:]
    return {
        "input_ids": ids, "mm_token_type_ids": types, "labels": labels,
        "pixel_values_videos": given["pixel_values_videos"], "video_grid_thw": given["video_grid_thw"],
    }  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Kind, folder of a tiny model, and folder of prepared samples."""
    kind = request.param
    model, data = tmp_path_factory.mktemp(kind), tmp_path_factory.mktemp(f"{kind}_data")
    tiny_qwen(kind).save_pretrained(model)
    for number in range(5):
        write_sample(data / f"{number:03}.safetensors", sample_of(kind, number))
    return kind, model, data


def settings_of(places: tuple[str, Path, Path], **changes: Any) -> dict[str, Any]:
    return {
        "recipe": "qwen_vl_long_video", "model": str(places[1]), "steps": 2, "batch": 2, "seed": 3,
        "data": {"source": str(places[2])}, "evaluation_samples": 2,
        "sparse": {"method": "block_topk", "params": {"density": 0.4, "block_size": 16}, "min_tokens": 0},
        "lora": {"rank": 2, "targets": [r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"]},
        "optimizer": {"learning_rate": 2e-2, "schedule": "constant"}, **changes,
    }  # fmt: skip


def recipe_of(tmp_path: Path, settings: dict[str, Any]) -> Any:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return read_recipe(file)


def made(tmp_path: Path, settings: dict[str, Any], processor: Any = None) -> QwenVLTask:
    run = Run(output=tmp_path, device=torch.device("cpu"), progress=False)
    return QwenVLTask(recipe_of(tmp_path, settings), run, processor)


def shake(task: QwenVLTask) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in task.trained().values():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)


def gradients(task: QwenVLTask, batches: list[Any]) -> dict[str, Tensor]:
    task.model.train()
    task.model.zero_grad()
    total = sum(task.weight(b) for b in batches)
    for batch in batches:
        (task.loss(batch) / total).backward()
    task.model.eval()
    return {name: p.grad.clone() for name, p in task.trained().items() if p.grad is not None}


def assert_equal_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in other.values())
    assert largest > 0
    assert all((g - other[name]).abs().max() <= 1e-4 * largest for name, g in one.items())


def test_the_loss_is_that_of_the_answers_and_dense_figures_are_the_untouched_model(
    places: tuple[str, Path, Path], tmp_path: Path
) -> None:
    task = made(tmp_path, settings_of(places))
    with torch.no_grad():
        found = task.evaluate()
    task.close()
    losses, right, whole = [], [], []
    for number in (3, 4):
        sample = sample_of(places[0], number)
        given = {name: value[None] for name, value in sample.items() if name in ("input_ids", "mm_token_type_ids")}
        videos = {name: sample[name] for name in ("pixel_values_videos", "video_grid_thw")}
        with torch.no_grad():
            logits = task.model(**given, **videos, attention_mask=torch.ones_like(given["input_ids"])).logits[0]
        losses.append(F.cross_entropy(logits[:-1], sample["labels"][1:], ignore_index=NO_LABEL))
        right.append((logits[-ANSWER - 1 : -1].argmax(-1) == sample["labels"][-ANSWER:]).float().mean())
        whole.append(right[-1] == 1)
    assert found["loss_dense"] == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    assert found["accuracy_dense"] == pytest.approx(float(sum(right)) / 2)
    assert found["exact_dense"] == sum(whole) / 2
    assert found["loss"] != found["loss_dense"]


def test_positions_follow_the_seconds_between_frames(tmp_path: Path) -> None:
    kind, model, data = "qwen2_5_vl", tmp_path / "model", tmp_path / "data"
    data.mkdir()
    tiny_qwen(kind).save_pretrained(model)
    for number in range(2):
        write_sample(
            data / f"{number}.safetensors", {**sample_of(kind, number), "second_per_grid_ts": torch.tensor([3.0])}
        )
    task = made(
        tmp_path, settings_of((kind, model, data), sparse=None, evaluation_samples=1, lora={"targets": ["q_proj"]})
    )
    (sample,) = task.batch(0, [0])
    given = {name: sample[name][None] for name in ("input_ids", "mm_token_type_ids")}
    given |= {name: sample[name] for name in ("pixel_values_videos", "video_grid_thw")}
    losses = []
    for more in ({"second_per_grid_ts": [3.0]}, {}):
        with torch.no_grad():
            logits = task.model(**given, **more, attention_mask=torch.ones_like(given["input_ids"])).logits[0]
        losses.append(
            float(F.cross_entropy(logits[:-1], sample["labels"][1:], ignore_index=NO_LABEL, reduction="sum"))
        )
    with torch.no_grad():
        assert float(task.loss([sample])) == pytest.approx(losses[0], rel=1e-5) != pytest.approx(losses[1], rel=1e-5)
    task.close()


def test_what_a_processor_says_of_seconds_is_kept(tmp_path: Path) -> None:
    class Timed(Stub):
        def __call__(self, *args: Any, **given: Any) -> dict[str, Any]:
            return {**super().__call__(*args, **given), "second_per_grid_ts": [0.5]}

    frames = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    sample = process(Timed(), frames, "what?", "a cat", fps=4.0)
    write_sample(tmp_path / "0.safetensors", sample)
    assert read_sample(tmp_path / "0.safetensors")["second_per_grid_ts"].tolist() == [0.5]
    assert "second_per_grid_ts" not in process(Stub(), frames, "what?", "a cat")


def test_checkpointing_and_micro_batches_change_no_gradient(places: tuple[str, Path, Path], tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        task = made(tmp_path, settings_of(places, gradient_checkpointing=checkpointing))
        shake(task)
        found.append(gradients(task, [task.batch(0, [0, 1])]))
        found.append(gradients(task, [task.batch(0, [0]), task.batch(0, [1])]))
        task.close()
    for other in found[1:]:
        assert_equal_gradients(found[0], other)


def test_the_loss_falls_and_the_decoders_projections_alone_change(
    places: tuple[str, Path, Path], tmp_path: Path
) -> None:
    task = made(tmp_path, settings_of(places))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    (optimizer,) = task.optimizers()
    batch, losses = task.batch(0, [0, 1]), []
    task.model.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss = task.loss(batch) / task.weight(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 2 * 2 * 4
    assert all("language_model.layers." in name for name in changed)
    task.close()
    untouched = tiny_qwen(places[0]).state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in task.model.state_dict().items())


def test_methods_are_told_the_grid_of_the_video(places: tuple[str, Path, Path], tmp_path: Path) -> None:
    task = made(tmp_path, settings_of(places))
    assert task.patch is not None
    seen: list[Any] = []
    task.patch.session.watcher = lambda q, k, v, ctx, out: seen.append(ctx.layout)
    batch = task.batch(0, [0])
    with torch.no_grad():
        task.loss(batch)
    grid = batch[0]["video_grid_thw"][0].tolist()
    frames, height, width = grid[0], grid[1] // MERGE, grid[2] // MERGE
    one = (1, height, width)
    wanted = [one] * frames if places[0] == "qwen3_vl" else [(frames, height, width)]
    assert [[part.grid for part in layout.parts if part.grid] for layout in seen] == [wanted, wanted]
    task.close()


def test_training_leaves_a_bundle(tmp_path: Path) -> None:
    kind, model, data = "qwen2_5_vl", tmp_path / "model", tmp_path / "data"
    data.mkdir()
    tiny_qwen(kind).save_pretrained(model)
    for number in range(4):
        write_sample(data / f"{number}.safetensors", sample_of(kind, number))
    recipe = recipe_of(tmp_path, settings_of((kind, model, data)))
    figures = train(recipe, tmp_path / "out", progress=False)
    assert {"loss", "accuracy", "exact", "loss_dense"} <= figures["after"].keys()
    fresh = tiny_qwen(kind)
    with hsa.load_bundle(fresh, tmp_path / "out" / "result") as bundle:
        assert bundle.patch is not None and bundle.patch.method.name == "block_topk"


# ---------------------------------------------------------------------- a processor


class Stub:
    """Stands for the processor of a tiny model: one token is one letter, and a video is cut as the model wants it."""

    def __init__(self) -> None:
        self.tokenizer = self._Letters()
        self.seen: list[dict[str, Any]] = []

    class _Letters:
        eos_token = "!"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 80 for letter in text]}

    def apply_chat_template(self, asked: list[Any], tokenize: bool, add_generation_prompt: bool = False) -> str:
        text = "".join(f"[{m['role']}]" + "".join(c.get("text", "V") for c in m["content"]) + "\n" for m in asked)
        if asked[-1]["role"] == "assistant":
            return text[:-1].replace("[assistant]", "[assistant]") + "!\n"
        return text + "[assistant]" if add_generation_prompt else text

    def __call__(self, text: list[str], videos: list[Tensor], return_tensors: str, **given: Any) -> dict[str, Tensor]:
        self.seen.append({"text": text[0], "frames": videos[0], **given})
        frames, _, height, width = videos[0].shape
        grid = torch.tensor([[frames // 2, height // 4, width // 4]])
        before, after = text[0].split("V")
        patches = int(grid.prod())
        middle = [BEGIN, *[VIDEO] * (patches // MERGE**2), END]
        ids = torch.tensor([[*self.tokenizer(before)["input_ids"], *middle, *self.tokenizer(after)["input_ids"]]])
        pixels = videos[0].float().flatten()[: patches * PIXELS].view(patches, PIXELS) / 255
        types = (ids == VIDEO).int() * 2
        return {"input_ids": ids, "mm_token_type_ids": types, "pixel_values_videos": pixels, "video_grid_thw": grid}


def test_an_answer_stands_behind_the_prompt_with_what_closes_it() -> None:
    stub = Stub()
    frames = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    sample = process(stub, frames, "what?", "a cat", fps=2.0)
    wanted = stub.tokenizer("a cat!")["input_ids"]
    assert sample["labels"][-6:].tolist() == sample["input_ids"][-6:].tolist() == wanted
    assert (sample["labels"][:-6] == NO_LABEL).all()
    assert stub.seen[0]["text"] == "[user]Vwhat?\n[assistant]"
    assert stub.seen[0]["do_sample_frames"] is False
    assert stub.seen[0]["video_metadata"] == [{"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}]


def test_questions_of_a_list_are_processed(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    lines = []
    for number in range(3):
        folder = tmp_path / f"clip{number}"
        folder.mkdir()
        for frame in range(5):
            image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{frame}.png")
        # A separator of lines inside of a text ends no line of the file.
        row = {"video": f"clip{number}", "question": "where\u2028is it", "answer": "left"}
        lines.append(json.dumps(row, ensure_ascii=False))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    tiny_qwen("qwen2_vl").save_pretrained(tmp_path / "model")
    data = {"source": str(tmp_path / "questions.jsonl"), "frames": 4, "height": 16, "width": 24}
    settings = {**settings_of(("qwen2_vl", tmp_path / "model", tmp_path)), "data": data, "evaluation_samples": 1}
    stub = Stub()
    task = made(tmp_path, settings, stub)
    batch = task.batch(0, [0, 1])
    assert stub.seen[-1]["frames"].shape == (4, 3, 16, 24) and stub.seen[-1]["frames"].dtype == torch.uint8
    assert task.weight(batch) == 2 * len("left!")
    task.loss(batch).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in task.trained().values())
    task.close()


# ---------------------------------------------------------------------- what is refused


def broken(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    sample = sample_of("qwen2_vl", 0)
    change(sample)
    return sample


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no answer": (lambda s: s["labels"].fill_(NO_LABEL), "`labels` must be the ids of the answer"),
    "other labels": (lambda s: s["labels"].__setitem__(-1, 7), "`labels` must be the ids of the answer"),
    "grid": (lambda s: s.update(video_grid_thw=torch.tensor([4, 6, 10])), r"`video_grid_thw` must be \[videos, 3\]"),
    "patches": (lambda s: s.update(pixel_values_videos=torch.zeros(3, PIXELS)), "must have 240 patches .* got 3"),
    "ids": (lambda s: s["input_ids"].__setitem__(0, VIDEO), "`input_ids` must tell of 60 tokens of video, got 61"),
    "types": (lambda s: s["mm_token_type_ids"].zero_(), "`mm_token_type_ids` must tell of 60 .* got 0"),
    "seconds": (lambda s: s.update(second_per_grid_ts=torch.ones(2)), r"`second_per_grid_ts` must be .* got \[2\] in"),
    "lengths": (lambda s: s.update(labels=s["labels"][1:]), r"`labels` must be whole numbers \[tokens\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prepared_sample_is_refused(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    tiny_qwen("qwen2_vl").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_sample(tmp_path / "data" / "0.safetensors", broken(change))
    with pytest.raises(ValueError, match=message):
        made(tmp_path, settings_of(("qwen2_vl", tmp_path / "model", tmp_path / "data")))


def test_a_file_that_is_no_sample_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"input_ids": torch.zeros(3)}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="has no mm_token_type_ids"):
        read_sample(tmp_path / "0.safetensors")
    (tmp_path / "1.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="`source` must hold prepared samples, got"):
        read_sample(tmp_path / "1.safetensors")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"evaluation_samples": 5}, "`evaluation_samples` must be less than the 5 questions, got 5"),
    "no lora": ({"lora": None}, "`lora` must be given, got none"),
    "no list": ({"data": {"source": "nowhere.jsonl"}}, "must be a .jsonl file that is there, got nowhere.jsonl"),
    "empty folder": ({"data": {"source": "."}}, "must hold prepared samples"),
    "frames": ({"data": {"source": "x", "frames": 0}}, "`frames` must be at least 1, got 0"),
    "bidirectional method": ({"sparse": {"method": "radial"}}, "radial"),
    "no module": ({"lora": {"targets": [r".*decoder\.q_proj"]}}, "`targets` must match a module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REFUSED[name]
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    tiny_qwen("qwen2_vl").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for number in range(5):
        write_sample(tmp_path / "data" / f"{number}.safetensors", sample_of("qwen2_vl", number))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        made(tmp_path, {**settings_of(("qwen2_vl", tmp_path / "model", tmp_path / "data")), **changes})


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from tests.support.tiny_lm import FAMILIES

    FAMILIES["llama"]("sdpa").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_sample(tmp_path / "data" / "0.safetensors", sample_of("qwen2_vl", 0))
    with pytest.raises(ValueError, match=r"`model` must be of the kinds qwen2_vl, .*, got llama"):
        made(tmp_path, settings_of(("llama", tmp_path / "model", tmp_path / "data")))
