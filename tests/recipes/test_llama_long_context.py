"""Recipe llama_long_context on a tiny model: what it trains, how it evaluates, what it refuses, what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.backend import BackendUnavailable
from hf_sparse_attn.recipe import Run, read_recipe
from hf_sparse_attn.recipes.llama_long_context import (
    LlamaLongContext,
    LongContextTask,
    ProfileSettings,
)
from hf_sparse_attn.settings import build_config, plain
from hf_sparse_attn.shipped.corpus import needle_document, next_byte_loss, score_needles
from hf_sparse_attn.training.rope_scaling import scale_rope
from hf_sparse_attn.training.text.model import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 301
TRAINED = ("embed_tokens", "norm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model that reads bytes, good for 128 of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def recipe(model: str, **changes: Any) -> LlamaLongContext:
    values: dict[str, Any] = {
        "model": model,
        "steps": 2,
        "batch": 3,
        "optimizer": {"learning_rate": 1e-2},
        "lora": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "rank": 2, "trained": list(TRAINED)},
        "rope": {"type": "yarn", "factor": 4.0},
        "sparse": {
            "method": "sliding_window",
            "params": {"window": 64, "sink": 8, "block_size": 16},
            "min_tokens": 0,
        },
        "data": {"source": "needles", "length": LENGTH, "needles": 4},
        "evaluation_samples": 2,
        "loss_positions": 100,
    }
    values = {**values, **changes}
    return build_config(LlamaLongContext, {k: v for k, v in values.items() if v is not ...}, "llama_long_context")


def task(model: str, folder: Path, **changes: Any) -> LongContextTask:
    made = recipe(model, **changes).task(Run(folder, torch.device("cpu"), progress=False))
    assert isinstance(made, LongContextTask)
    return made


def gradients(made: LongContextTask, parts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Of a step whose samples come in these micro-batches, as the training loop sums them."""
    made.model.train()
    made.model.zero_grad()
    batches = [made.batch(0, part) for part in parts]
    total = sum(made.weight(batch) for batch in batches)
    for batch in batches:
        torch.autograd.backward(made.loss(batch) / total)
    return {name: p.grad.clone() for name, p in made.trained().items() if p.grad is not None}


def test_only_the_named_weights_change_and_a_bundle_brings_them_back(model: str, tmp_path: Path) -> None:
    from hf_sparse_attn.training.loop import train

    figures = train(recipe(model), tmp_path / "run", progress=False)
    assert figures["before"].keys() == {
        f"{what}_{how}_{LENGTH}" for what in ("loss", "needles") for how in ("sparse", "dense")
    } | {"density"}
    assert figures["after"][f"loss_sparse_{LENGTH}"] < figures["before"][f"loss_sparse_{LENGTH}"]
    loaded, _ = load_language_model(model, torch.float32)
    plain_state = {name: value.clone() for name, value in loaded.state_dict().items()}
    document = needle_document(LENGTH, 4, 1)
    with torch.no_grad():
        before = loaded(document.token_ids).logits
        with hsa.load_bundle(loaded, tmp_path / "run" / "result") as bundle:
            assert bundle.patch is not None and bundle.patch.method.name == "sliding_window"
            assert loaded.config.rope_parameters["rope_type"] == "yarn"
            assert not torch.allclose(loaded(document.token_ids).logits, before)
            changed = {name for name, p in bundle.adapter.parameters().items()}
        assert torch.equal(loaded(document.token_ids).logits, before)
    assert all(torch.equal(value, plain_state[name]) for name, value in loaded.state_dict().items())
    ends = ("lora_A.default.weight", "lora_B.default.weight", "modules_to_save.default.weight")
    assert changed and all(name.endswith(ends) for name in changed)


