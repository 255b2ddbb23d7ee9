"""Recipe distill_sparse: the teacher is the untouched model, what is matched has the right gradient, and it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.recipe import Run, read_recipe
from hf_sparse_attn.training.chunked_loss import in_chunks
from hf_sparse_attn.training.loop import train
from hf_sparse_attn.training.matching import divergence, output_error
from tests.support.patterns import Largest
from tests.support.tiny_lm import FAMILIES, tokens

pytest.importorskip("peft")
pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 150
BLOCKS: dict[str, Any] = {"method": "block_topk", "params": {"density": 0.3, "block_size": 16}, "min_tokens": 0}
MATCHES: dict[str, Any] = {
    "output": "output",
    "layers": "layers",
    "attention": "attention",
    "all": {"output": 1.0, "layers": 0.5, "attention": 0.3},
}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"]("sdpa", vocab_size=256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan with the channels of the shipped one."""
    pytest.importorskip("diffusers")
    from tests.support.tiny_wan import transformer

    folder = tmp_path_factory.mktemp("wan")
    transformer(in_channels=6, out_channels=3, text_dim=16).save_pretrained(folder)
    return folder


def of_language(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": "distill_sparse", "model": str(model), "steps": 3, "batch": 3, "seed": 5,
        "data": {"source": "needles", "length": LENGTH, "needles": 2},
        "sparse": BLOCKS, "lora": {"rank": 2, "targets": ["q_proj", "v_proj", "o_proj"]},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"}, "evaluation_samples": 2, **changes,
    }  # fmt: skip


def of_video(model: Path, **changes: Any) -> dict[str, Any]:
    scenes = {"frames": 4, "height": 12, "width": 14, "clips": 1, "sampling_steps": 2}
    lora = {"rank": 2, "targets": ["attn1.to_q", "attn1.to_v", "attn1.to_out.0"]}
    flow = {"shift": 3.0, "drop": 0.0}
    return of_language(model, **{"data": None, "scenes": scenes, "lora": lora, "flow": flow, **changes})


def made(tmp_path: Path, settings: dict[str, Any]) -> Any:
    """The task of a recipe that is read from a file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    recipe: Any = read_recipe(file)
    return recipe.task(Run(output=tmp_path, device=torch.device("cpu"), progress=False))


@contextmanager
def task_of(tmp_path: Path, settings: dict[str, Any]) -> Iterator[Any]:
    task = made(tmp_path, settings)
    try:
        yield task
    finally:
        task.close()


def shake(task: Any, std: float = 0.1) -> None:
    """Adapter weights away from their start, at which it adds nothing."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in task.trained().values():
            weight += std * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)


def gradients(task: Any, batches: list[Any]) -> dict[str, Tensor]:
    task.model.train()
    task.model.zero_grad()
    total = sum(task.weight(b) for b in batches)
    for batch in batches:
        (task.loss(batch) / total).backward()
    task.model.eval()
    return {name: p.grad.clone() for name, p in task.trained().items() if p.grad is not None}


def assert_equal_gradients(one: dict[str, Tensor], other: dict[str, Tensor], share: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in other.values())
    assert largest > 0
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= share * largest, name


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"language": of_language, "video": of_video}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    folder = request.getfixturevalue(request.param)
    return lambda **changes: KINDS[request.param](folder, **changes)


def outputs(task: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        if hasattr(batch, "ids"):
            return task.model(input_ids=batch.ids, use_cache=False).logits
        return task.model(**batch.given, return_dict=False)[0]


# ---------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_teacher_is_the_untouched_model_to_the_bit(
    kind: Callable[..., dict[str, Any]], tmp_path: Path, checkpointing: bool
) -> None:
    settings = kind(gradient_checkpointing=checkpointing)
    settings["lora"]["dropout"] = 0.5
    with task_of(tmp_path, settings) as task:
        shake(task)
        batch = task.batch(0, [0, 1])
        task.model.train()
        with task.teacher():
            taught = outputs(task, batch)
        assert task.model.training
        sparse = outputs(task, batch)
    task.model.eval()
    untouched = outputs(task, batch)
    assert torch.equal(taught, untouched)
    assert not torch.equal(sparse, untouched)


def test_an_exception_inside_the_teacher_leaves_the_student(language: Path, tmp_path: Path) -> None:
    with task_of(tmp_path, of_language(language)) as task:
        shake(task)
        batch = task.batch(0, [0])
        before = outputs(task, batch)
        with pytest.raises(RuntimeError, match="stop"), task.teacher():
            raise RuntimeError("stop")
        assert torch.is_grad_enabled()
        assert torch.equal(outputs(task, batch), before)


