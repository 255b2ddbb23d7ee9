"""HeadProfile: fingerprints, the file and what is refused in it, the card, the Hub, and patching with it."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles import file
from hf_sparse_attn.profiles.card import card
from hf_sparse_attn.profiles.head_profile import HeadProfile, StepPlan
from hf_sparse_attn.profiles.measurements import Case, Measurements
from hf_sparse_attn.registry import FAMILIES
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.hub import is_hub_id
from tests.support.processes import run_code
from tests.support.tiny_lm import FAMILIES as LMS
from tests.support.tiny_lm import tiny_vl, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
METHODS = (
    hsa.get_method("dense")(),
    hsa.get_method("sliding_window")(window=24, sink=3, block_size=32),
    hsa.get_method("vertical_slash")(vertical=10, slash=50, block_size=16),
    hsa.get_method("radial")(decay=math.inf),
)


def make(model: Fingerprint, choice: Any = None, steps: Any = ((0.0, 1.0),), **given: Any) -> HeadProfile:
    shape = (model.layers, model.heads)
    draw = np.random.default_rng(0)
    plans = tuple(StepPlan(s, draw.integers(0, 3, shape) if choice is None else np.array(choice)) for s in steps)
    figures = {n: 10 ** draw.uniform(-5, 0, (len(plans), *shape)) for n in ("density", "recall", "damage")}
    figures["recall"][:1, 0, 0] = math.nan
    parts: dict[str, Any] = dict(
        model=model, methods=METHODS, plans=plans, figures=figures, metric="output_error", budget={"density": 0.25},
        calibration={"batches": 3, "lengths": [512, 1024], "source": "books", "seed": 0, "note": None},
        pareto=((0.1, 0.3), (0.25, 0.1)), versions={"torch": "2.13"},
    )  # fmt: skip
    return HeadProfile(**{**parts, **given})


FINGERPRINT = Fingerprint("LlamaModel", "llama", 2, 4, 2, 8, "abc", "def")


@pytest.fixture
def profile() -> HeadProfile:
    return make(FINGERPRINT)


def same(a: HeadProfile, b: HeadProfile) -> None:
    assert a.model == b.model and a.methods == b.methods and a.same_in_group == b.same_in_group
    assert [p.steps for p in a.plans] == [p.steps for p in b.plans]
    assert all(np.array_equal(p.choice, o.choice) for p, o in zip(a.plans, b.plans, strict=True))
    assert set(a.figures) == set(b.figures)
    for name in a.figures:
        np.testing.assert_allclose(a.figures[name], b.figures[name], rtol=5e-4)
    assert (a.metric, a.budget, a.calibration) == (b.metric, b.budget, b.calibration)
    assert (a.pareto, a.versions) == (b.pareto, b.versions)


# ------------------------------------------------------------------ fingerprint


@pytest.mark.parametrize("name", sorted(LMS))
def test_fingerprint_of_language_models(name: str) -> None:
    found = Fingerprint.of(LMS[name]("eager"))
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 2, 8)
    assert found.family == "llama" and found.rope and found.config_hash


@pytest.mark.parametrize("name", FAMILIES.names())
def test_fingerprint_of_every_family(name: str) -> None:
    model, _ = FAMILIES.get(name).tiny()
    found = Fingerprint.of(model)
    assert found.family == name and found.layers == 2
    # A patch, which changes the configuration while it lasts, changes nothing here.
    with hsa.patch(model, "native" if name == "natively_sparse" else "dense"):
        assert Fingerprint.of(model) == found
    assert Fingerprint.of(model) == found


def test_fingerprint_of_a_composite_config_is_that_of_the_text() -> None:
    found = Fingerprint.of(tiny_vl("sdpa")[0])
    assert (found.model_class, found.family) == ("Qwen2_5_VLTextModel", "qwen_vl")
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 2, 8)


def test_fingerprint_leaves_out_what_does_not_matter() -> None:
    model = LMS["llama"]("sdpa")
    found = Fingerprint.of(model)
    assert Fingerprint.of(LMS["llama"]("eager").double()) == found
    assert Fingerprint.of(model.model) == found
    model.config.update({"attention_dropout": 0.1, "use_cache": False, "transformers_version": "9", "vocab_size": 98})
    model.config._name_or_path = "/somewhere/else"
    assert Fingerprint.of(model) == found


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(num_key_value_heads=4), "kv_heads: 2 here, 4 in the model"),
        (dict(num_attention_heads=8, head_dim=4), "heads: 4 here, 8 in the model"),
        (dict(num_hidden_layers=3), "layers: 2 here, 3 in the model"),
        (dict(head_dim=16), "head_dim: 8 here, 16 in the model"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope: "),
        (dict(attention_bias=True), "config_hash: "),
    ],
    ids=["kv_heads", "heads", "layers", "head_dim", "rope", "bias"],
)
def test_another_model_is_refused_with_the_difference(change: dict, field: str) -> None:
    made = make(Fingerprint.of(LMS["llama"]("sdpa")))
    other = LMS["llama"]("sdpa", **change)
    with pytest.raises(ValueError, match="the profile was made for") as error:
        hsa.patch(other, made)
    assert field in str(error.value)
    with pytest.raises(ValueError, match="model_class: LlamaModel here, Qwen2Model in the model"):
        made.check(LMS["qwen2"]("sdpa"))


def test_fingerprint_of_pipelines() -> None:
    pytest.importorskip("diffusers")
    from tests.support.tiny_wan import pipeline, transformer

    one = Fingerprint.of(transformer())
    assert Fingerprint.of(pipeline("experts")) == Fingerprint.of(pipeline()) == one
    assert (one.model_class, one.layers, one.heads, one.head_dim) == ("WanTransformer3DModel", 2, 2, 12)
    pipe = pipeline("experts")
    pipe.transformer_2 = transformer(num_attention_heads=4)
    with pytest.raises(ValueError, match=r"attention of one kind.*heads: 2 here, 4 in the model"):
        Fingerprint.of(pipe)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layers=0), "`layers` must be at least 1"),
        (dict(heads=5000, kv_heads=1), "`heads` must be at most 4096"),
        (dict(kv_heads=3), "`kv_heads` must divide `heads` = 4, got 3"),
        (dict(rope=7), "`rope` must be a str"),
        (dict(model_class="x" * 201), "`model_class` must be at most 200"),
        (dict(family="a\nb"), "printable"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_fingerprint_refuses_impossible_numbers(change: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        replace(FINGERPRINT, **change)


# ------------------------------------------------------------------ the profile


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(methods=METHODS[1:]), "`methods` must be Methods of which the first is dense"),
        (dict(methods=(*METHODS, METHODS[1])), r"distinct, got sliding_window\(.*more than once"),
        (dict(methods=METHODS[:1]), "`choice` must be an index of one of 1 methods"),
        (dict(steps=((0.0, 0.5), (0.6, 1.0))), "`steps` must follow one another from 0 to 1"),
        (dict(steps=((0.0, 0.5),)), "`steps` must follow"),
        (dict(steps=((0.1, 1.0),)), "`steps` must follow"),
        (dict(steps=((0.0, 1.0), (1.0, 1.0))), "`steps` must follow"),
        (dict(steps=()), "`plans` must be from 1"),
        (dict(choice=[[0] * 3] * 2), r"`choice` must be whole numbers \[2, 4\], got int64 \[2, 3\]"),
        (dict(choice=[[0.0] * 4] * 2), "`choice` must be whole numbers"),
        (dict(choice=[[-1] * 4] * 2), "`choice` must be an index.*got -1"),
        (dict(choice=[[70000] * 4] * 2), "`choice` must be an index.*got 70000"),
        (dict(metric="beauty"), "`metric` must be 'published', one of"),
        (dict(figures={}), "`figures` must hold density"),
        (dict(figures={"density": np.ones((1, 2, 3))}), r"must be \[1, 2, 4\]"),
        (dict(figures={"density": np.full((1, 2, 4), np.inf)}), "must be finite"),
        (dict(figures={"density": np.full((1, 2, 4), 2.0)}), "must be from 0 to 1"),
        (dict(budget={"price": 1.0}), "`budget` must be of density or time"),
        (dict(budget={"density": 0.0}), "must be more than 0"),
        (dict(calibration={"a": {}}), "must be plain values"),
        (dict(calibration={"a": "x" * 2001}), "at most 2000 characters"),
        (dict(calibration={str(i): i for i in range(65)}), "at most 64 values"),
        (dict(pareto=((0.1, math.nan),)), "must be a finite number"),
        (dict(same_in_group=1), "`same_in_group` must be a bool"),
        (dict(versions={"torch": 2}), "must be plain values"),
    ],
)
def test_a_profile_checks_its_parts(change: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(FINGERPRINT, **change)


def test_density_is_weighted_by_steps_and_leaves_out_what_is_not_known() -> None:
    density = np.full((2, 2, 4), 0.5)
    density[1] = 0.1
    made = make(FINGERPRINT, steps=((0.0, 0.25), (0.25, 1.0)), figures={"density": density})
    assert made.density == pytest.approx(0.2)
    density[1, 0] = math.nan
    made = make(FINGERPRINT, steps=((0.0, 0.25), (0.25, 1.0)), figures={"density": density})
    assert made.layer_density(0) == pytest.approx(0.5) and made.layer_density(1) == pytest.approx(0.2)
    assert math.isnan(make(FINGERPRINT, figures={"density": np.full((1, 2, 4), math.nan)}).density)


@pytest.mark.parametrize("steps", [4, 7, 50])
def test_plans_are_found_by_step(steps: int) -> None:
    made = make(FINGERPRINT, steps=((0.0, 0.24), (0.24, 1.0)))
    for step in range(steps):
        ctx = hsa.Context(hsa.TokenLayout.causal(9), step=step, num_steps=steps)
        assert made.plan_at(ctx) is made.plans[int(step / steps >= 0.24)]


def test_arrays_cannot_be_changed(profile: HeadProfile) -> None:
    with pytest.raises(ValueError, match="read-only"):
        profile.plans[0].choice[0, 0] = 1


# ------------------------------------------------------------------ round trip


def test_round_trip(profile: HeadProfile, tmp_path: Path) -> None:
    many = make(FINGERPRINT, steps=((0.0, 0.1), (0.1, 1.0)), same_in_group=True)
    for number, made in enumerate((profile, many)):
        made.save_pretrained(tmp_path / str(number) / "new")
        read = HeadProfile.from_pretrained(str(tmp_path / str(number) / "new"))
        same(made, read)
        # Written again it is the same text: what is rounded stays.
        assert file.to_json(read) == (tmp_path / str(number) / "new" / file.FILE).read_text()


def test_tuples_and_infinity_survive(tmp_path: Path) -> None:
    from dataclasses import dataclass

    from hf_sparse_attn.methods.dense import Dense
    from hf_sparse_attn.registry import METHODS as REGISTRY

    @dataclass(frozen=True, kw_only=True)
    class Nested(Dense):
        window: tuple = ((1, 2), (3, 4))
        far: float = math.inf

    with pytest.MonkeyPatch.context() as patched:
        Nested.name = "nested"
        patched.setitem(REGISTRY._entries, "nested", Nested)
        made = make(FINGERPRINT, methods=(*METHODS, Nested(window=((5, 6, -math.inf),))))
        made.save_pretrained(tmp_path)
        assert HeadProfile.from_pretrained(tmp_path).methods == made.methods
        with pytest.raises(TypeError, match="parameter 'window' must be numbers, texts or tuples"):
            make(FINGERPRINT, methods=(*METHODS, Nested(window=object()))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`method` must be one of .*got 'nested'"):
        HeadProfile.from_pretrained(tmp_path)


def test_measurements_are_kept_beside(profile: HeadProfile, tmp_path: Path) -> None:
    names = ("density", "seconds", "recall", "output_error", "output_error_p95")
    found = Measurements(
        METHODS, ("0", "1"), 4, 2, (Case(64),), {n: np.zeros((1, 2, 4, 4), np.float32) for n in names}
    )
    replace(profile, measurements=found).save_pretrained(tmp_path)
    assert HeadProfile.from_pretrained(tmp_path).measurements.candidates == METHODS
    assert HeadProfile.from_pretrained(tmp_path, measurements=False).measurements is None
    (tmp_path / file.MEASUREMENTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"valid head profile.*file of measurements"):
        HeadProfile.from_pretrained(tmp_path)
    # Those of an earlier profile do not stay.
    profile.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", file.FILE]
    with pytest.raises(ValueError, match="`measurements` must be of"):
        replace(make(replace(FINGERPRINT, layers=3)), measurements=found)


def test_size_is_bounded(tmp_path: Path) -> None:
    model = Fingerprint("LlamaForCausalLM", "llama", 32, 32, 8, 128, "a" * 12, "b" * 12)
    draw = np.random.default_rng(0)
    names = ("density", "recall", "output_error", "output_error_p95", "damage")
    window = hsa.get_method("vertical_slash")
    made = make(
        model,
        methods=(METHODS[0], *(window(vertical=100 * i, slash=6096) for i in range(15))),
        choice=draw.integers(0, 16, (32, 32)),
        figures={n: 10 ** draw.uniform(-6, 0, (1, 32, 32)) for n in names},
        pareto=tuple((float(x), float(x)) for x in draw.uniform(0, 1, 40)),
    )
    made.save_pretrained(tmp_path)
    assert (tmp_path / file.FILE).stat().st_size <= 100_000


def test_a_failed_write_leaves_what_was_there(profile: HeadProfile, tmp_path: Path, monkeypatch: Any) -> None:
    profile.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fails(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        replace(profile, metric="recall").save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    model = LMS["llama"]("sdpa")
    made = make(Fingerprint.of(model), choice=[[1, 2, 0, 1], [2, 2, 1, 0]])
    made.save_pretrained(tmp_path)
    with torch.no_grad(), hsa.patch(model, made, min_tokens=0):
        here = model(input_ids=tokens(2, 111)).logits
    code = (
        "import torch, hf_sparse_attn as hsa; torch.set_num_threads(1);"
        "from tests.support.tiny_lm import FAMILIES, tokens; model = FAMILIES['llama']('sdpa');"
        f"p = hsa.patch(model, {str(tmp_path)!r}, min_tokens=0);"
        f"torch.save(model(input_ids=tokens(2, 111)).logits.detach(), {str(tmp_path / 'out.pt')!r});"
        "assert p.report().density < 1"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), here)


# ------------------------------------------------------------------ what is refused in a file

HOSTILE: list[Any] = [
    None, True, -1, 0, 10**9, 10**400, 1e308, -1e308, "", "../../etc/passwd", "x" * 3000, [], {}, [[]], [None],
    [[[]]], {"a": 1}, [1, "a"], {"method": "dense", "params": {}}, "\x00", "9" * 500,
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values of a JSON document; of long lists the first and last alone."""
    found = [path] if path else []
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items if len(items) <= 4 or isinstance(value, dict) else (items[0], items[-1]):
        found += places(item, (*path, key))
    return found


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def text_of(profile: HeadProfile) -> dict[str, Any]:
    return json.loads(file.to_json(profile))


