"""The command that compares methods at equal density, on the shipped models."""

import json

import pytest

from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.evaluation.result import estimate_share
from hf_sparse_attn.evaluation.run import base_method, turnable_methods
from hf_sparse_attn.registry import METHODS

SHORT = ["eval", "--model", "language", "--tokens", "1024", "--documents", "1", "--threads", "1"]


def test_language_figures_and_files(tmp_path, capsys):
    options = ["--methods", "sliding_window,radial", "--densities", "0.25,0.5", "--no-profile"]
    assert main([*SHORT, *options, "--output", str(tmp_path), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    dense, *rows = result["rows"]
    assert (dense["name"], dense["density"], dense["recall"], dense["output_error"]) == ("dense", 1.0, 1.0, 0.0)
    assert sum(dense["by_depth"]) > 0 and len(dense["by_depth"]) == 8
    assert [row["name"] for row in rows] == ["sliding_window"] * 2
    for row, wanted in zip(rows, (0.25, 0.5), strict=True):
        assert row["density"] == pytest.approx(wanted, rel=0.03) and row["wanted"] == wanted
        assert 0 < row["recall"] < 1 and 0 < row["output_error"] < 1 and row["estimate_share"] < 0.5
        assert row["loss"] > dense["loss"]
    assert rows[0]["output_error"] > rows[1]["output_error"] and rows[0]["recall"] < rows[1]["recall"]
    assert result["skipped"] == {"radial": "radial needs a bidirectional layout, got causal 1024 text"}
    assert json.loads((tmp_path / "eval.json").read_text())["machine"]["torch"]
    assert "sliding_window" in (tmp_path / "eval.md").read_text()
    assert (tmp_path / "eval_language.png").stat().st_size > 10_000


def test_video_figures_and_files(tmp_path, capsys):
    pytest.importorskip("diffusers")
    options = ["--methods", "block_topk,vertical_slash", "--densities", "0.25", "--no-profile", "--threads", "1"]
    assert main(["eval", "--model", "video", "--clips", "1", *options, "--output", str(tmp_path), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    dense, row = result["rows"]
    assert dense["ssim"] == 1 and row["name"] == "block_topk" and row["density"] == pytest.approx(0.25, rel=0.05)
    assert 10 < row["psnr"] < 60 and 0.3 < row["ssim"] < 1 and 0 < row["recall"] < 1
    assert result["skipped"]["vertical_slash"].startswith("vertical_slash needs a causal layout, got bidirectional")
    for name in ("eval_video.png", "eval_video_frames.png"):
        assert (tmp_path / name).stat().st_size > 5_000


def test_a_budget_that_no_choice_meets_is_said():
    from hf_sparse_attn.evaluation.language import needle_document, profile_batch, profiles
    from hf_sparse_attn.shipped.byte_llama import load_model

    document, skipped = needle_document(700, 8), {}
    (found,) = profiles(load_model(), [document], (1e-3, 0.5), skipped, lambda method: method.profile.density)
    assert found.wanted == 0.5 and found.fit.density == pytest.approx(0.5, rel=0.02)
    assert skipped == {"per-head profile at 0.001": skipped["per-head profile at 0.001"]}
    assert "`budget` must be at least" in skipped["per-head profile at 0.001"]
    asked, stated = profile_batch(document)["needles"][0]
    ids = document.token_ids[0]
    assert [ids[a + 1] for a in asked] == [ids[s] for s in stated]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "dense"], "`methods` must be such whose density can be set, got 'dense'"),
        (["--methods", "magic"], "`method` must be one of"),
        (["--documents", "0"], "`documents` must be at least 1, got 0"),
        (["--densities", "2"], "`density`"),
        (["--threads", "0"], "`threads` must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_clear_line(options, message, capsys):
    given = [*SHORT, "--methods", "sliding_window", "--no-profile"]
    assert main([*given, *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


@pytest.mark.parametrize("name", turnable_methods(None))
@pytest.mark.parametrize("tokens, block", [(300, 16), (2048, 32), (4096, 64), (100_000, 128)])
def test_base_methods_have_blocks_in_proportion(name, tokens, block):
    method = base_method(name, TokenLayout.causal(tokens))
    assert getattr(method, "block_size", block) == block
    assert type(method) is METHODS.get(name)


def test_choosing_costs_a_static_method_nothing_to_speak_of():
    from hf_sparse_attn.evaluation.language import captured, load_model, needle_document

    calls = captured(load_model(), needle_document(1024, 8))
    assert [call.ctx.layer for call in calls] == list(range(len(calls)))
    shares = {
        n: estimate_share(base_method(n, calls[0].ctx.layout), calls)
        for n in ("sliding_window", "vertical_slash", "dense")
    }
    assert shares["sliding_window"] < shares["vertical_slash"]
