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
from hf_sparse_attn.coverage import tiny_transformers as coverage_tiny
from hf_sparse_attn.coverage.listing import STATUSES, Coverage, coverage_counts, coverage_summary, coverage_table
from hf_sparse_attn.coverage.of_transformers import transformers_classes, transformers_tasks
from hf_sparse_attn.session import Session

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
    "DeepseekV32ForCausalLM": "attention of deepseek_v32 is sparse by itself",
    "MiniMaxM3VLForCausalLM": "attention of minimax_m3_vl_text is sparse by itself",
    "Glm5NextForConditionalGeneration": "attention of glm5_next_text is sparse by itself",
    "InklingForCausalLM": "position bias",
    "UdopForConditionalGeneration": "position bias",
}


def here(*names: str) -> list[str]:
    """Those of the classes that the transformers installed here has."""
    return [name for name in names if name in transformers_tasks()]


@pytest.fixture(scope="module")
def listed() -> list[Coverage]:
    """Classes of every kind, and some that are declined."""
    return transformers_classes(names=here(*KINDS, *DECLINED))


@pytest.mark.parametrize("name", KINDS)
def test_a_tiny_instance_is_verified(name: str) -> None:
    if not here(name):
        pytest.skip("not in this transformers")
    found = transformers_classes(verify=True, names=[name])[0]
    assert (found.status, found.note, found.reason) == ("verified", None, None)
    assert (found.family, found.way, found.built) == (KINDS[name], "interface", True)


@pytest.mark.parametrize("name", DECLINED)
def test_a_class_is_declined_with_its_reason(name: str) -> None:
    if not here(name):
        pytest.skip("not in this transformers")
    found = transformers_classes(verify=True, names=[name])[0]
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
    assert transformers_classes(verify=True, names=[LLAMA])[0].verified
    assert logging.get_verbosity() == before
    assert torch.equal(torch.get_rng_state(), state)


class _Faults:
    """Ways in which a patch could go wrong, by what is said of it then."""

    @staticmethod
    def wrong(patch: pytest.MonkeyPatch) -> None:
        sparse = Session.sparse

        def off(self: Session, *args: Any, **kwargs: Any) -> Any:
            done = sparse(self, *args, **kwargs)
            return None if done is None else (done[0] * 1.001, done[1])

        patch.setattr(Session, "sparse", off)

    @staticmethod
    def dense(patch: pytest.MonkeyPatch) -> None:
        def never(self: Session, record: Any, *args: Any, **kwargs: Any) -> None:
            record.dense_reasons["because"] += 1

        patch.setattr(Session, "sparse", never)

    @staticmethod
    def left(patch: pytest.MonkeyPatch) -> None:
        """The output changes with every forward after the first patch was removed."""
        run, seen = coverage_transformers._run, [0]

        def changing(model: Any, inputs: Any, state: str) -> Any:
            out = run(model, inputs, state)
            seen[0] += state == "sparse"
            return out + 1.0 if state == "unpatched" and seen[0] else out

        patch.setattr(coverage_transformers, "_run", changing)

    @staticmethod
    def restless(patch: pytest.MonkeyPatch) -> None:
        run = coverage_transformers._run
        patch.setattr(coverage_transformers, "_run", lambda *a: (out := run(*a)) + torch.rand(out.shape))

    @staticmethod
    def bits(patch: pytest.MonkeyPatch) -> None:
        run = coverage_transformers._run
        patch.setattr(coverage_transformers, "_run", lambda m, i, s: run(m, i, s) + (1e-4 if s == "dense" else 0.0))

    @staticmethod
    def nothing(patch: pytest.MonkeyPatch) -> None:
        """A short window that is none."""
        patch.setattr(coverage_transformers, "_LITTLE", coverage_transformers._EVERYTHING)

    @staticmethod
    def infinite(patch: pytest.MonkeyPatch) -> None:
        run = coverage_transformers._run
        patch.setattr(coverage_transformers, "_run", lambda *a: run(*a) / 0)

    @staticmethod
    def large(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(coverage_transformers, "_MOST_WEIGHTS", 1000)

    @staticmethod
    def crash(patch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no\n  such kernel")

        patch.setattr(Session, "sparse", refuse)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("wrong", "with every key kept its output is off by"),
        ("dense", "no call ran sparse: because"),
        ("left", "after the patch was removed its output differs"),
        ("restless", "its output differs from run to run"),
        ("bits", "patched with method dense its output differs"),
        ("nothing", "attention has no part in its output"),
        ("infinite", "its output is not finite"),
        ("large", "million weights"),
        ("crash", "a forward of input_ids alone fails, sparse: RuntimeError: no such kernel"),
    ],
)
def test_a_faulty_patch_is_not_verified(fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(_Faults, fault)(monkeypatch)
    found = transformers_classes(verify=True, names=[LLAMA])[0]
    assert found.status == "patched" and found.family == "llama"
    assert said in (found.note or "")


def test_a_slow_forward_ends_the_trial() -> None:
    found = transformers_classes(verify=True, names=[LLAMA], seconds=1e-9)[0]
    assert found.note == "one forward takes more than 1e-09 s"


def test_a_class_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", refuse)
    found = transformers_classes(verify=True, names=[LLAMA, "MistralForCausalLM"])
    assert found[0].status == "not built" and found[0].reason == "could not be built: ImportError: needs a package"
    assert found[1].status == "verified"


def test_guards() -> None:
    with pytest.raises(ValueError, match="`names` must be classes that transformers lists, got Nothing"):
        transformers_classes(names=["Nothing"])
    with pytest.raises(ValueError, match="`seconds` must be positive, got 0"):
        transformers_classes(seconds=0)
    with pytest.raises(ValueError, match="`library` must be transformers, diffusers or all, got 'timm'"):
        coverage_run.coverage_of("timm")  # type: ignore[arg-type]


def test_a_shrunk_configuration_keeps_kinds_of_layers_and_its_sums() -> None:
    sizes = coverage_tiny._shrunk(
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
    assert sizes["hidden_size"] == 48 and sizes["image_token_id"] < sizes["vocab_size"] == coverage_tiny.VOCAB
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
    assert main(["coverage", "--library", "transformers", "--verify"]) == 0
    out = capsys.readouterr().out
    assert LLAMA in out and "verified" in out and "no causal self-attention" in out
    last = out.strip().splitlines()[-3:]
    assert last[0].startswith("transformers causal LM: 2 classes: 1 verified, 0 can be patched, not verified, 1 decl")
    assert last[1].startswith("transformers image-text: 1 classes: 1 verified") and torch.__version__ in last[2]


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

    config = next(iter(coverage_tiny.tiny_configs(transformers.LlamaForCausalLM)))
    model = coverage_tiny.tiny_model(transformers.LlamaForCausalLM, config)
    model.model.layers[0].self_attn.indexer = SomeIndexer()
    with pytest.raises(TypeError, match="attention of llama is sparse by itself"):
        hsa.patch(model, "dense")