# ---------------------------------------------------------------------- gradients


def plain(errors: list[Tensor], method: Any, sparse: bool) -> Callable[..., Any]:
    """Attention by a mask of tokens x tokens, and its error against all of them."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        group, length = q.shape[1] // k.shape[1], q.shape[2]
        layout = TokenLayout.causal(length)
        ctx = Context(layout, num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[3], scale=scaling)
        kept = method.pattern(q, k, ctx).to_dense()
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        logits = q @ k.mT * scaling
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        out, dense = (logits.masked_fill(~m, -torch.inf).softmax(-1) @ v for m in (kept & seen, seen))
        dense = dense.detach()
        errors.append((out - dense).square().flatten(1).sum(1) / dense.square().flatten(1).sum(1))
        return (out if sparse else dense).transpose(1, 2).contiguous(), None

    return attend


def test_gradient_of_the_attention_error_is_that_of_a_plain_formulation(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with task_of(tmp_path, of_language(language, match="attention")) as task:
        task.model.double()
        shake(task)
        batch = task.batch(0, [0, 1])
        loss = task.loss(batch)
        task.model.zero_grad()
        loss.backward()
        got = {name: p.grad.clone() for name, p in task.trained().items() if p.grad is not None}
        method = task.patch.method
        task.patch.remove()
        errors: list[Tensor] = []
        AttentionInterface.register("test_plain", plain(errors, method, sparse=True))
        AttentionMaskInterface.register("test_plain", sdpa_mask)
        monkeypatch.setitem(task.model.config.__dict__, "_attn_implementation_internal", "test_plain")
        task.model.zero_grad()
        task.model(input_ids=batch.ids, use_cache=False)
        wanted = (torch.stack(errors).mean(0) * batch.weights[:, 1:].sum(1)).sum()
        wanted.backward()
        assert len(errors) == 2
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
        # The last layer's output projection is behind all that is matched.
        assert {n for n in task.trained() if n not in got} == {
            n for n in task.trained() if "layers.1.self_attn.o_" in n
        }
        assert_equal_gradients(got, {name: task.trained()[name].grad for name in got}, 1e-10)


def test_the_attention_error_holds_no_tensor_of_tokens_by_tokens() -> None:
    length, draw = 2000, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 8, generator=draw) for heads in (2, 1, 1))
    ctx = Context(TokenLayout.causal(length), num_heads=2, num_kv_heads=1, head_dim=8)
    out = torch.zeros_like(q, requires_grad=True)
    with Largest() as largest:
        error = output_error(out, q, k, v, ctx)
        error.sum().backward()
    assert largest.bytes < length * length
    # Against nothing at all the error is all there is.
    assert error.tolist() == [1.0]


@pytest.mark.parametrize("match", MATCHES)
def test_checkpointing_changes_no_gradient(kind: Callable[..., dict[str, Any]], tmp_path: Path, match: str) -> None:
    found = []
    for checkpointing in (False, True):
        settings = kind(match=MATCHES[match], gradient_checkpointing=checkpointing)
        with task_of(tmp_path, settings) as task:
            shake(task)
            found.append(gradients(task, [task.batch(0, [0, 1])]))
    assert_equal_gradients(*found, 1e-6)


@pytest.mark.parametrize("match", MATCHES)
def test_micro_batches_add_up_to_the_whole(kind: Callable[..., dict[str, Any]], tmp_path: Path, match: str) -> None:
    with task_of(tmp_path, kind(match=MATCHES[match])) as task:
        shake(task)
        whole = gradients(task, [task.batch(1, [0, 1, 2])])
        parts = gradients(task, [task.batch(1, [0, 1]), task.batch(1, [2])])
    assert_equal_gradients(whole, parts)


def test_divergence_is_the_one_of_torch_at_every_chunk_size() -> None:
    draw = torch.Generator().manual_seed(0)
    mine, told = (torch.randn(17, 33, generator=draw, dtype=torch.float64) for _ in range(2))
    mine.requires_grad_()
    weights = torch.rand(17, generator=draw, dtype=torch.float64)
    said, wanted = ((x / 3).log_softmax(-1) for x in (mine, told))
    plain = 9 * (weights * F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)).sum()
    (grad,) = torch.autograd.grad(plain, mine)

    def part(mine: Tensor, told: Tensor, weights: Tensor) -> Tensor:
        return (weights * divergence(mine, told, 3.0)).sum()

    for size in (1, 5, 17, 100):
        loss = in_chunks(part, size, mine, told, weights)
        assert float(loss) == pytest.approx(float(plain), rel=1e-12)
        assert torch.allclose(torch.autograd.grad(loss, mine)[0], grad, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            assert float(in_chunks(part, size, mine, told, weights)) == pytest.approx(float(plain), rel=1e-12)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("match", MATCHES)
def test_only_the_named_weights_change_and_the_end_puts_all_back(language: Path, tmp_path: Path, match: str) -> None:
    task = made(tmp_path, of_language(language, match=MATCHES[match]))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    (optimizer,) = task.optimizers()
    task.model.train()
    for step in range(2):
        optimizer.zero_grad()
        batch = task.batch(step, [0, 1])
        (task.loss(batch) / task.weight(batch)).backward()
        optimizer.step()
    changed = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    named = {name for name in before if "lora_" in name}
    unreached = {name for name in named if match == "attention" and "layers.1.self_attn.o_" in name}
    assert changed == named - unreached
    assert all(any(target in name for target in ("q_proj", "v_proj", "o_proj")) for name in named)
    task.close()
    untouched = FAMILIES["llama"]("sdpa", vocab_size=256)
    after = task.model.state_dict()
    assert after.keys() == untouched.state_dict().keys()
    assert all(torch.equal(after[name], weight) for name, weight in untouched.state_dict().items())


@pytest.mark.parametrize("match", MATCHES)
def test_the_loss_falls(kind: Callable[..., dict[str, Any]], tmp_path: Path, match: str) -> None:
    with task_of(tmp_path, kind(match=MATCHES[match])) as task:
        (optimizer,) = task.optimizers()
        batch, losses = task.batch(0, [0, 1]), []
        task.model.train()
        for _ in range(6):
            optimizer.zero_grad()
            loss = task.loss(batch) / task.weight(batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]


def test_training_leaves_a_bundle_with_the_figures(language: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(of_language(language, match="output", micro_batch=2)))
    figures = train(read_recipe(file), tmp_path / "out", progress=False)
    for when in ("before", "after"):
        found = figures[when]
        assert {"loss", "loss_dense", "loss_run_dense", "kl", "needles", "needles_dense"} <= found.keys()
        assert found["attention_error_layer_1"] > 0
    assert figures["before"]["loss_run_dense"] == figures["before"]["loss_dense"] == figures["after"]["loss_dense"]
    assert figures["after"]["kl"] < figures["before"]["kl"]
    model = FAMILIES["llama"]("sdpa", vocab_size=256)
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with hsa.load_bundle(model, tmp_path / "out" / "result") as bundle:
            assert bundle.patch is not None
            assert bundle.patch.method == hsa.get_method("block_topk")(density=0.3, block_size=16)
            assert not torch.equal(model(input_ids=ids).logits, dense)
        assert torch.equal(model(input_ids=ids).logits, dense)


def test_figures_of_video_are_against_the_teacher(video: Path, tmp_path: Path) -> None:
    with task_of(tmp_path, of_video(video)) as task, torch.no_grad():
        found = task.evaluate()
        assert found["loss_run_dense"] == found["loss_dense"]
        assert found["output_error"] > 0 and 0 < found["psnr"] < 100 and found["attention_error"] > 0
        with task.patch.paused():
            same = task.evaluate()
    assert same["output_error"] == 0 and same["psnr"] == 100 and "attention_error" not in same


def test_text_without_a_held_out_part_keeps_its_last_samples_back(language: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(chr(97 + i % 23) for i in range(7 * LENGTH)))
    data = {"source": str(tmp_path / "text.txt"), "length": LENGTH}
    with task_of(tmp_path, of_language(language, data=data)) as task:
        material = task.student
        assert material.kept == 2
        drawn = torch.cat([task.batch(step, [0, 1, 2]).ids for step in range(4)])
        last = [material.data[len(material.data) - 1 - i].ids for i in range(2)]
        assert not any(torch.equal(row, held) for row in drawn for held in last)
        with torch.no_grad():
            assert "needles" not in task.evaluate()


def test_latents_of_a_wan_transformer(video: Path, tmp_path: Path) -> None:
    from hf_sparse_attn.training.video.latents import LatentSample
    from tests.support.latents import write_latents

    draw = torch.Generator().manual_seed(0)
    made = [
        LatentSample(torch.randn(6, 3, 8, 10, generator=draw), {"prompt_embeds": torch.randn(4, 16, generator=draw)})
        for _ in range(5)
    ]
    write_latents(tmp_path / "latents", made)
    videos = {"source": str(tmp_path / "latents"), "frames": 9, "height": 64, "width": 80}
    folder = tmp_path / "model"
    from tests.support.tiny_wan import transformer

    transformer(in_channels=6, out_channels=6, text_dim=16).save_pretrained(folder)
    sparse = {**BLOCKS, "dense_steps": 0.3}
    settings = of_video(folder, scenes=None, videos=videos, match=MATCHES["all"], sparse=sparse)
    with task_of(tmp_path, settings) as task:
        batch = task.batch(0, [0, 1, 2])
        # Sparse in the last 0.7 of the schedule: with a shift of 3 that is below 3 * 0.7 / (1 + 2 * 0.7).
        assert float(batch.given["timestep"].max()) <= 1000 * 2.1 / 2.4
        task.loss(batch).backward()
        report = task.patch.report()
        assert all(layer.sparse_calls == 1 for layer in report.layers)
        with torch.no_grad():
            found = task.evaluate()
        assert "psnr" not in found and found["output_error"] > 0


# ---------------------------------------------------------------------- what is refused

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no sparse": ({"sparse": None}, "`sparse` must be given to distill, got none"),
    "no lora": ({"lora": None}, "`lora` must be given to distill, got none"),
    "unknown match": ({"match": "logits"}, "match"),
    "no weight": ({"match": {"output": 0}}, "`match` must have a weight more than 0, got none"),
    "negative weight": ({"match": {"layers": -1}}, "`match.layers` must be 0 or more, got -1"),
    "cold": ({"temperature": 0}, "`temperature` must be more than 0, got 0"),
    "no samples": ({"evaluation_samples": 0}, "`evaluation_samples` must be at least 1, got 0"),
    "noise": ({"flow": {"shift": 0}}, "`shift` must be more than 0, got 0"),
    "expert of text": ({"expert": "low"}, "`expert` must be left out without `videos`, got 'low'"),
    "odd size": (
        {"model": "moving_wan", "data": None, "scenes": {"width": 25}},
        "`width` must be even and at least 24 for 12 frames, got 25",
    ),
    "all steps dense": (
        {
            "model": "moving_wan",
            "data": None,
            "scenes": {},
            "lora": {"targets": ["attn1.to_q"]},
            "sparse": {**BLOCKS, "dense_steps": [0.5, 0.5]},
        },
        "`sparse.dense_steps` must leave some steps sparse",
    ),
    "nothing to learn from": ({"data": None}, "`data`, `videos` or `scenes` must be given, got none"),
    "two kinds of data": ({"scenes": {}}, "`data`, `videos` or `scenes` must be given, got data and scenes"),
    "text for video": (
        {"data": None, "scenes": {}, "held_out": {"source": "needles", "length": 99}},
        "`held_out` must be left out for video, got one",
    ),
    "no module": ({"lora": {"targets": ["q_pro"]}}, "such as .*q_proj.*; got 'q_pro'"),
    "no data": ({"data": {"source": "nowhere.txt", "length": 9}}, "nowhere.txt"),
    "too short for the needles": ({"data": {"source": "needles", "length": 20}}, "`length` must be at least"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_before_the_first_step(language: Path, tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        made(tmp_path, {**of_language(language), **changes})


def test_a_patch_that_leaves_all_dense_is_refused(language: Path, tmp_path: Path) -> None:
    with (
        task_of(tmp_path, of_language(language, sparse={**BLOCKS, "min_tokens": 4096})) as task,
        pytest.raises(ValueError, match="`sparse` must make a layer sparse, all were dense: fewer than 4096 keys"),
    ):
        task.loss(task.batch(0, [0]))
    with (
        task_of(tmp_path, of_language(language, sparse={**BLOCKS, "dense_layers": 2})) as task,
        pytest.raises(ValueError, match="all were dense: dense_layers"),
    ):
        task.loss(task.batch(0, [0]))


def test_more_samples_than_there_are_and_a_model_of_another_kind_are_refused(language: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 3 * LENGTH)
    data = {"source": str(tmp_path / "text.txt"), "length": LENGTH}
    with pytest.raises(ValueError, match="`evaluation_samples` must be less than the 3 samples of the text, got 3"):
        made(tmp_path, of_language(language, data=data, evaluation_samples=3))
