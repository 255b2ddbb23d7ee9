"""Recipes as files: what is read, what is refused, and the command that runs them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from hf_sparse_attn import recipe
from hf_sparse_attn.cli import commands as cli
from hf_sparse_attn.cli import train as train_command
from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.recipe import OptimizerSettings, Recipe, SparseSettings, read_recipe, shipped_recipes
from hf_sparse_attn.recipes.shipped.moving_wan import MovingWan
from hf_sparse_attn.settings import build_config, plain, read_yaml
from hf_sparse_attn.training.lora.settings import LoraSettings


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["one", "two"] = "one"
    path: Path = Path("here")
    limit: int | None = None
    layers: int | tuple[int, ...] = 0
    extra: dict[str, Any] = field(default_factory=dict)
    inners: tuple[Inner, ...] = ()


def built(**values: Any) -> Outer:
    return build_config(Outer, {"inner": {"size": 1}, **values})


def test_defaults_may_be_left_out_and_types_are_made() -> None:
    made = built(path="there", limit=3, layers=[1, 2], extra={"a": [1]}, inners=[{"size": 2, "ratio": 1}])
    assert made == Outer(Inner(1), "one", Path("there"), 3, (1, 2), {"a": [1]}, (Inner(2, 1.0),))
    assert built() == Outer(Inner(1))
    assert built(limit=None).limit is None


def test_settings_come_back_as_plain_values() -> None:
    made = built(path="there", layers=[1, 2], inners=[{"size": 2}])
    assert build_config(Outer, json.loads(json.dumps(plain(made)))) == made


def test_small_numbers_are_floats_as_people_write_them() -> None:
    # YAML itself reads 1e-4 as text.
    assert build_config(Inner, {"size": 1, "ratio": "1e-4"}).ratio == 1e-4


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"inner": {"size": "1"}}, TypeError, "`config.inner.size` must be of type int, got '1'"),
        ({"inner": {"size": True}}, TypeError, "`config.inner.size` must be of type int, got True"),
        ({"inner": {}}, ValueError, r"`config.inner` must have keys out of .*no \['size'\]"),
        ({"inner": 3}, TypeError, "`config.inner` must be a mapping, got 3"),
        ({"kind": "three"}, ValueError, "`config.kind` must be one of one, two, got 'three'"),
        ({"limit": "x"}, TypeError, "`config.limit` must be of type int"),
        ({"layers": ["x"]}, TypeError, r"`config.layers\[0\]` must be of type int"),
        ({"layers": "x"}, TypeError, "`config.layers` must be of type int, got 'x'; or .* must be a list, got 'x'"),
        ({"extra": [1]}, TypeError, "`config.extra` must be a mapping with names"),
        ({"extra": {1: 2}}, TypeError, "`config.extra` must be a mapping with names"),
        (
            {"inners": [{"size": 1, "sise": 2}]},
            ValueError,
            r"`config.inners\[0\]` must .*unknown \['sise'\] \(nearest: size\)$",
        ),
        ({"ratio": 1}, ValueError, r"unknown \['ratio'\]"),
    ],
    ids=str,
)
def test_bad_settings_are_named(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        built(**values)


def test_overrides_reach_inner_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\nb: {c: 2}\n")
    assert read_yaml(file, ["b.c=x", "b.d=[1, 2]", "e.f=1.0e-3", "a="]) == {
        "a": None, "b": {"c": "x", "d": [1, 2]}, "e": {"f": 1e-3},
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, overrides, error, message",
    [
        ("a: 1", ["b"], ValueError, "an override must be key=value, such as .*, got 'b'"),
        ("a: 1", ["=3"], ValueError, "an override must be key=value"),
        ("a: 1", ["a.b=3"], TypeError, "`a.b` must be a key inside a mapping, got 1 at a"),
        ("a: 1", ["a=[1"], ValueError, "must be YAML"),
        ("a: [1", [], ValueError, "must be YAML"),
        ("a: 1\nb: {c: 2, d: 3, c: 4}", [], ValueError, "must be YAML.*keys must be given once, got 'c' twice"),
        ("a: 1", ["a={c: 2, c: 4}"], ValueError, "must be YAML.*keys must be given once"),
        ("- 1", [], TypeError, "must hold a mapping of settings"),
    ],
    ids=["no-value", "no-key", "inside-number", "override-not-yaml", "not-yaml", "twice", "override-twice", "list"],
)
def test_bad_files_are_named(
    tmp_path: Path, text: str, overrides: list[str], error: type[Exception], message: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        read_yaml(file, overrides)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the recipe must be a YAML file, got .*none\.yaml"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_reads(name: str) -> None:
    made = read_recipe(name)
    assert isinstance(made, Recipe) and made.total_steps > 0
    # The name in the file is that of its code, and the settings survive a round trip.
    assert build_config(type(made), json.loads(json.dumps(plain(made)))) == made


def test_unknown_recipes_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the recipe must be a \.yaml file or one of .*moving_wan.*; got 'moving'"):
        read_recipe("moving")
    (tmp_path / "a.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match=r"`recipe` must be one of byte_llama, .*; got None"):
        read_recipe(tmp_path / "a.yaml")


def test_recipes_that_only_the_repository_has_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the package is installed without the repository; every recipe that is left out is known."""
    folder = Path(__file__).parents[2] / "recipes" / "shipped"
    assert sorted(recipe._IN_REPOSITORY) == sorted(path.stem for path in folder.glob("*.yaml"))
    assert set(recipe._IN_REPOSITORY) < set(shipped_recipes())
    monkeypatch.setattr(recipe, "_PACKAGES", recipe._PACKAGES[:1])
    assert not set(recipe._IN_REPOSITORY) & set(shipped_recipes())
    (tmp_path / "a.yaml").write_text("recipe: byte_llama\n")
    for source in ("byte_llama", tmp_path / "a.yaml"):
        with pytest.raises(ValueError, match=r"recipe 'byte_llama' made a model .* in the repository alone"):
            read_recipe(source)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("no diffusers", name="diffusers")

    monkeypatch.setattr(recipe.importlib, "import_module", lambda name: absent(name) if "moving" in name else recipe)
    monkeypatch.setattr(recipe, "_recipe_modules", lambda: {"moving_wan": "a.moving_wan"})
    with pytest.raises(MissingExtra, match=r"recipe 'moving_wan' needs diffusers .*hf-sparse-attn\[diffusers\]"):
        recipe.recipe_class("moving_wan")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Recipe(seed=-1), "`seed` must be at least 0"),
        (lambda: Recipe(save_every=0), "`save_every` must be at least 1"),
        (lambda: Recipe(micro_batch=0), "`micro_batch` must be at least 1"),
        (lambda: LoraSettings(targets=()), "`targets` must name at least one"),
        (lambda: LoraSettings(targets=("q",), rank=0), "`rank` must be at least 1"),
        (lambda: LoraSettings(targets=("q",), dropout=1.0), "`dropout` must be at least 0 and less than 1"),
        (lambda: LoraSettings(targets=("q",), alpha=0.0), "`alpha` must be more than 0"),
    ],
    ids=["seed", "save", "micro", "targets", "rank", "dropout", "alpha"],
)
def test_bad_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------- the command


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command hands to the loop, which answers with figures."""
    from hf_sparse_attn.training import loop as training

    calls: list[Any] = []
    figures = {"before": {"loss": 2.0, "old": 1.0}, "after": {"loss": 1.5, "new": 3.0}, "loss": 1.4, "steps": 5,
               "seconds": 61.0, "step_seconds": 12.2, "peak_memory": 3 << 30, "processes": 1}  # fmt: skip
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: calls.append((args, kwargs)) or figures)
    return calls


def test_the_command_reads_settings_before_and_behind_options(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["train", "moving_wan", "seed=5", "--output", str(tmp_path), "flow.drop=0.25", "--resume"]
    assert cli.main(told) == 0
    (made, folder), options = asked[0]
    assert isinstance(made, MovingWan) and (made.seed, made.flow.drop) == (5, 0.25)
    assert folder == tmp_path and options["resume"] is True
    shown = capsys.readouterr().out
    assert re.search(r"loss +2 +1\.5 +-0\.5", shown) and re.search(r"new +- +3 +-", shown)
    assert "5 steps in 61 s (12.2 s each), loss 1.4, peak memory 3.00 GiB, 1 process" in shown
    assert f"wrote {tmp_path / 'result'}" in shown.replace("\n", "")


def test_the_command_prints_json(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "moving_wan", "--output", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipe"] == "moving_wan" and document["after"]["loss"] == 1.5


@pytest.mark.parametrize(
    "told, message",
    [
        (["moving_wan"], "--output DIR must say where"),
        (["moving_wan", "--output", "x", "--speed"], "unrecognized arguments: --speed"),
        (["moving_wan", "--output", "x", "seed=a"], "`moving_wan.seed` must be of type int, got 'a'"),
        (["moving_wan", "sed=1", "--output", "x"], "unknown ['sed']"),
        (["none.yaml", "--output", "x"], "the recipe must be a YAML file, got none.yaml"),
    ],
    ids=["output", "option", "type", "unknown", "file"],
)
def test_the_command_refuses_in_one_line(
    asked: list[Any], told: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *told]) == 2
    assert message in capsys.readouterr().err and not asked


def test_settings_behind_the_options_are_for_train_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "a=b"]) == 2
    assert "unrecognized arguments: a=b" in capsys.readouterr().err


def test_the_command_stops_with_the_signals_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparse_attn.training import loop as training

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise training.Interrupted(3, 15)

    monkeypatch.setattr(training, "train", stopped)
    assert cli.main(["train", "moving_wan", "--output", str(tmp_path)]) == 143


@pytest.mark.parametrize(
    "error", [FloatingPointError("the loss must stay finite"), ImportError("it needs torchvision")], ids=repr
)
def test_the_command_tells_what_went_wrong_while_training_in_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_sparse_attn.training import loop as training

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(training, "train", fails)
    assert cli.main(["train", "moving_wan", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"hf-sparse-attn: error: {error}\n"


def test_without_a_recipe_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["recipe"] for entry in found} == set(shipped_recipes())
    assert all(entry["summary"].endswith(".") for entry in found)
    assert cli.main(["train"]) == 0
    assert "moving_wan" in capsys.readouterr().out
    assert train_command.render({"recipe": "a", "result": "b", "before": {}, "after": {}, "loss": 1.0, "steps": 1,
                                 "seconds": 1.0, "step_seconds": 1.0, "peak_memory": 1 << 20, "processes": 2}
                                ).startswith("1 steps in 1 s")  # fmt: skip


def test_settings_of_sparse_attention_default_to_those_of_patch() -> None:
    import inspect

    from hf_sparse_attn.api import patch

    known = inspect.signature(patch).parameters
    made = SparseSettings(method="radial")
    for name in ("backend", "dense_layers", "dense_steps", "min_tokens"):
        assert getattr(made, name) == known[name].default
    assert OptimizerSettings(learning_rate=1.0).gradient_clip == 1.0
