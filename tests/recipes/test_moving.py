"""Moving scenes, the check of their motion, the recipe and the shipped video model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.recipe import Run, read_recipe
from hf_sparse_attn.recipes.reports import moving_wan_report
from hf_sparse_attn.recipes.shipped import moving_wan
from hf_sparse_attn.recipes.shipped.moving_wan_muon import Muon, _orthogonal
from hf_sparse_attn.shipped import moving
from hf_sparse_attn.shipped.moving import check_motion
from hf_sparse_attn.shipped.moving_scenes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SceneClass,
    draw_classes,
    moving_clips,
    scene_classes,
)
from hf_sparse_attn.training.loop import train

YAML = Path(__file__).parents[2] / "recipes" / "shipped" / "moving_wan.yaml"
SOME = SceneClass("disc", "red", "down-right")


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return moving.load_moving_wan()


def stage(frames: int, height: int, width: int, steps: int = 1, clips: int = 4) -> moving_wan.StageConfig:
    return moving_wan.StageConfig(steps, clips, frames, height, width, shift=3.0, spread=1.0, rate=1.0, motion=True)


def turned(scene: SceneClass, eighths: int) -> SceneClass:
    return replace(scene, direction=DIRECTIONS[(DIRECTIONS.index(scene.direction) + eighths) % 8])


def test_scenes_follow_the_seed() -> None:
    classes = draw_classes(5, seed=3)
    assert classes == draw_classes(5, seed=3) != draw_classes(5, seed=4)
    clips = moving_clips(classes, 5, 14, 18, seed=3)
    assert clips.shape == (5, 5, 3, 14, 18) and clips.dtype == torch.float32
    assert 0 <= float(clips.min()) and float(clips.max()) <= 1
    assert torch.equal(clips, moving_clips(classes, 5, 14, 18, seed=3))
    assert not torch.equal(clips, moving_clips(classes, 5, 14, 18, seed=4))


def test_drawn_classes_are_even() -> None:
    drawn = draw_classes(24, seed=0)
    for kind, known in (("shape", SHAPES), ("colour", COLOURS), ("direction", DIRECTIONS)):
        counts = [sum(getattr(scene, kind) == word for scene in drawn) for word in known]
        assert counts == [24 // len(known)] * len(known)


def test_velocity_is_the_direction() -> None:
    assert SceneClass("disc", "red", "right").velocity == (0.0, 1.5)
    down, right = SceneClass("disc", "red", "up-left").velocity
    assert down == pytest.approx(right) and down == pytest.approx(-1.5 / 2**0.5)


@pytest.mark.parametrize("frames, height, width", [(6, 16, 16), (12, 24, 24), (9, 19, 26)], ids=str)
def test_true_clips_are_right(frames: int, height: int, width: int) -> None:
    classes = scene_classes()
    for clip, scene in zip(moving_clips(classes, frames, height, width, seed=7), classes, strict=True):
        seen = check_motion(clip, scene)
        # The threshold on the colour hides some of the soft edge, by a different part in every frame.
        assert seen.right and seen.error < 0.3 and seen.flicker == 0
        assert (seen.colour, seen.shape) == (scene.colour, scene.shape)
        assert seen.velocity == pytest.approx(scene.velocity, abs=0.15)


def test_other_directions_are_wrong() -> None:
    classes = scene_classes()[::5]
    for clip, scene in zip(moving_clips(classes, 12, 24, 24, seed=1), classes, strict=True):
        for eighths in range(1, 8):
            seen = check_motion(clip, turned(scene, eighths))
            # 12 frames of 1.5 pixels spread by 5.2 about their middle; an eighth turn takes off 2 sin(22.5 degrees).
            assert not seen.right and seen.error > 3.5


def spoilt(clip: torch.Tensor, how: str) -> torch.Tensor:
    if how == "shuffled":
        return clip[torch.tensor([0, 3, 2, 1, 4, 7, 6, 5, 8, 11, 10, 9])]
    if how == "reversed":
        return clip.flip(0)
    if how == "standing":
        return clip[:1].expand_as(clip)
    if how == "vanishing":
        return torch.cat([clip[:6], clip[:6].mean(1, keepdim=True).expand(6, 3, 24, 24)])
    if how == "fading":
        grey = clip.mean(1, keepdim=True)
        return torch.cat([clip[:6], (grey + 0.42 * (clip - grey))[6:]])
    return clip.flip(1)


@pytest.mark.parametrize("how", ["shuffled", "reversed", "standing", "vanishing", "fading", "recoloured"])
def test_spoilt_clips_are_wrong(how: str) -> None:
    clip = moving_clips([SOME], 12, 24, 24, seed=2)[0]
    assert check_motion(clip, SOME).right
    seen = check_motion(spoilt(clip, how), SOME)
    assert not seen.right
    if how == "vanishing":
        assert seen.error == float("inf")
    if how == "recoloured":
        assert seen.colour == "blue"


def test_flicker_is_that_of_the_background() -> None:
    clip = moving_clips([SOME], 12, 24, 24, seed=2)[0]
    noise = torch.randn(12, 1, 24, 24) * 0.05
    # The mean absolute difference of two normal draws is 2 / sqrt(pi) of their deviation.
    assert check_motion((clip + noise).clamp(0, 1), SOME).flicker == pytest.approx(0.05 * 1.128, rel=0.1)


def test_conditions_are_unit_vectors() -> None:
    tokens = moving.condition([*scene_classes(), None])
    assert tokens.shape == (97, moving.TEXT_TOKENS, moving.TEXT_DIM)
    assert tokens[-1].abs().sum() == 0
    assert len(torch.unique(tokens.flatten(1), dim=0)) == 97
    assert torch.equal(tokens[:-1].square().sum(-1), torch.ones(96, 3))


def test_the_model_sees_frames_it_can_give_back() -> None:
    clips = moving_clips([SOME, turned(SOME, 3)], 5, 14, 18, seed=0)
    latents = moving.to_model(clips)
    assert latents.shape == (2, 3, 5, 14, 18) and abs(float(latents.mean())) < 0.5
    torch.testing.assert_close(moving.from_model(latents), clips)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SceneClass("star", "red", "up"), "`shape` must be one of .*'star'"),
        (lambda: SceneClass("disc", "pink", "up"), "`colour` must be one of .*'pink'"),
        (lambda: SceneClass("disc", "red", "north"), "`direction` must be one of .*'north'"),
        (lambda: moving_clips([SOME], 12, 24, 23, seed=0), "`width` must be at least 24 pixels for 12 frames, got 23"),
        (lambda: moving_clips([SOME], 0, 24, 24, seed=0), "`frames` must be at least 1, got 0"),
        (lambda: check_motion(torch.zeros(1, 3, 8, 8), SOME), "`clip` must be .*at least 2 frames"),
        (lambda: check_motion(torch.zeros(3, 4, 8, 8), SOME), "`clip` must be"),
        (lambda: moving.sample(None, []), "`classes` must not be empty"),
        (lambda: moving.sample(None, [SOME], steps=0), "`steps` at least 1"),
        (lambda: stage(6, 15, 16), "`height` must be even and at least 15.*got 15"),
        (lambda: stage(6, 16, 14), "`width` must be even and at least 15.*got 14"),
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3))], 0.1, 0.0), "`params` must be matrices"),
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3, 2))], 0.1, 0.0).step(lambda: 0.0), "`closure` must be None"),
    ],
    ids=[
        "shape", "colour", "direction", "small", "frames", "one-frame", "channels", "no-class", "no-step", "odd-stage",
        "small-stage", "vector", "closure",
    ],
)  # fmt: skip
def test_bad_values_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_muon_updates_are_orthogonal() -> None:
    for rows, columns in [(24, 24), (8, 40), (33, 7)]:
        left, right = (torch.linalg.qr(torch.randn(size, size))[0] for size in (rows, columns))
        values = torch.linspace(0.2, 1.0, min(rows, columns))
        matrix = left[:, : len(values)] * values @ right[: len(values)]
        # The quintic ends between 0.68 and 1.13 for every singular value that does not start near zero.
        found = torch.linalg.svdvals(_orthogonal(matrix[None]))
        assert 0.6 < float(found.min()) and float(found.max()) < 1.2


def test_the_channels_of_the_motion_follow_the_sprite() -> None:
    told = moving.with_motion(torch.zeros(2, 3, 5, 10, 13), [SceneClass("disc", "red", "right"), None])
    assert told.shape == (2, 6, 5, 10, 13) and not told[:, :3].any() and not told[1].any()
    ones, rows, columns = told[0, 3:]
    assert bool((ones == 1).all())
    # Nothing moves down; the column nearest to the line goes 1.5 pixels to the right in each frame.
    assert torch.equal(rows, rows[:1, :, :1].expand_as(rows))
    nearest = columns[:, 0].argmax(-1)
    assert nearest.tolist() == [3, 4, 6, 7, 9] or nearest.tolist() == [3, 5, 6, 8, 9]
    assert float(columns[2, 0, 6]) == 1.0 and float(columns[2, 0, 10]) == pytest.approx(math.exp(-1))
    across = moving.with_motion(torch.zeros(1, 3, 5, 10, 10), [SceneClass("disc", "red", "right")])
    down = moving.with_motion(torch.zeros(1, 3, 5, 10, 10), [SceneClass("disc", "red", "down")])
    torch.testing.assert_close(down[0, 4].mT, across[0, 5])
    torch.testing.assert_close(down[0, 5].mT, across[0, 4])
    with pytest.raises(ValueError, match="`classes` must be one for each of 2 clips, got 1"):
        moving.with_motion(torch.zeros(2, 3, 5, 10, 13), [None])


def recipe(*overrides: str) -> moving_wan.MovingWan:
    made = read_recipe("moving_wan", overrides)
    assert isinstance(made, moving_wan.MovingWan)
    return made


def tiny(steps: int, **flow: float) -> moving_wan.MovingWan:
    config = recipe()
    shape = replace(config.model, num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=48)
    return replace(
        config,
        model=shape,
        optimizer=replace(config.optimizer, warmup_steps=3),
        flow=replace(config.flow, **flow),
        stages=(stage(3, 10, 12, steps),),
    )


def test_training_lowers_the_error(tmp_path: Path) -> None:
    figures = train(tiny(25), tmp_path, progress=False)
    assert figures["after"]["velocity error"] < 0.8 * figures["before"]["velocity error"]


def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(6), tmp_path / "whole", progress=False)
    real = moving_wan.MovingWanTask.begin_step

    def stopped(self: moving_wan.MovingWanTask, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt
        real(self, step)

    every = replace(tiny(6), save_every=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(moving_wan.MovingWanTask, "begin_step", stopped)
        train(every, tmp_path / "parts", progress=False)
    train(every, tmp_path / "parts", resume=True, progress=False)
    # What is kept is the moving average, which a resumed run must have taken up as well.
    whole, parts = (moving.load_moving_wan(tmp_path / name / "result").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_some_clips_of_a_step_are_those_of_the_whole() -> None:
    task = moving_wan.MovingWanTask(tiny(2), Run(Path("."), torch.device("cpu")))
    whole, part = task.batch(1, range(4)), task.batch(1, [3, 1])
    assert torch.equal(part.given, whole.given[[3, 1]]) and torch.equal(part.velocity, whole.velocity[[3, 1]])
    assert (task.weight(whole), task.weight(part)) == (4, 2)


def test_a_batch_is_what_flow_matching_asks_for() -> None:
    small, many = replace(stage(3, 10, 12, clips=2), motion=False), stage(3, 10, 12, clips=64)
    config = replace(tiny(2), stages=(small, many))
    first, second = moving_wan.training_batch(config, 0), moving_wan.training_batch(config, 1)
    assert first.given.shape == (2, 6, 3, 10, 12) and second.given.shape == (64, 6, 3, 10, 12)
    assert torch.equal(first.given, moving_wan.training_batch(config, 0).given)
    assert not first.given[:, 3:].any() and first.condition.any()
    # The channels of the motion and the tokens go together.
    assert torch.equal(second.given[:, 3].flatten(1).all(1), second.condition.flatten(1).any(1))
    clips = second.given[:, :3] - second.level[:, None, None, None, None] * second.velocity
    torch.testing.assert_close(moving.to_model(moving.from_model(clips)), clips, rtol=0, atol=1e-4)
    # The middle of a logit-normal level with shift 3 is 3 / 4; 64 even shares of it lie close.
    assert float(second.level.median()) == pytest.approx(0.75, abs=0.02)
    dropped = (second.condition == 0).flatten(1).all(1).sum()
    assert 0 < int(dropped) < 20
    with pytest.raises(ValueError, match="`step` must be less than 2, got 2"):
        config.stage_at(2)


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        ("seed: 0", "seeds: 0", ValueError, "seeds"),
        ("seed: 0", "seed: zero", TypeError, "seed"),
        ("  ffn_dim: 256\n", "", ValueError, "ffn_dim"),
        ("frames: 6", "frames: 60", ValueError, "height"),
        ("clips: 8", "clips: 0", ValueError, "`clips` must be at least 1, got 0"),
        ("rate: 1.0", "rate: -1", ValueError, "`rate` must be more than 0, got -1"),
    ],
    ids=["unknown", "type", "missing", "long", "clips", "rate"],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, old: str, new: str, error: type[Exception], message: str) -> None:
    text = YAML.read_text()
    assert old in text
    (tmp_path / "bad.yaml").write_text(text.replace(old, new))
    with pytest.raises(error, match=message):
        read_recipe(tmp_path / "bad.yaml")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the shipped model must be at"):
        moving.load_moving_wan(tmp_path)


def test_the_recipe_builds_the_shipped_architecture(model: Any) -> None:
    built = moving_wan.build_model(recipe())
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in built.state_dict().items()} == want
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_the_shipped_model_moves_what_it_is_told(model: Any) -> None:
    scene = SceneClass("disc", "yellow", "up-left")
    clip = moving.sample(model, [scene], seed=0)[0]
    seen = check_motion(clip, scene)
    assert seen.right and seen.shape == "disc" and seen.flicker < 0.02
    for eighths in range(1, 8):
        assert not check_motion(clip, turned(scene, eighths)).right


def test_without_attention_between_frames_the_background_flickers(model: Any) -> None:
    """A window of a frame's tokens about each query: the frames hardly know of one another."""
    scene = SceneClass("disc", "yellow", "up-left")
    with hsa.patch(model, "sliding_window", window=144, sink=0, block_size=16, min_tokens=0):
        clip = moving.sample(model, [scene], steps=4, seed=0)[0]
    assert check_motion(clip, scene).flicker > 0.1


