"""The recipes for longer videos: what is trained, what a model is given, and what is refused before the first step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_sparse_attn.recipe import OptimizerSettings, Run, SparseSettings, read_recipe
from hf_sparse_attn.recipes import video_models
from hf_sparse_attn.recipes.hunyuan_long_video import HunyuanLongVideo
from hf_sparse_attn.recipes.reports import page, wan_long_video_report
from hf_sparse_attn.recipes.wan_long_video import WanLongVideo
from hf_sparse_attn.settings import plain
from hf_sparse_attn.shipped import moving
from hf_sparse_attn.shipped.moving import check_motion, with_motion
from hf_sparse_attn.shipped.moving_scenes import DIRECTIONS, SceneClass, moving_clips, scene_classes, travelled
from hf_sparse_attn.training.flow_matching import noise_levels, sample_seed
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.video import material as video_material
from hf_sparse_attn.training.video.data import VideoSettings
from hf_sparse_attn.training.video.latents import LatentSample
from hf_sparse_attn.training.video.material import HELD_OUT, FlowSettings, draw_batch, load_pipeline
from hf_sparse_attn.training.video.scenes import SceneSettings
from hf_sparse_attn.training.video.task import VideoTask
from hf_sparse_attn.training.video.vae import encode_first_frame, encode_video
from tests.support import tiny_hunyuan, tiny_wan
from tests.support.latents import write_latents

pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = SceneClass("cross", "blue", "down-left")
SCENES = SceneSettings(frames=4, height=12, width=12, turn=3, clips=0)
# Height and width of latents of 3 frames, with tokens of 1 x 2 x 2: 90 of video, and 18 as `generate` has them.
SIZE, SMALL = (12, 10), (4, 6)
COMMON: dict[str, Any] = {"steps": 4, "batch": 4, "held_out": 2, "optimizer": OptimizerSettings(learning_rate=1e-2)}
WINDOW = SparseSettings(method="sliding_window", params={"window": 8, "sink": 0, "block_size": 16}, min_tokens=0)
WAN_LORA = LoraSettings(targets=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), rank=4)
HUNYUAN_LORA = LoraSettings(targets=(r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",), rank=4)
NO_DROP = FlowSettings(drop=0.0)


def scenes_recipe(**given: Any) -> WanLongVideo:
    return WanLongVideo(
        **{**COMMON, "model": "moving_wan", "scenes": SCENES, "lora": WAN_LORA, "sparse": WINDOW, **given}
    )


def videos(folder: Path, family: str, size: tuple[int, int]) -> VideoSettings:
    """Five latents with the conditions of a family, in a folder."""

    def sample(number: int) -> LatentSample:
        draw = torch.Generator().manual_seed(number)
        if family == "wan":
            return LatentSample(
                torch.randn(16, 3, *size, generator=draw),
                {"prompt_embeds": torch.randn(9, 32, generator=draw)},
            )
        return LatentSample(
            torch.randn(4, 3, *size, generator=draw),
            {
                "prompt_embeds": torch.randn(11, tiny_hunyuan.TEXT, generator=draw),
                "prompt_attention_mask": (torch.arange(11) < 3 + number).long(),
                "pooled_prompt_embeds": torch.randn(8, generator=draw),
            },
        )

    source = folder / f"{family}-{size[0]}"
    write_latents(source, [sample(number) for number in range(5)])
    return VideoSettings(source=str(source), frames=9, height=8 * size[0], width=8 * size[1])


def serve(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[], Any]) -> None:
    """Has the recipes find a pipeline under a name."""
    load = video_models.load_pipeline
    monkeypatch.setattr(video_models, "load_pipeline", lambda model, *a: build() if model == name else load(model, *a))


@pytest.fixture
def wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., WanLongVideo]:
    """A recipe for a tiny Wan pipeline; `kind` as in tiny_wan.pipeline."""

    def recipe(kind: str = "t2v", size: tuple[int, int] = SIZE, **given: Any) -> WanLongVideo:
        serve(monkeypatch, "tiny", lambda: tiny_wan.pipeline(kind))
        made = {
            "model": "tiny",
            "videos": videos(tmp_path, "wan", size),
            "lora": WAN_LORA,
            "sparse": WINDOW,
            "flow": NO_DROP,
        }
        return WanLongVideo(**{**COMMON, **made, **given})

    return recipe


@pytest.fixture
def hunyuan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HunyuanLongVideo]:
    """A recipe for a tiny HunyuanVideo pipeline."""

    def recipe(kind: str = "t2v", size: tuple[int, int] = SIZE, **given: Any) -> HunyuanLongVideo:
        serve(monkeypatch, "tiny-hunyuan", lambda: tiny_hunyuan.pipeline(kind))
        made = {
            "model": "tiny-hunyuan",
            "videos": videos(tmp_path, "hunyuan", size),
            "lora": HUNYUAN_LORA,
            "sparse": WINDOW,
            "flow": NO_DROP,
        }
        return HunyuanLongVideo(**{**COMMON, **made, **given})

    return recipe


@pytest.fixture(params=["moving_wan", "wan", "hunyuan"])
def any_recipe(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return scenes_recipe if request.param == "moving_wan" else request.getfixturevalue(request.param)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(output=tmp_path, device=torch.device("cpu"))


def calls_of(model: Any) -> list[dict[str, Any]]:
    """A list that gets the keyword arguments of every call."""
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    return calls


def gradients(task: VideoTask, parts: list[list[int]]) -> tuple[float, dict[str, Tensor]]:
    """Loss of step 1 and its gradients, over some micro-batches."""
    task.model.zero_grad()
    total = 0.0
    for samples in parts:
        loss = task.loss(task.batch(1, samples))
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in task.trained().items()}


# ---------------------------------------------------------------------- what is trained


def test_only_the_adapter_changes(any_recipe: Callable[..., Any], run: Run) -> None:
    task = any_recipe().task(run)
    with closing(task):
        before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        optimizer = task.optimizers()[0]
        for step in range(2):
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(task.batch(step, range(4))) / 4)
            optimizer.step()
        changed = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(task.trained()) == {name for name in before if ".lora_" in name}
    assert not any(".lora_" in name for name, _ in task.model.named_parameters())


def test_which_modules_get_an_adapter(wan: Any, hunyuan: Any, run: Run) -> None:
    found = {}
    for family, recipe in (("wan", wan()), ("hunyuan", hunyuan())):
        with closing(recipe.task(run)) as task:
            found[family] = sorted({name.split(".lora_")[0] for name in task.trained()})
    four = ("to_k", "to_out.0", "to_q", "to_v")
    assert found["wan"] == [f"blocks.{block}.attn1.{end}" for block in (0, 1) for end in four]
    # The blocks of one stream have no output projection of attention's own.
    single = [f"single_transformer_blocks.0.attn.{end}" for end in ("to_k", "to_q", "to_v")]
    assert found["hunyuan"] == single + [f"transformer_blocks.0.attn.{end}" for end in four]


@pytest.mark.parametrize("dense_steps", [None, 0.04], ids=["no dense steps", "dense steps"])
def test_checkpointing_changes_nothing(any_recipe: Callable[..., Any], run: Run, dense_steps: float | None) -> None:
    sparse = replace(WINDOW, dense_steps=dense_steps)
    found = []
    for on in (False, True):
        with closing(any_recipe(sparse=sparse, gradient_checkpointing=on).task(run)) as task:
            for p in task.trained().values():
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
            task.model.train()
            found.append(gradients(task, [[0, 1]]))
            # Recomputed calls are counted as well; none of them may be dense.
            assert task.patch is not None and task.patch.report().density < 0.9
    (plain, without), (saved, with_) = found
    # The same operations twice; a sum over threads or an instruction set may differ in its last bit.
    assert saved == pytest.approx(plain, rel=1e-6)
    for name, gradient in without.items():
        torch.testing.assert_close(with_[name], gradient, rtol=1e-5, atol=1e-7 + 1e-5 * float(gradient.abs().max()))


def test_micro_batches_are_the_whole(any_recipe: Callable[..., Any], run: Run) -> None:
    with closing(any_recipe().task(run)) as task:
        for p in task.trained().values():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        whole, expected = gradients(task, [[0, 1, 2, 3]])
        parts, found = gradients(task, [[2], [0, 3], [1]])
        assert parts == pytest.approx(whole, rel=1e-5)
        assert task.weight(task.batch(0, [0, 1, 2])) == 3
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_attention_is_sparse_at_every_level_while_trained(any_recipe: Callable[..., Any], run: Run) -> None:
    with closing(any_recipe(sparse=replace(WINDOW, dense_steps=(0.3, 0.3))).task(run)) as task:
        task.loss(task.batch(0, [0]))
        assert "dense_steps" not in str(task.patch.report())
    with pytest.raises(ValueError, match=r"`sparse.dense_steps` must leave some steps sparse"):
        any_recipe(sparse=replace(WINDOW, dense_steps=(0.5, 0.5))).task(run)


def test_without_sparse_settings_attention_is_the_models_own(any_recipe: Callable[..., Any], run: Run) -> None:
    with closing(any_recipe(sparse=None).task(run)) as task:
        assert task.patch is None and math.isfinite(float(task.loss(task.batch(0, [0])).detach()))
        assert "density" not in task.evaluate()


# ---------------------------------------------------------------------- what a model is given


def test_conditions_are_dropped_by_the_samples_seed(run: Run) -> None:
    with closing(scenes_recipe(batch=40, flow=FlowSettings(drop=0.3)).task(run)) as task:
        told = task.batch(2, range(40)).given["encoder_hidden_states"]
        kept = told.flatten(1).any(1)
        # 40 draws of 0.3: 12 with a standard deviation of 2.9.
        assert 3 <= int((~kept).sum()) <= 21
        assert torch.equal(task.batch(2, range(40)).given["encoder_hidden_states"], told)
        assert torch.equal(task.batch(2, [7, 3]).given["encoder_hidden_states"], told[[7, 3]])
        motion = task.batch(2, range(40)).given["hidden_states"][:, 3:].flatten(1).any(1)
        assert torch.equal(motion, kept)
        assert not torch.equal(task.batch(3, range(40)).given["encoder_hidden_states"].flatten(1).any(1), kept)
    with closing(scenes_recipe(batch=40, flow=FlowSettings(drop=0.0)).task(run)) as task:
        assert task.batch(2, range(40)).given["encoder_hidden_states"].flatten(1).any(1).all()


def test_scenes_are_given_as_the_sampler_gives_them(run: Run) -> None:
    with closing(scenes_recipe(flow=NO_DROP).task(run)) as task:
        batch = task.batch(0, [1])
        given, told = batch.given, batch.given["encoder_hidden_states"][0]
        scene = next(s for s in scene_classes() if torch.equal(moving.condition([s])[0], told))
        assert torch.equal(given["hidden_states"], with_motion(given["hidden_states"][:, :3], [scene], SCENES.turn))
        level = given["timestep"][0] / 1000
        # Noisy latents less the velocity's share are the clip.
        clip = moving.from_model(given["hidden_states"][:, :3] - level * batch.velocity)[0]
        assert check_motion(clip, scene, SCENES.turn).right


def test_wan_is_given_what_its_pipeline_gives(wan: Any, run: Run) -> None:
    for kind in ("t2v", "ti2v"):
        pipe = tiny_wan.pipeline(kind)
        calls = calls_of(pipe.transformer)
        tiny_wan.generate(pipe)
        with closing(wan(kind, SMALL).task(run)) as task:
            given = task.batch(0, [0]).given
        for name, value in given.items():
            assert value.shape == calls[0][name].shape and value.dtype == calls[0][name].dtype, name
        assert (given["timestep"] == given["timestep"].flatten()[0]).all() and 0 < given["timestep"].max() < 1000


IMAGES = {"i2v": {"expert": "high"}, "i2v_clip": {}, "ti2v_image": {}, "ti2v": {"image_to_video": True}}


def with_images(folder: Path, kind: str) -> VideoSettings:
    """Three latents with what the pipeline makes of an image; of that image in `tiny_wan.generate`."""
    pipe = tiny_wan.pipeline("ti2v_image" if kind == "ti2v" else kind)
    video = torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    video[:, 0] = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))[0] * 2 - 1
    made = []
    for number in range(3):
        told = {"prompt_embeds": torch.full((9, 32), float(number))}
        told |= encode_first_frame(pipe, video, torch.device("cpu"))
        made.append(LatentSample(encode_video(pipe.vae, video), told))
    write_latents(folder / "latents", made)
    return VideoSettings(source=str(folder / "latents"), frames=9, height=32, width=48)


@pytest.mark.parametrize("kind", IMAGES)
def test_wan_is_given_the_first_frame_as_its_pipeline_gives_it(kind: str, wan: Any, run: Run) -> None:
    pipe = tiny_wan.pipeline("ti2v_image" if kind == "ti2v" else kind)
    calls = calls_of(pipe.transformer)
    tiny_wan.generate(pipe)
    source = with_images(run.output, kind)
    with closing(wan(kind, videos=source, batch=6, held_out=1, **IMAGES[kind]).task(run)) as task:
        batch = task.batch(0, range(2))
        given, theirs = batch.given, {name: value for name, value in calls[0].items() if value is not None}
        assert set(given) == set(theirs) - {"attention_kwargs", "return_dict"}
        for name, value in given.items():
            assert value.shape[1:] == theirs[name].shape[1:] and value.dtype == theirs[name].dtype, name
        mine, other = given["hidden_states"][:1], theirs["hidden_states"]
        if kind.startswith("ti2v"):
            # The first latent frame is there without noise, at time 0, and not learned.
            assert torch.allclose(mine[:, :, 0], other[:, :, 0], atol=1e-5)
            assert torch.equal(given["timestep"][:1] == 0, theirs["timestep"] == 0)
            assert batch.velocity.shape[2] == mine.shape[2] - 1
        else:
            assert torch.equal(mine[:, 16:20], other[:, 16:20]) and mine[:, 16:20].unique().tolist() == [0, 1]
            assert torch.allclose(mine[:, 20:], other[:, 20:], atol=1e-5)
            assert batch.velocity.shape == mine[:, :16].repeat(2, 1, 1, 1, 1).shape
        if kind == "i2v_clip":
            wanted = theirs["encoder_hidden_states_image"]
            # The image went through 8 bits.
            assert torch.allclose(given["encoder_hidden_states_image"][:1], wanted, atol=0.05)
        torch.autograd.backward(task.loss(batch))


def test_the_given_frame_has_no_part_in_the_loss(wan: Any, run: Run) -> None:
    source = with_images(run.output, "ti2v_image")
    with closing(wan("ti2v_image", videos=source, held_out=1).task(run)) as task, torch.no_grad():
        batch = task.batch(0, [0])
        output = task.model(**batch.given, return_dict=False)[0]
        assert float(task.loss(batch)) == pytest.approx(float((output[:, :, 1:] - batch.velocity).square().mean()))


def test_the_image_stays_where_the_prompt_is_dropped(wan: Any, run: Run) -> None:
    source = with_images(run.output, "i2v_clip")
    with closing(wan("i2v_clip", videos=source, held_out=1, batch=20).task(run)) as task:
        task.material.nothing = {"prompt_embeds": torch.full((9, 32), 7.0)}
        given = draw_batch(task.material, range(20), FlowSettings(drop=0.5), 0, run.device).given
        dropped = (given["encoder_hidden_states"] == 7).flatten(1).all(1)
        assert 2 <= int(dropped.sum()) <= 18
        assert given["encoder_hidden_states_image"].flatten(1).any(1).all()
        assert torch.equal(given["hidden_states"][:, 20:], given["hidden_states"][:1, 20:].expand(20, -1, -1, -1, -1))


def test_hunyuan_is_given_what_its_pipeline_gives(hunyuan: Any, run: Run) -> None:
    pipe = tiny_hunyuan.pipeline()
    calls = calls_of(pipe.transformer)
    tiny_hunyuan.generate(pipe)
    with closing(hunyuan(size=SMALL, guidance=6.0).task(run)) as task:
        given = task.batch(0, [0, 1]).given
    for name, value in given.items():
        assert value.shape[1:] == calls[0][name].shape[1:] and value.dtype == calls[0][name].dtype, name
    assert set(given) == set(calls[0]) - {"attention_kwargs", "return_dict"}
    # The pipeline's default scale is 6.
    assert given["guidance"].tolist() == [6000.0, 6000.0] and calls[0]["guidance"].tolist() == [6000.0]


def test_experts_learn_at_their_own_levels(wan: Any, run: Run) -> None:
    for expert, name, low, high in (("high", "transformer", 700, 1000), ("low", "transformer_2", 0, 700)):
        recipe = wan("experts", expert=expert, batch=64)
        with closing(recipe.task(run)) as task:
            times = task.batch(0, range(64)).given["timestep"]
            assert low <= times.min() < times.max() <= high and times.std() > 30
            pipe = tiny_wan.pipeline("experts")
            mine, theirs = dict(task.model.named_parameters()), dict(getattr(pipe, name).named_parameters())
            assert torch.equal(mine["proj_out.weight"], theirs["proj_out.weight"])
            assert task.bundle_parts() == {"part": name}


def test_held_out_videos_are_not_trained_on(wan: Any, run: Run) -> None:
    with closing(wan(batch=12).task(run)) as task:
        material = task.material
        trained = {float(material.sample(number, 0).latents.sum()) for number in range(30)}
        held = {float(material.held_out(number, 0).latents.sum()) for number in range(2)}
        assert len(trained) == 3 and len(held) == 2 and not trained & held


# ---------------------------------------------------------------------- evaluation


def test_evaluation_of_scenes_keeps_its_clips(run: Run) -> None:
    scenes = SceneSettings(frames=4, height=12, width=12, turn=3, clips=2, sampling_steps=2, guidance=1.0)
    with closing(scenes_recipe(scenes=scenes, extend=2).task(run)) as task, torch.no_grad():
        first = task.evaluate()
        assert set(first) == {"flow_loss", "density", "right", "motion_error", "seen", "flicker"}
        assert 0 <= first["motion_error"] <= 6 and 0 < first["density"] < 1
        task.end_step(2)
        assert task.evaluate() == pytest.approx(first)
        state = task.state()
    clips = [load_file(run.output / f"clips-{step:05}.safetensors")["clips"] for step in (0, 3)]
    assert clips[0].shape == (2, 8, 3, 12, 12) and torch.equal(*clips)
    with closing(scenes_recipe().task(run)) as task:
        task.load_state(state)
        assert task.done == 3


# ---------------------------------------------------------------------- settings


def test_recipes_that_come_with_the_package_are_read() -> None:
    wan_, hunyuan_, small = (read_recipe(n) for n in ("wan_long_video", "hunyuan_long_video", "moving_wan_long"))
    assert isinstance(wan_, WanLongVideo) and isinstance(hunyuan_, HunyuanLongVideo)
    assert isinstance(small, WanLongVideo) and small.model == "moving_wan"
    assert wan_.long_videos().frames == 161 and hunyuan_.long_videos().frames == 257
    for recipe in (wan_, hunyuan_, small):
        assert recipe.lora.rank == 128 and recipe.sparse.method == "radial"
    four = read_recipe("wan_long_video", ["extend=4", "expert=low"])
    assert four.long_videos().frames == 321 and four.expert == "low"
    assert read_recipe("moving_wan_long", ["sparse=null", "scenes.clips=0"]).sparse is None


def test_hunyuans_pattern_names_its_joint_attention_alone() -> None:
    from hf_sparse_attn.training.lora.adapter import find_targets

    wanted = read_recipe("hunyuan_long_video").lora
    found = find_targets(tiny_hunyuan.transformer(), wanted)
    assert found == find_targets(tiny_hunyuan.transformer(), HUNYUAN_LORA) and len(found) == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scenes": None}, "`scenes` must say what model 'moving_wan' learns from"),
        ({"model": "tiny"}, "`videos` must say what model 'tiny' learns from"),
        ({"expert": "low"}, "`expert` must be none for model 'moving_wan'"),
        ({"extend": 0}, "`extend`"),
        ({"held_out": 0}, "`held_out`"),
        ({"lora": None}, "`lora` must say what is trained"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scenes_recipe(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"extend": 20}, "`extend` must give at most 64 frames, got 80"),
        ({"scenes": replace(SCENES, turn=None), "extend": 2}, "`height` must be even and at least 18 for 8 frames"),
        ({"scenes": replace(SCENES, width=13)}, "`width` must be even"),
    ],
    ids=["too long", "no room", "odd"],
)
def test_scenes_that_cannot_be_are_refused(given: dict[str, Any], words: str, run: Run) -> None:
    with pytest.raises(ValueError, match=words):
        scenes_recipe(**given).task(run)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FlowSettings(drop=1.0), "`drop` must be at least 0 and less than 1"),
        (lambda: FlowSettings(shift=0.0), "`shift` must be more than 0"),
        (lambda: SceneSettings(turn=1), "`turn`"),
        (lambda: SceneSettings(clips=-1), "`clips`"),
    ],
    ids=["drop", "shift", "turn", "clips"],
)
def test_parts_of_settings_are_checked(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("experts", {}, '`expert` must be "high" or "low" for Wan 2.2, got None'),
        ("t2v", {"expert": "high"}, "`expert` must be none for a model with one transformer, got 'high'"),
        ("low_only", {"expert": "high"}, "`expert` must be one that the pipeline asks"),
        ("t2v", {"flow": FlowSettings(drop=0.1)}, "`flow.drop` must be 0 where"),
        ("t2v", {"held_out": 5}, "`held_out` must leave some of the 5 videos"),
        ("t2v", {"extend": 2}, r"`source` must hold latents of \(5, 12, 10\)"),
        ("i2v", {"expert": "low"}, "`source` must hold `image_latents` of the first frames"),
        ("i2v", {"expert": "low", "image_to_video": False}, "`image_to_video` must be none, or true for a WanImageTo"),
        ("t2v", {"image_to_video": True}, "`image_to_video` must be none, or false for a WanPipeline, got true"),
        ("t2v", {"sparse": replace(WINDOW, method="block_topk", params={"blocks": 1})}, "blocks"),
    ],
    ids=[
        "no expert",
        "one transformer",
        "unused expert",
        "no text encoder",
        "all held out",
        "short",
        "no image",
        "no text alone",
        "no images",
        "method",
    ],
)
def test_pipelines_that_do_not_fit_are_refused(kind: str, given: Any, words: str, wan: Any, run: Run) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        wan(kind, **given).task(run)


def test_hunyuan_refuses_other_transformers(hunyuan: Any, run: Run) -> None:
    with pytest.raises(ValueError, match="`model` must be a pipeline with a HunyuanVideoTransformer3DModel"):
        hunyuan("1.5").task(run)
    with pytest.raises(ValueError, match="`guidance` must be 0 or more"):
        hunyuan(guidance=-1.0)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_of_a_saved_pipeline_is_loaded(expert: str, tmp_path: Path, run: Run) -> None:
    tiny_wan.pipeline("experts").save_pretrained(tmp_path / "pipe")
    source = videos(tmp_path, "wan", SIZE)
    recipe = WanLongVideo(**COMMON, model=str(tmp_path / "pipe"), videos=source, lora=WAN_LORA, flow=NO_DROP)
    loaded: list[Any] = []

    def load(model: str, dtype: Any) -> Any:
        # A folder without text encoders says so only by leaving them out.
        loaded.append(load_pipeline(model, dtype, text_encoder=None, tokenizer=None))
        return loaded[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(video_models, "load_pipeline", load)
        with closing(replace(recipe, expert=expert, dtype="bfloat16").task(run)) as task:
            pipe = loaded[0]
            assert task.model is (pipe.transformer if expert == "high" else pipe.transformer_2)
            assert task.model.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
            assert math.isfinite(float(task.loss(task.batch(0, [0])).detach()))


def test_the_shift_is_the_schedulers(wan: Any, hunyuan: Any, run: Run) -> None:
    for recipe, shift in ((wan(), 3.0), (hunyuan(), 7.0)):
        with closing(recipe.task(run)) as task:
            assert task.material.shift == shift
            seed = sample_seed(recipe.seed, 4)
            expected = float(noise_levels([seed], shift)[0]) * 1000
            assert float(task.batch(1, [0]).given["timestep"].flatten()[0]) == pytest.approx(expected)


def test_an_empty_prompt_stands_for_none(wan: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_wan.pipeline()
    pipe.text_encoder = torch.nn.Linear(1, 1)
    pipe.text_encoder.device = torch.device("cpu")
    asked: list[str] = []

    def encode(pipe: Any, caption: str, device: Any, tokens: int | None) -> dict[str, Tensor]:
        asked.append(caption)
        return {"prompt_embeds": torch.full((9, 32), 7.0)}

    recipe = wan(flow=FlowSettings(drop=0.5), batch=20)
    serve(monkeypatch, "tiny", lambda: pipe)
    monkeypatch.setattr(video_material, "encode_caption", encode)
    with closing(recipe.task(run)) as task:
        told = task.batch(0, range(20)).given["encoder_hidden_states"]
        empty = (told == 7.0).flatten(1).all(1)
        # 20 draws of a half: 10 with a standard deviation of 2.2.
        assert asked == [""] and 2 <= int(empty.sum()) <= 18
        assert not any((task.draw([HELD_OUT]).given["encoder_hidden_states"] == 7.0).flatten())


# ---------------------------------------------------------------------- report


def test_the_report_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = plain(read_recipe("moving_wan_long"))
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"recipe": "wan_long_video"}))
    assert page.recipe_of(WanLongVideo, tmp_path) == read_recipe("moving_wan_long")
    lengths, sampled = [], []
    for times in (2, 4):
        names = ("dense, not adapted", "radial, not adapted", "radial + LoRA", "dense + LoRA")
        row = {"flow_loss": 0.25, "right": 0.5, "motion_error": 1.0, "seen": 1.0, "flicker": 0.01, "psnr": 20.0}
        sampled.append({name: torch.rand(2, 12 * times, 3, 24, 24) for name in names})
        lengths.append(
            {
                "times": times,
                "clips": 2,
                "rows": {name: {**row, "psnr": None} if name == "dense + LoRA" else row for name in names},
                "steps": {
                    kind: {"density": 0.2, "processor_seconds": 1.5, "peak_memory": 1 << 30}
                    for kind in ("dense", "radial")
                },
                "dense": settings,
                "radial": settings,
            }
        )
    found = {"machine": {"device": "some"}, "lengths": lengths}

    def draw(file: Path) -> None:
        wan_long_video_report.contact_sheet(lengths, sampled, file)

    page.write(tmp_path / "page", "wan_long_video", wan_long_video_report.page(found), found, draw)
    text = (tmp_path / "page" / "wan_long_video.md").read_text()
    assert "4x, 48 frames" in text and "6912" in text and "1024" in text and "0.2500" in text
    assert json.loads((tmp_path / "page" / "wan_long_video.json").read_text()) == found
    assert (tmp_path / "page" / "wan_long_video.png").stat().st_size > 10_000


def test_the_report_evaluates_what_was_trained(run: Run) -> None:
    scenes = SceneSettings(frames=4, height=12, width=12, turn=3, clips=0, sampling_steps=1, guidance=1.0)
    recipe = scenes_recipe(scenes=scenes, extend=2)
    with closing(recipe.task(run)) as task:
        for p in task.trained().values():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        task.save(run.output / "result", {})
        with torch.no_grad():
            expected = task.held_out_loss()
    (run.output / "settings.json").write_text(json.dumps(plain(recipe) | {"recipe": "wan_long_video"}))
    found = {when: wan_long_video_report.evaluated(run.output, when, 1, 2) for when in ("before", "after")}
    losses = {when: figures["flow_loss"] for when, (figures, _) in found.items()}
    assert losses["after"] == pytest.approx(expected) and losses["before"] != pytest.approx(expected)
    assert found["before"][0]["density"] < 1 and found["after"][1].shape == (1, 8, 3, 12, 12)
    kept = run.output / "evaluation" / "after.safetensors"
    save_file({**load_file(kept), "flow_loss": torch.tensor(7.0)}, kept)
    assert wan_long_video_report.evaluated(run.output, "after", 1, 2)[0]["flow_loss"] == 7
    cost = page._cost(WanLongVideo, run.output, 1, None)
    assert cost["cpu_seconds"] > 0 and cost["peak"] >= cost["before"] > 0
    with pytest.raises(ValueError, match="`saved` must have the weights"):
        wan_long_video_report.put_weights({"a.default.weight": torch.nn.Parameter(torch.zeros(1))}, {})


# ---------------------------------------------------------------------- scenes that turn


def test_the_way_turns() -> None:
    assert travelled(8, 4).tolist() == [0, 1, 2, 3, 2, 1, 0, 1] and travelled(3, 2).tolist() == [0, 1, 0]
    assert travelled(5).tolist() == travelled(5, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("frames", [24, 48])
def test_long_true_clips_are_right(frames: int) -> None:
    classes = scene_classes()[::7]
    for clip, scene in zip(moving_clips(classes, frames, 24, 24, seed=7, turn=12), classes, strict=True):
        seen = check_motion(clip, scene, turn=12)
        assert seen.right and seen.error < 0.3 and seen.flicker == 0
        assert seen.velocity == pytest.approx(scene.velocity, abs=0.15)
        assert not check_motion(clip, scene).right
        turned = replace(scene, direction=DIRECTIONS[(DIRECTIONS.index(scene.direction) + 1) % 8])
        assert not check_motion(clip, turned, turn=12).right


def test_clips_up_to_the_turn_are_as_without() -> None:
    plain, turning = (moving_clips([SOME], 12, 24, 24, seed=3, turn=turn) for turn in (None, 12))
    assert torch.equal(plain, turning)
    empty = torch.zeros(1, 3, 12, 24, 24)
    assert torch.equal(with_motion(empty, [SOME]), with_motion(empty, [SOME], turn=12))
    long = with_motion(torch.zeros(1, 3, 23, 24, 24), [SOME], turn=12)
    assert torch.equal(long[:, :, :12], with_motion(empty, [SOME])) and torch.equal(long, long.flip(2))
