"""What a record counts of decoding, and how the report tells it apart from prefill."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse_attn as hsa
from hf_sparse_attn.record import Done, LayerRecord, Work
from hf_sparse_attn.report import Decoding, Report


def records() -> list[LayerRecord]:
    """Two layers: one prompt each, then steps, of which the first layer reads all keys."""
    found = [LayerRecord(f"layer {i}", i) for i in range(2)]
    nothing = torch.zeros(1)
    for record in found:
        record.count_sparse([Done(nothing, nothing, 0.5, 2.0, Work(1000))])
    found[0].count_decode("exact", Work(100, True), 1.0, "cpp_decode")
    for kept, pages, gain in ((torch.tensor(0.25), 3, 2.0), (0.5, 4, 4.0)):
        found[1].count_decode("quest", Work(100, True), kept, "cpp_decode", pages, gain)
    return found


def test_decoding_is_counted_by_itself() -> None:
    first, second = (record.report(0.5) for record in records())
    # Prefill is as before.
    assert (first.sparse_calls, first.dense_calls, first.density, first.predicted_gain) == (1, 0, 0.5, 2.0)
    assert second.prefill == first.prefill == (500.0, 1000)
    assert (first.decode, second.decode) == ((100.0, 100), (75.0, 200))
    assert first.decoding == {"exact": Decoding(1, 1.0, 0, None, {"cpp_decode": 1}, 100)}
    assert second.decoding == {"quest": Decoding(2, 0.375, 7, 3.0, {"cpp_decode": 2}, 200)}


def test_the_report_tells_of_decoding_apart_from_prefill() -> None:
    found = Report("strided", {"step": 2}, "llama", [record.report(0.5) for record in records()])
    assert found.prefill_density == 0.5
    assert found.decode_density == pytest.approx(175 / 300)
    shown = str(found)
    assert "decoding, not by the model's own attention" in shown
    row = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["quest"])
    assert row == ["quest", "1", "2", "0.375", "3.5", "3.00x", "cpp_decode"]
    assert "0.375" in found._repr_html_()
    told = json.loads(json.dumps(found.to_dict()))
    assert told["decoding"]["quest"] == {
        "calls": 2, "density": 0.375, "pages": 7, "gain": 3.0, "backends": {"cpp_decode": 2}, "visible": 200,
    }  # fmt: skip
    assert told["layers"][1]["decoding"]["quest"]["calls"] == 2
    # Without decoding there is no word of it.
    assert "decoding" not in str(Report("strided", {}, "llama", [LayerRecord("one", 0).report(None)]))


def test_layers_of_one_way_are_summed_up_by_their_pairs() -> None:
    found = records()
    found[0].count_decode("quest", Work(600, True), 0.75, "torch_gather", 2)
    whole = Report("strided", {}, "llama", [record.report(0.5) for record in found]).decoding["quest"]
    assert whole == Decoding(3, 525 / 800, 9, 3.0, {"torch_gather": 1, "cpp_decode": 2}, 800)


def test_a_model_that_generates_tells_of_its_steps() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(3, 64, (1, 400))
    with hsa.patch(model, "exact", decode=hsa.get_method("quest")(density=0.5, skip_layers=0), min_tokens=0) as patch:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, eos_token_id=None, do_sample=False)
        report = patch.report()
    steps = report.decoding
    assert sum(found.calls for found in steps.values()) == 2 * 4
    assert report.prefill_density == 1.0 and report.decode_density is not None and report.decode_density < 1.0
    assert steps["quest"].density < 1 and steps["quest"].pages > 0