def test_a_clip_follows_its_own_seed_whatever_the_batch(model: Any) -> None:
    settings = {"frames": 3, "height": 12, "width": 12, "steps": 2}
    two = moving.sample(model, [SOME, turned(SOME, 2)], seed=5, **settings)
    torch.testing.assert_close(two[1:], moving.sample(model, [turned(SOME, 2)], seed=6, **settings))
    assert not torch.equal(two[1:], moving.sample(model, [turned(SOME, 2)], seed=5, **settings))


def test_guidance_runs_both_branches_and_callbacks_see_frames(model: Any) -> None:
    settings = {"frames": 3, "height": 12, "width": 12, "steps": 3}
    seen: list[tuple[int, torch.Tensor]] = []
    plain = moving.sample(model, [SOME], callback=lambda step, clip: seen.append((step, clip)), **settings)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], plain) and not torch.equal(seen[0][1], plain)
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *given: calls.append(1))
    guided = moving.sample(model, [SOME], guidance=2.0, **settings)
    hook.remove()
    assert len(calls) == 6 and not torch.equal(guided, plain)


@pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["plain", "guided"])
def test_a_patched_model_learns_the_steps(model: Any, guidance: float) -> None:
    settings = {"frames": 4, "height": 12, "width": 12, "steps": 4, "guidance": guidance}
    dense = moving.sample(model, [SOME], **settings)
    with hsa.patch(model, "sliding_window", window=16, block_size=16, min_tokens=0, dense_steps=0.5) as patch:
        half = moving.sample(model, [SOME], **settings)
        report = patch.report()
    assert not torch.equal(half, dense)
    assert 0 < report.density < 1
    assert torch.equal(moving.sample(model, [SOME], **settings), dense)