def refused(value: Any) -> bool:
    """Whether a document is refused, by one of the two errors alone and in words."""
    try:
        file.from_json(HeadProfile, json.dumps(value))
    except (ValueError, TypeError) as error:
        assert 10 < len(str(error)) < 1500
        assert "must" in str(error)
        return True
    return False


def test_a_missing_key_is_named_wherever_it_is(profile: HeadProfile) -> None:
    whole = text_of(profile)
    free = ("figures", "budget", "calibration", "versions", "params")
    dropped = 0
    for path in places(whole):
        if not isinstance(path[-1], str) or any(name in path[:-1] for name in free):
            continue
        broken = copy.deepcopy(whole)
        del at(broken, path[:-1])[path[-1]]
        with pytest.raises((ValueError, TypeError)) as error:
            file.from_json(HeadProfile, json.dumps(broken))
        assert path[-1] in str(error.value)
        dropped += 1
    assert dropped > 20
    del whole["figures"]["density"]
    assert refused(whole)


def test_an_unknown_key_is_named(profile: HeadProfile) -> None:
    whole = text_of(profile)
    for path in ((), ("model",), ("methods", 1), ("plans", 0), ("methods", 1, "params"), ("figures",), ("budget",)):
        broken = copy.deepcopy(whole)
        at(broken, path)["surprise"] = 1
        with pytest.raises((ValueError, TypeError), match="surprise"):
            file.from_json(HeadProfile, json.dumps(broken))