def test_trained_are_lora_norms_and_embeddings_alone(model: str, tmp_path: Path) -> None:
    made = task(model, tmp_path)
    base = {name: p for name, p in made.model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in base.items()}
    named = {name.split(".modules_to_save")[0].split(".lora_")[0].rsplit(".", 1)[-1] for name in made.trained()}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert named == projections | {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}
    found = gradients(made, [[0, 1, 2]])
    assert found.keys() == made.trained().keys()
    made.optimizers()[0].step()
    assert all(torch.equal(base[name], before[name]) for name in base)
    made.close()


def test_micro_batches_of_one_are_the_whole_batch(model: str, tmp_path: Path) -> None:
    made = task(model, tmp_path)
    whole, single = gradients(made, [[0, 1, 2]]), gradients(made, [[0], [1], [2]])
    for name, gradient in whole.items():
        torch.testing.assert_close(single[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    made.close()


def test_with_and_without_checkpointing(model: str, tmp_path: Path) -> None:
    kept, again = task(model, tmp_path), task(model, tmp_path, gradient_checkpointing=True)
    assert again.model.is_gradient_checkpointing
    wanted, found = gradients(kept, [[0, 1]]), gradients(again, [[0, 1]])
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    kept.close()
    again.close()


@pytest.mark.parametrize("train_with", ["sparse", "dense"])
def test_figures_are_those_of_sparse_and_of_dense_attention(model: str, tmp_path: Path, train_with: str) -> None:
    made = task(model, tmp_path, train_with=train_with, evaluation_lengths=[LENGTH, 200])
    assert (made.patch is None) == (train_with == "dense")
    figures = made.evaluate()
    assert (made.patch is None) == (train_with == "dense")
    assert figures["loss_sparse_200"] != figures["loss_dense_200"] and 0 < figures["density"] < 1
    bare, _ = load_language_model(model, torch.float32)
    assert made.recipe.rope is not None and made.recipe.sparse is not None
    scale_rope(bare, made.recipe.rope)
    documents = [made.held_out[LENGTH].document(index) for index in range(2)]
    assert all(len(document.needles) == 4 for document in documents)
    for how in ("sparse", "dense"):
        patched = hsa.patch(bare, "sliding_window", min_tokens=0, **made.recipe.sparse.params)
        if how == "dense":
            patched.remove()
        losses, right = [], []
        with torch.no_grad():
            for document in documents:
                logits = bare(document.token_ids, use_cache=False).logits
                losses.append((next_byte_loss(logits, document), int(document.code_mask.sum())))
                right += score_needles(logits, document)
        wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        assert figures[f"loss_{how}_{LENGTH}"] == pytest.approx(wanted, rel=1e-5)
        assert figures[f"needles_{how}_{LENGTH}"] == sum(right) / len(right)
        if how == "sparse":
            patched.remove()
    made.close()


def test_closing_leaves_the_model_as_it_was(model: str, tmp_path: Path) -> None:
    made = task(model, tmp_path, gradient_checkpointing=True)
    made.evaluate()
    trained = made.model
    made.close()
    fresh, _ = load_language_model(model, torch.float32)
    ids = needle_document(LENGTH, 4, 1).token_ids
    assert trained.config.rope_parameters == fresh.config.rope_parameters
    assert [name for name, _ in trained.named_modules()] == [name for name, _ in fresh.named_modules()]
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("first, method", [("sparse", "sliding_window"), ("dense", None)])
def test_the_bundle_puts_on_what_is_evaluated_first(model: str, tmp_path: Path, first: str, method: str) -> None:
    made = task(model, tmp_path, evaluate_with=[first])
    made.save(tmp_path / "bundle", {})
    made.close()
    loaded, _ = load_language_model(model, torch.float32)
    with hsa.load_bundle(loaded, tmp_path / "bundle") as bundle:
        assert (bundle.patch.method.name if bundle.patch is not None else None) == method


PROFILED: dict[str, Any] = {
    "sparse": {"method": "profile", "min_tokens": 0},
    "profile": {
        "budget": 0.5,
        "candidates": [
            {"method": "sliding_window", "params": {"window": 64, "sink": 8, "block_size": 16}},
            {"method": "block_topk", "params": {"density": 0.25, "block_size": 16}},
        ],
    },
}


def test_a_profile_is_found_first_kept_for_a_resumed_run_and_put_into_the_bundle(model: str, tmp_path: Path) -> None:
    made = task(model, tmp_path, **PROFILED)
    assert made.patch is not None and made.patch.method.name == "head_profile"
    found = hsa.HeadProfile.from_pretrained(tmp_path / "profile")
    assert found.density <= 0.5 and {m.name for m in found.methods} <= {"dense", "sliding_window", "block_topk"}
    # Of the model as it is trained, with stretched positions.
    with pytest.raises(ValueError):
        found.check(load_language_model(model, torch.float32)[0])
    before = (tmp_path / "profile" / "head_profile.json").stat().st_mtime_ns
    made.save(tmp_path / "bundle", {})
    made.close()
    task(model, tmp_path, **PROFILED).close()
    assert (tmp_path / "profile" / "head_profile.json").stat().st_mtime_ns == before
    loaded, _ = load_language_model(model, torch.float32)
    with hsa.load_bundle(loaded, tmp_path / "bundle") as bundle:
        assert bundle.patch is not None and bundle.patch.method.name == "head_profile"
        assert bundle.recipe["sparse"]["method"] == "profile"


def test_a_profile_of_other_settings_and_half_a_profile_are_found_anew(model: str, tmp_path: Path) -> None:
    # A start that failed, or was killed, leaves a profile in a folder that may be used again.
    task(model, tmp_path, **PROFILED).close()
    file = tmp_path / "profile" / "head_profile.json"
    assert hsa.HeadProfile.from_pretrained(tmp_path / "profile").budget == {"density": 0.5}
    task(model, tmp_path, **{**PROFILED, "profile": {**PROFILED["profile"], "budget": 0.4}}).close()
    assert hsa.HeadProfile.from_pretrained(tmp_path / "profile").budget == {"density": 0.4}
    file.unlink()
    task(model, tmp_path, **{**PROFILED, "profile": {**PROFILED["profile"], "budget": 0.4}}).close()
    assert file.is_file()


def test_candidates_of_a_profile_where_none_are_given_can_train() -> None:
    methods = ProfileSettings().methods(4096)
    assert len(methods) > 5 and all(method.trainable for method in methods)


@pytest.mark.parametrize(
    "held", [{"source": "."}, {"source": "own", "split": "test"}, {"source": "own/a.txt"}], ids=str
)
def test_held_out_text_that_is_trained_on_is_refused(
    model: str, tmp_path: Path, held: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "test").mkdir(parents=True)
    for name in ("a.txt", "test/b.txt"):
        (tmp_path / "own" / name).write_text("one two three four\n" * 99, encoding="utf-8")
    # Without a folder "train" in it all of the folder is trained on, its folder "test" as well.
    data = {"source": "own", "length": LENGTH}
    with pytest.raises(ValueError, match=r"`held_out` must be other text than `data`, got .*\.txt in both"):
        task(model, tmp_path, data=data, held_out={**data, **held})


def test_text_of_ones_own(model: str, tmp_path: Path) -> None:
    for name, count in (("train", 3000), ("held", 900)):
        (tmp_path / f"{name}.txt").write_text("one two three four\n" * (count // 19), encoding="utf-8")
    data = {"source": str(tmp_path / "train.txt"), "length": LENGTH}
    made = task(model, tmp_path, data=data, held_out={**data, "source": str(tmp_path / "held.txt")})
    assert made.batch(0, [0, 1]).ids.shape == (2, LENGTH)
    assert made.evaluate().keys() == {f"loss_sparse_{LENGTH}", f"loss_dense_{LENGTH}", "density"}
    made.close()
    with pytest.raises(ValueError, match="`evaluation_samples` must be at most 2"):
        task(
            model,
            tmp_path,
            data=data,
            held_out={**data, "source": str(tmp_path / "held.txt")},
            evaluation_samples=9,
        )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a method without a backward pass": ({"sparse": {"method": "@no_backward"}}, ValueError, "a backward pass"),
    "an unknown method": ({"sparse": {"method": "sliding"}}, ValueError, "sliding_window"),
    "an unknown method, for evaluation alone": (
        {"sparse": {"method": "sliding"}, "train_with": "dense"},
        ValueError,
        "sliding_window",
    ),
    "a backend without a backward pass": (
        {"sparse": {"method": "sliding_window", "backend": "triton_int8"}},
        BackendUnavailable,
        "cannot train here",
    ),
    "an unknown kind of rope": ({"rope": {"type": "xpos", "factor": 4.0}}, ValueError, "one of linear, ntk, yarn"),
    "a factor below 1": ({"rope": {"type": "ntk", "factor": 0.5}}, ValueError, "`factor` must be 1 or more"),
    "longer than the positions": ({"rope": ...}, ValueError, "`data.length` must be at most 128"),
    "evaluated longer than the positions": ({"evaluation_lengths": [600]}, ValueError, "`evaluation_lengths` must"),
    "no room for the needles": ({"data": {"source": "needles", "length": 100}}, ValueError, "`length` must be at"),
    "a text that is too short": (
        {"data": {"source": "@short", "length": LENGTH}, "held_out": {"source": "needles", "length": LENGTH}},
        ValueError,
        "at least `length` = 301",
    ),
    "text that is not there": (
        {"data": {"source": "./no.txt", "length": LENGTH}, "held_out": {"source": "needles", "length": LENGTH}},
        FileNotFoundError,
        "no.txt",
    ),
    "no held-out text": ({"data": {"source": "@short", "length": 9}}, ValueError, "`held_out` must be given"),
    "no adapter": ({"lora": None}, ValueError, "`lora` must be given"),
    "no such module": ({"lora": {"targets": ["query"]}}, ValueError, "query"),
    "no sparse attention": ({"sparse": None}, ValueError, "`sparse` must be given"),
    "nothing to evaluate": ({"evaluate_with": []}, ValueError, "`evaluate_with` must be"),
    "a profile that is not asked for": ({"profile": {}}, ValueError, "must be given together"),
    "a profile without settings": ({"sparse": {"method": "profile"}}, ValueError, "must be given together"),
    "a budget of nothing": (PROFILED | {"profile": {"budget": 0.0}}, ValueError, "`budget` must be more than 0"),
    "an unknown candidate": (
        PROFILED | {"profile": {"candidates": [{"method": "sliding"}]}},
        ValueError,
        "sliding_window",
    ),
    "a candidate without a backward pass": (
        PROFILED | {"profile": {"candidates": [{"method": "@no_backward"}]}},
        ValueError,
        "`profile.candidates` must have a backward pass",
    ),
    "an unknown attention": ({"train_with": "flash"}, ValueError, "one of sparse, dense"),
    "no positions": ({"loss_positions": 0}, ValueError, "`loss_positions`"),
    "a length of one token": ({"evaluation_lengths": [1]}, ValueError, "`evaluation_lengths`"),
    "an unknown key": ({"window": 3}, ValueError, "window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_step(model: str, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, message = REFUSED[case]
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    text = {"@short": str(tmp_path / "short.txt"), "@no_backward": "sliding_window"}
    if "@no_backward" in str(changes):
        monkeypatch.setattr(hsa.get_method("sliding_window"), "trainable", False)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return text.get(value, value) if isinstance(value, str) else value

    with pytest.raises(error, match=message):
        task(model, tmp_path, **filled(changes))


def test_the_shipped_recipe_reads() -> None:
    shipped = read_recipe("llama_long_context", ["steps=3", "train_with=dense"])
    assert isinstance(shipped, LlamaLongContext)
    assert (shipped.steps, shipped.train_with, shipped.data.length) == (3, "dense", 16384)
    assert build_config(LlamaLongContext, plain(shipped)) == shipped