def test_a_contact_sheet_holds_every_frame() -> None:
    clips = moving_clips([SOME, turned(SOME, 4)], 3, 14, 12, seed=0)
    image = moving.frames_to_image(clips, scale=2)
    assert image.size == (3 * 13 * 2, 2 * 15 * 2)
    assert image.getpixel((25, 0)) == (255, 255, 255)
    assert image.getpixel((26, 0)) == tuple((clips[0, 1, :, 0, 0] * 255).round().int().tolist())


def test_the_report_measures_heads_and_motion(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving_wan_report, "_FRAMES", 4)
    monkeypatch.setattr(moving_wan_report, "_SIDE", 12)
    text = moving_wan_report.report(model, 2, 0, [(2, 1.0)], tmp_path / "sheet.png")
    assert text.count("\n| ") == 4 + 16 and (tmp_path / "sheet.png").exists()
    heads = moving_wan_report.head_table(model, 1, 0, steps=2)
    places = [(row["layer"], row["head"]) for row in heads]
    assert places == [(str(layer), str(head)) for layer in range(4) for head in range(4)]
    shares = ("own frame", "own place", "near", "keys for 0.9")
    assert all(0 < float(row[title]) < 1 for row in heads for title in shares)
    assert {"temporal"} < {row["kind"] for row in heads}


@pytest.mark.parametrize(
    "shares, kind",
    [((0.9, 0.6, 0.1, 0.1), "temporal"), ((0.6, 0.1, 0.6, 0.1), "spatial"), ((0.4, 0.4, 0.6, 0.1), "local"),
     ((0.1, 0.1, 0.1, 0.8), "global"), ((0.1, 0.1, 0.1, 0.3), "spread")],
    ids=["temporal", "spatial", "local", "global", "spread"],
)  # fmt: skip
def test_heads_are_named(shares: tuple[float, ...], kind: str) -> None:
    assert moving_wan_report.kind_of(*shares) == kind