def test_hostile_values_never_raise_anything_else(profile: HeadProfile) -> None:
    whole, accepted = text_of(profile), []
    for path in places(whole):
        owner = at(whole, path[:-1])
        before = owner[path[-1]]
        for hostile in HOSTILE:
            owner[path[-1]] = hostile
            if not refused(whole):
                accepted.append((path, hostile))
        owner[path[-1]] = before
    # What may be anything: notes that nothing reads, and values that happen to fit.
    strict = {p for p, _ in accepted if p[0] in ("format", "version", "methods", "plans", "same_in_group", "metric")}
    fits = {("same_in_group",), ("plans", 0, "steps", 0), ("plans", 0, "steps", 1), ("methods", 0)}
    fits |= {("methods", i, "params") for i in range(4)}
    fits |= {("methods", 1, "params", n) for n in ("sink", "window")}
    fits |= {("methods", 2, "params", n) for n in ("vertical", "slash", "last_queries")}
    fits |= {("methods", 3, "params", "decay"), ("methods", 3, "params", "decay", "float")}
    assert strict <= fits
    assert {type(v) for p, v in accepted if p[0] == "figures"} <= {type(None), int}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "valid head profile"),
        ("{", "valid head profile"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ("[" * 100_000, "valid head profile"),
        ('{"format": "hf_sparse_attn.head_profile", "version": 2}', "version 1, got"),
        ('{"format": "hf_sparse_attn.head_profile", "version": true}', "version 1, got"),
        ('{"format": "hf_sparse_attn.measurements", "version": 1}', "must be hf_sparse_attn.head_profile"),
        ('{"format": 1, "format": 2}', "given once, got 'format' twice"),
        ('{"version": NaN}', "numbers must be finite, got NaN"),
        ('{"version": -Infinity}', "numbers must be finite, got -Infinity"),
        ("1" * 5000, "valid head profile"),
    ],
    ids=["empty", "cut", "list", "null", "deep", "version", "bool", "format", "twice", "nan", "inf", "digits"],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file.FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        HeadProfile.from_pretrained(tmp_path)


