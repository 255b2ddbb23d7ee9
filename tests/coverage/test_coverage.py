"""What can be patched: every class is listed, some of every kind are run, and the command says it in three forms."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.coverage import of_transformers as coverage_transformers
from hf_sparse_attn.coverage import run as coverage_run
from hf_sparse_attn.coverage.listing import STATUSES, Coverage, coverage_counts, coverage_summary, coverage_table
from hf_sparse_attn.coverage.of_transformers import transformers_classes, transformers_tasks
from tests.coverage import trial, verify
from tests.coverage.trial import listed as asked
from tests.coverage.trial import verified
from tests.support import patch_faults
from tests.support import tiny_transformers as tiny

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = "LlamaForCausalLM"
# One of each kind: grouped heads, learnt positions, a mixture, soft caps, sinks, latent attention, state-space layers
# beside attention, an encoder made a decoder, key/value heads of one size, and models of images and text.
KINDS = {
    LLAMA: "llama",
    "GPT2LMHeadModel": "llama",
    "OPTForCausalLM": "llama",
    "GPTNeoXForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Gemma2ForCausalLM": "llama",
    "GptOssForCausalLM": "llama",
    "DeepseekV3ForCausalLM": "llama",
    "JambaForCausalLM": "llama",
    "BertLMHeadModel": "llama",
    "BambaForCausalLM": "llama",
    "LlavaForConditionalGeneration": "llama",
    "DeepseekV32ForCausalLM": "natively_sparse",
    "GlmMoeDsaForCausalLM": "natively_sparse",
    "MiniMaxM3VLForCausalLM": "natively_sparse",
    "DeepseekV4ForCausalLM": "natively_sparse",
    "Glm5NextForConditionalGeneration": "natively_sparse",
    "Qwen4ExpForCausalLM": "natively_sparse",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl",
    "Qwen3VLForConditionalGeneration": "qwen_vl",
    "BertForMaskedLM": "encoder",
    "ModernBertForMaskedLM": "encoder",
    "ViTForImageClassification": "encoder",
    "CLIPModel": "encoder",
    "Wav2Vec2ForCTC": "encoder",
    "WhisperForConditionalGeneration": "encoder",
    "BartForConditionalGeneration": "encoder",
}
DECLINED = {
    "MambaForCausalLM": "no causal self-attention",
    "FalconForCausalLM": "no causal self-attention",
    "InklingForCausalLM": "position bias",
    "UdopForConditionalGeneration": "position bias",
}


def here(*names: str) -> list[str]:
    """Those of the classes that the transformers installed here has."""
    return [name for name in names if name in transformers_tasks()]


def tried(name: str, **options: Any) -> Coverage:
    return verified(asked("transformers", names=[name])[0], **options)


@pytest.fixture(scope="module")
def listed() -> list[Coverage]:
    """Classes of every kind, and some that are declined."""
    return transformers_classes(names=here(*KINDS, *DECLINED))


@pytest.mark.parametrize("name", KINDS)
def test_a_tiny_instance_is_verified(name: str) -> None:
    if not here(name):
        pytest.skip("not in this transformers")
    found = tried(name)
    assert (found.status, found.note, found.reason) == ("verified", None, None)
    assert (found.family, found.way, found.built) == (KINDS[name], "interface", True)


@pytest.mark.parametrize("name", DECLINED)
def test_a_class_is_declined_with_its_reason(name: str) -> None:
    if not here(name):
        pytest.skip("not in this transformers")
    found = transformers_classes(names=[name])[0]
    assert found.status == "declined" and found.family is None
    assert DECLINED[name] in (found.reason or "")


@pytest.mark.slow
def test_every_class_is_listed_with_its_family_or_its_reason() -> None:
    listed = transformers_classes()
    assert [c.name for c in listed] == sorted(transformers_tasks())
    for c in listed:
        assert (c.family is None) == (c.reason is not None) == (c.way is None), c
        assert c.library == "transformers" and not c.verified and c.note is None
        assert c.file.startswith("transformers.models."), c
    counts = coverage_counts(listed)
    assert set(counts) == {f"transformers {task}" for task in coverage_transformers.TASKS}
    # Shares, as every version has more classes than the last; many encoders of images have no attention at all.
    for row in (counts["transformers causal LM"], counts["transformers image-text"]):
        assert row["patched"] >= 0.6 * row["classes"] and row["not built"] <= 0.1 * row["classes"], row


@pytest.mark.slow
def test_counts_add_up_and_one_class_may_count_twice(listed: list[Coverage]) -> None:
    for row in coverage_counts(listed).values():
        assert row["classes"] == sum(row[status] for status in STATUSES)
    twice = [c for c in listed if ", " in c.task]
    assert sum(row["classes"] for row in coverage_counts(listed).values()) == len(listed) + len(twice)
    columns, rows = coverage_table(listed)
    assert len(rows) == len(listed) and all(len(row) == len(columns) and all(row) for row in rows)


def test_the_summary_says_every_status() -> None:
    one = [Coverage("A", "a", "llama", "interface", None, True, True, "transformers", "causal LM")]
    two = [Coverage("B", "a", None, None, "why", False, False, "transformers", "causal LM, image-text")]
    assert coverage_summary([*one, *two]) == [
        "transformers causal LM: 2 classes: 1 verified, 0 can be patched, not verified, 0 declined, "
        "1 could not be built",
        "transformers image-text: 1 classes: 0 verified, 0 can be patched, not verified, 0 declined, "
        "1 could not be built",
    ]


def test_what_the_model_was_is_left_alone() -> None:
    """Neither the random state nor how much transformers says is changed."""
    from transformers.utils import logging

    before, state = logging.get_verbosity(), torch.get_rng_state()
    assert tried(LLAMA).status == "verified"
    assert logging.get_verbosity() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fault, said", patch_faults.FAULTS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_faulty_patch_is_not_verified(fault: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    found = tried(LLAMA)
    assert found.status == "patched" and found.family == "llama"
    assert said in (found.note or "")


def test_a_large_instance_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MOST_WEIGHTS", 1000)
    assert "million weights" in (tried(LLAMA).note or "")


def test_a_slow_forward_ends_the_trial() -> None:
    found = tried(LLAMA, seconds=1e-9)
    assert found.note == "one forward takes more than 1e-09 s"


def test_a_class_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", refuse)
    found = transformers_classes(names=[LLAMA, "MistralForCausalLM"])
    assert found[0].status == "not built" and found[0].reason == "could not be built: ImportError: needs a package"
    assert found[1].status == "patched"
    assert verified(found[0]) == found[0]


def test_guards() -> None:
    with pytest.raises(ValueError, match="`names` must be classes that transformers lists, got Nothing"):
        transformers_classes(names=["Nothing"])
    with pytest.raises(ValueError, match="`library` must be transformers, diffusers or all, got 'timm'"):
        coverage_run.coverage_of("timm")  # type: ignore[arg-type]


def test_a_shrunk_configuration_keeps_kinds_of_layers_and_its_sums() -> None:
    sizes = tiny._shrunk(
        {
            "num_hidden_layers": 9,
            "hidden_size": 48,
            "vocab_size": 50000,
            "image_token_id": 49999,
            "layer_types": ["linear"] * 8 + ["full_attention"],
            "rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default"},
            "vision_config": {"depth": 27, "num_heads": 16},
            "num_kv_shared_layers": 5,
            "eos_token_id": [7, 8],
            "tie": True,
        },
        2,
        False,
    )
    assert sizes["layer_types"] == ["linear", "full_attention"] and sizes["num_hidden_layers"] == 2
    # Never larger than it was, and ids inside the vocabulary.
    assert sizes["hidden_size"] == 48 and sizes["image_token_id"] < sizes["vocab_size"] == tiny.VOCAB
    assert sum(sizes["rope_parameters"]["mrope_section"]) == 48 // 4 // 2
    assert sizes["vision_config"] == {"depth": 2, "num_heads": 4}
    assert (sizes["num_kv_shared_layers"], sizes["eos_token_id"], sizes["tie"]) == (0, 2, True)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command over three classes."""
    whole = transformers_tasks()
    names = (LLAMA, "MambaForCausalLM", "LlavaForConditionalGeneration")
    monkeypatch.setattr(coverage_transformers, "transformers_tasks", lambda: {n: whole[n] for n in names})


