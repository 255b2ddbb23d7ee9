"""Regular expressions of strangers: matched as `re` matches them, in time that they cannot draw out."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.training.lora import adapter as lora_adapter
from hf_sparse_attn.training.lora import pattern as lora_pattern
from hf_sparse_attn.training.lora.adapter import add_lora
from hf_sparse_attn.training.lora.pattern import NamePattern
from hf_sparse_attn.training.lora.settings import LoraSettings
from tests.support import tiny_lm
from tests.support.lora_cases import CASES, assert_same, shake, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "model.layers.11.mlp.down_proj",
    "model.visual.blocks.3.attn.qkv",
    "model.language_model.layers.7.self_attn.o_proj",
    "lm_head",
    "a-b.Ärger_1",
    "",
]
# As they stand in published adapters, and one for each construct.
PATTERNS = [
    r".*\.q_proj",
    r".*language_model.*\.(q_proj|v_proj|o_proj)",
    r"model\.layers\.\d+\.self_attn\.(?:q|k)_proj",
    r"(?!.*visual).*(?:qkv|q_proj|down_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn).*?(?:o_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\..*)",
    r".*layers\.(?:[0-9]|1[01])\.(?=mlp).*",
    r"^model(\.\w+)+\.(q|k)_proj$",
    r"(?:\w+\.)*lm_head",
    r"[^.]*\.?[^\d]+\d?",
    r"[a-c\-]*b\.[\W\w]+_\d",
    r"\w{2,3}\S{4,}",
    r"(\w+|\.){3,9}",
    r"\w*\b\w*",
    r"(?:x*)*",
    r"()*",
    r".*\Bproj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_matches_what_re_matches(pattern: str) -> None:
    assert [NamePattern(pattern).matches(n) for n in NAMES] == [bool(re.fullmatch(pattern, n)) for n in NAMES]


def test_it_matches_what_re_matches_on_all_short_names() -> None:
    names = ["".join(chars) for size in range(5) for chars in itertools.product("ab.", repeat=size)]
    for pattern in (
        r"(?:a|ab)(?:c|bcd|b*)", r"(a?){2,3}b*", r"(?:ab?){2,}", r"a{0}b*?", r"(?:a*b)*\.?", r"(?!a\b).*",
        r"(?:\b|a)*b", r"(?:a{2}){1,2}", r"a*?(?=\.|b)[.b]*", r"(?:(?:a|\.)*b){2}",
    ):  # fmt: skip
        found = NamePattern(pattern)
        assert [n for n in names if found.matches(n)] == [n for n in names if re.fullmatch(pattern, n)], pattern


@pytest.mark.parametrize(
    "pattern, said",
    [
        (r"(a)\1*", "got groupref"),
        (r"(?<=a).*", "got assert"),
        (r"(?i).*", "must have no flags"),
        (r"(?i:a).*", "got subpattern"),
        (r"(?:(?:(?:(?:(?:a*)*)*)*)*)*", "at most 4 deep, got max_repeat"),
        (r"*", "it must be a regular expression: nothing to repeat"),
        ("a*" * 501, "at most 1000 characters, got 1002"),
        ("(" * 400 + "a*" + ")" * 400, None),
    ],
)
def test_what_it_does_not_follow_is_refused(pattern: str, said: str | None) -> None:
    if said is None:
        assert NamePattern(pattern).matches("aa")
        return
    with pytest.raises(ValueError, match=said):
        NamePattern(pattern)
    model = tiny_lm.FAMILIES["llama"]("sdpa")
    with pytest.raises(ValueError, match="`targets` must be a regular expression, got .*" + said):
        add_lora(model, LoraSettings(targets=(pattern,)))


def test_twice_the_name_takes_no_more_than_thrice_the_steps(monkeypatch: Any) -> None:
    """Repetitions within repetitions, on names of a length that is harmless to `re`, too."""
    step, steps = lora_pattern._step, [0]

    def counted(*args: Any) -> int:
        steps[0] += 1
        return step(*args)

    monkeypatch.setattr(lora_pattern, "_step", counted)
    for pattern in (r"(?:a*)*b", r"(?:a|a)*b", r"(?:(?:a?){3})*b", r"a*a*a*a*b"):
        found, taken = NamePattern(pattern), []
        for size in (6, 12):
            steps[0] = 0
            assert not found.matches("a" * size)
            taken.append(steps[0])
        assert taken[1] <= 3 * taken[0] <= 300, (pattern, taken)


def test_no_expression_of_a_bundle_reaches_re(tmp_path: Path, monkeypatch: Any) -> None:
    pattern = r"model\.layers\.\d+\.(?:self_attn\.[qv]|mlp\.down)_proj"
    adapter = add_lora(CASES["llama"].build(), LoraSettings(rank=2, targets=(pattern,)))
    shake(adapter)
    names = [name for name, _ in adapter.layers()]
    assert len(names) == 6
    hsa.save_bundle(tmp_path, model=adapter.model, base_model="x", adapter=adapter, sparse=None, figures={}, recipe={})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == pattern
    with torch.no_grad():
        expected = CASES["llama"].run(adapter.model)
    given: list[Any] = []
    for name in ("fullmatch", "match", "search", "compile"):
        own = getattr(re, name)
        monkeypatch.setattr(re, name, lambda p, *args, own=own, **kw: given.append(p) or own(p, *args, **kw))
    model = CASES["llama"].build()
    before = snapshot(model)
    with hsa.load_bundle(model, tmp_path) as loaded, torch.no_grad():
        assert [name for name, _ in loaded.adapter.layers()] == names
        assert torch.equal(CASES["llama"].run(model), expected)
        loaded.adapter.save(tmp_path / "again")
        again = json.loads((tmp_path / "again/adapter_config.json").read_text())
        assert again["target_modules"] == pattern
    assert_same(before, snapshot(model))
    assert given and pattern not in given


@pytest.mark.parametrize(
    "key, value",
    [
        ("rank_pattern", {r".*q_proj": 4}),
        ("alpha_pattern", {r"(?:\w+\.)*q_proj": 4}),
        ("layers_pattern", "layers"),
        ("exclude_modules", r".*\.v_proj"),
        ("target_parameters", ["weight"]),
        ("trainable_token_indices", [1]),
    ],
)
def test_other_expressions_of_a_file_are_refused_and_not_matched(
    key: str, value: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter = add_lora(CASES["llama"].build(), CASES["llama"].plain)
    adapter.save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    model = CASES["llama"].build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"must hold a plain LoRA adapter, got {key}"):
        lora_adapter.load_lora(model, tmp_path)
    assert_same(before, snapshot(model))


def test_an_expression_that_ends_as_another_name_adapts_its_own_alone() -> None:
    """peft takes names for ends of names; those that were matched are whole."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})

    with add_lora(Two(), LoraSettings(rank=1, targets=(r"pro.*",))) as adapter:
        assert [name for name, _ in adapter.layers()] == ["proj"]


def test_many_names_take_no_time_for_each_module(tmp_path: Path) -> None:
    """A hundred thousand names in a file: each is looked up, and compared with no module."""
    adapter = add_lora(CASES["llama"].build(), CASES["llama"].plain)
    names = [*CASES["llama"].plain.targets] * 25_000
    assert lora_adapter.find_targets(adapter.model, LoraSettings(targets=tuple(names)))
    with pytest.raises(ValueError, match=r"`targets` must be modules of .*; got 'x0'"):
        lora_adapter.find_targets(adapter.model, LoraSettings(targets=tuple(f"x{i}" for i in range(100_000))))