def test_every_cut_of_a_file_is_refused(profile: HeadProfile, tmp_path: Path) -> None:
    text = file.to_json(profile).rstrip()
    for length in range(0, len(text), 97):
        with pytest.raises(ValueError, match="must"):
            (tmp_path / file.FILE).write_text(text[:length])
            HeadProfile.from_pretrained(tmp_path)


def test_bytes_and_sizes_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / file.FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="valid head profile"):
        HeadProfile.from_pretrained(tmp_path)
    monkeypatch.setattr(file, "_LARGEST_FILE", 2)
    with pytest.raises(ValueError, match="at most 2 bytes, got 3"):
        HeadProfile.from_pretrained(tmp_path)


def test_numbers_that_float32_does_not_hold(profile: HeadProfile) -> None:
    whole = text_of(profile)
    whole["figures"]["damage"][0][0][0] = 1e39
    with pytest.raises(ValueError, match="must fit in float32"):
        file.from_json(HeadProfile, json.dumps(whole))


# ------------------------------------------------------------------ folders and the Hub


@pytest.mark.parametrize(
    "name",
    ["../up/there", "/etc/passwd", "a/../b", "a/b/c", "a//b", "./a/b", "a/..", "..", "a b/c", "a/b\n", "-a/b", "C:/x",
     "a/" + "b" * 97, "https://x.y/z", ""],
)  # fmt: skip
def test_names_that_are_no_hub_id(name: str, monkeypatch: Any) -> None:
    import huggingface_hub

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub must not be asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    assert not is_hub_id(name)
    with pytest.raises((ValueError, FileNotFoundError), match="must be a folder"):
        HeadProfile.from_pretrained(name)
    with pytest.raises(ValueError, match="`repo_id` must be"):
        make(FINGERPRINT).push_to_hub(name)