def test_command_prints_a_table_and_counts(few: None, capsys: Any) -> None:
    assert main(["coverage", "--library", "transformers"]) == 0
    out = capsys.readouterr().out
    assert LLAMA in out and "patched" in out and "no causal self-attention" in out
    last = out.strip().splitlines()[-3:]
    assert last[0].startswith("transformers causal LM: 2 classes: 0 verified, 1 can be patched, not verified, 1 decl")
    assert last[1].startswith("transformers image-text: 1 classes: 0 verified, 1 can") and torch.__version__ in last[2]


def test_command_prints_json(few: None, capsys: Any) -> None:
    assert main(["coverage", "--library", "transformers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and "transformers" in found["versions"]
    by_name = {c["name"]: c for c in found["classes"]}
    assert by_name[LLAMA]["status"] == "patched" and by_name["MambaForCausalLM"]["status"] == "declined"
    assert found["counts"]["transformers causal LM"]["classes"] == 2


def test_command_prints_markdown(few: None, capsys: Any) -> None:
    assert main(["coverage", "--library", "transformers", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# Coverage" and "| transformers causal LM | 2 | 1 | 0 | 1 | 0 |" in lines
    assert any(line.startswith("| class | listed for | status |") for line in lines)
    assert any(line.startswith("- transformers causal LM: 2 classes") for line in lines)


def test_verify_writes_the_list(few: None, capsys: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", "--library", "transformers", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    verify.main()
    assert "| transformers causal LM | 2 | 1 | 1 | 1 | 0 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "coverage.json").read_text())
    assert {c["name"]: c["status"] for c in written["classes"]} == {
        LLAMA: "verified",
        "MambaForCausalLM": "declined",
        "LlavaForConditionalGeneration": "verified",
    }
    assert (tmp_path / "coverage.md").read_text().startswith("# Coverage")


def test_command_without_diffusers(few: None, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(coverage_run, "find_spec", lambda name: None if name == "diffusers" else find(name))
    assert main(["coverage"]) == 0
    said = capsys.readouterr()
    assert "diffusers is not installed" in said.err and "diffusers" not in said.out
    assert main(["coverage", "--library", "diffusers"]) == 2
    assert "`library` must be installed, got 'diffusers'" in capsys.readouterr().err


def test_command_lists_diffusers(few: None, capsys: Any) -> None:
    pytest.importorskip("diffusers")
    assert main(["coverage", "--library", "diffusers"]) == 0
    out = capsys.readouterr().out
    assert "WanTransformer3DModel" in out and "diffusers transformer: " in out


def test_a_model_of_text_alone_with_an_indexer_is_refused() -> None:
    """By the parts of the decoder, whatever it is called."""
    import transformers

    class SomeIndexer(torch.nn.Module):
        pass

    config = next(iter(tiny.tiny_configs(transformers.LlamaForCausalLM)))
    model = tiny.tiny_model(transformers.LlamaForCausalLM, config)
    model.model.layers[0].self_attn.indexer = SomeIndexer()
    with pytest.raises(TypeError, match="attention of llama is sparse by itself"):
        hsa.patch(model, "dense")