def test_folders_without_a_profile(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a folder that holds head_profile.json"):
        HeadProfile.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ValueError, match="got the file"):
        HeadProfile.from_pretrained(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="must be a folder that exists"):
        HeadProfile.from_pretrained(tmp_path / "absent")
    with pytest.raises(TypeError, match="`source` must be a folder or a Hub id, got 3"):
        HeadProfile.from_pretrained(3)


def test_no_network_is_said_clearly() -> None:
    with pytest.raises(OSError, match=r"must be a profile on the Hub that can be reached, got 'some/profile'"):
        HeadProfile.from_pretrained("some/profile")
    with pytest.raises(OSError, match=r"must be a repository that can be written, got 'some/profile'"):
        make(FINGERPRINT).push_to_hub("some/profile")


@pytest.mark.parametrize("measured", [False, True])
def test_hub_round_trip(profile: HeadProfile, tmp_path: Path, monkeypatch: Any, measured: bool) -> None:
    """Against a hub that is a folder."""
    import shutil

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    calls = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> None:
            calls.append((repo_id, kwargs))

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            calls.append((repo_id, kwargs))
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}/commit/1"

    def download(repo_id: str, name: str) -> str:
        found = tmp_path / repo_id / name
        if not found.exists():
            raise EntryNotFoundError(f"no {name}")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if measured:
        names = ("density", "seconds", "recall", "output_error", "output_error_p95")
        zeros = {n: np.zeros((1, 2, 4, 4), np.float32) for n in names}
        profile = replace(profile, measurements=Measurements(METHODS, ("0", "1"), 4, 2, (Case(64),), zeros))
    where = profile.push_to_hub("me/profile", private=True, token="t", revision="new")
    assert where == "https://hub/me/profile/commit/1"
    assert calls[0] == ("token", "t")
    assert calls[1] == ("me/profile", {"private": True, "repo_type": "model", "exist_ok": True})
    assert calls[2][1] == {"repo_type": "model", "commit_message": "Upload head profile", "revision": "new"}
    read = HeadProfile.from_pretrained("me/profile")
    same(profile, read)
    assert (read.measurements is not None) == measured
    assert 'hsa.patch(model, "me/profile")' in (tmp_path / "me/profile/README.md").read_text()
    with pytest.raises(OSError, match="can be reached, got 'me/nothing'"):
        HeadProfile.from_pretrained("me/nothing")


# ------------------------------------------------------------------ card


def test_card_is_made_from_the_profile(profile: HeadProfile) -> None:
    made = replace(profile, calibration={"model": "meta/Llama", "source": "a|b\n---\ntags: x <script>`"})
    text = card(made)
    front = text.split("---\n")[1]
    assert 'base_model: "meta/Llama"' in front and "tags" in front and "script" not in front
    assert "a\\|b --- tags: x &lt;script>'" in text
    assert "sliding_window(window=24, sink=3, block_size=32)" in text and "| damage |" in text
    assert "hsa.patch(model," in text and "mean density" in text
    assert "base_model" not in card(replace(profile, calibration={"model": "x: y\nz/../.."}))


# ------------------------------------------------------------------ patch


def test_patch_takes_a_profile_a_folder_and_a_path(tmp_path: Path) -> None:
    model = LMS["llama"]("sdpa")
    made = make(Fingerprint.of(model), choice=[[1, 2, 0, 1], [2, 2, 1, 0]])
    made.save_pretrained(tmp_path)
    ids = tokens(2, 111)
    outputs = []
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for method in (made, tmp_path, str(tmp_path)):
            with hsa.patch(model, method, min_tokens=0) as patch:
                outputs.append(model(input_ids=ids).logits)
                report = patch.report()
            assert all(r.sparse_calls == 1 and not r.dense_calls for r in report.layers)
            assert [r.requested_density for r in report.layers] == pytest.approx(
                [made.layer_density(0), made.layer_density(1)], rel=1e-3
            )
            assert "head_profile" in str(report) and json.dumps(report.to_dict())
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(outputs[0], o) for o in outputs)
    assert not torch.equal(outputs[0], before)


def test_patch_refuses_parameters_beside_a_profile() -> None:
    model = LMS["llama"]("sdpa")
    made = make(Fingerprint.of(model))
    with pytest.raises(TypeError, match="is a profile, which holds all parameters; got window besides"):
        hsa.patch(model, made, window=3)
    with pytest.raises(TypeError, match="got quality besides"):
        hsa.patch(model, made, quality="high")


def test_names_that_are_no_profile_raise_what_they_did(tmp_path: Path, monkeypatch: Any) -> None:
    model = LMS["llama"]("sdpa")
    with pytest.raises(ValueError, match=r"`method` must be one of .*dense.*; got 'no_such_method'"):
        hsa.patch(model, "no_such_method")
    with pytest.raises(TypeError, match="`method` must be a name or a Method, got 3"):
        hsa.patch(model, 3)
    with pytest.raises(ValueError, match="must be a folder that exists or a Hub id"):
        hsa.patch(model, "./no/such/folder")
    # A folder of the same name does not hide a method.
    (tmp_path / "dense").mkdir()
    monkeypatch.chdir(tmp_path)
    with hsa.patch(model, "dense") as patch:
        assert patch.method.name == "dense"
