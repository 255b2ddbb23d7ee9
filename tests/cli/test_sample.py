"""`hf-sparse-attn sample`: a film of a clip with sparse attention, alone or beside the dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli import sample as command
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.evaluation import film
from hf_sparse_attn.evaluation.fidelity import psnr
from hf_sparse_attn.evaluation.film import Panel, write_film
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.shipped import moving
from hf_sparse_attn.shipped.moving_scenes import SceneClass
from tests.support import tiny_prompts

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def frames_of(file: str) -> list[Any]:
    """The frames of a film as [height, width, 3]."""
    if file.endswith(".gif"):
        opened = Image.open(file)
        images = []
        for number in range(opened.n_frames):
            opened.seek(number)
            images.append(opened.convert("RGB"))
    else:
        with av.open(file) as container:
            images = [frame.to_image() for frame in container.decode(video=0)]
    return [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(i.height, i.width, 3) for i in images]


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_a_film_shows_the_clips_beside_one_another_with_words_above(ending: str) -> None:
    # Patches of colour that half as many pixels of colour hold.
    clips = torch.rand(2, 5, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    file = Path(f"film{ending}")
    write_film([Panel(["dense", "seed 0"], clips[0]), Panel(["radial"], clips[1])], file, fps=10)
    frames = frames_of(str(file))
    # A short MP4 is shown again and again; a GIF goes round by itself.
    assert len(frames) == (5 if ending == ".gif" else 40)
    scale, words = 77, 50
    wide = 5 * scale
    assert frames[0].shape == (words + 3 * scale + 1, 2 * wide + 8, 3)
    for number in range(5):
        for clip, left in zip(clips, (0, wide + 8), strict=True):
            middle = frames[number][words + scale // 2 :: scale, left + scale // 2 : left + wide : scale].float() / 255
            assert (middle[:3] - clip[number].permute(1, 2, 0)).abs().max() < 0.1
    # Both panels have dark words on white.
    for left in (0, wide + 8):
        head = frames[0][:words, left : left + wide]
        assert head.float().mean() > 200 and head.min() < 80


def test_words_shrink_until_they_fit() -> None:
    line = "density 0.25, PSNR 26.3 dB, " + "and more " * 3
    write_film([Panel([line], torch.zeros(1, 3, 2, 2))], Path("a.gif"), fps=8)
    (frame,) = frames_of("a.gif")
    assert (frame[:28, -4:] > 200).all() and (frame[:28, 300:] < 80).any()


def test_a_film_that_cannot_be_written_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.mp4").write_bytes(b"before")
    monkeypatch.setattr(film, "_write_mp4", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_film([Panel(["a"], torch.zeros(1, 3, 2, 2))], Path("a.mp4"), fps=8)
    assert Path("a.mp4").read_bytes() == b"before" and [p.name for p in Path().iterdir()] == ["a.mp4"]


def test_dense_beside_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sample moving_wan --method block_topk --set block_size=16 --set density=0.25 --compare --steps 1 --seed 3"
    assert main([*line.split(), "--json", "--prompt", "red disc, left"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "moving_wan_block_topk.mp4" and found["shows"] == "red disc going left"
    dense, sparse = found["rows"]
    model, scene = moving.load_moving_wan(), SceneClass("disc", "red", "left")
    clip = moving.sample(model, [scene], steps=1, seed=3)[0]
    with hsa.patch(model, "block_topk", block_size=16, density=0.25, min_tokens=0) as applied:
        other = moving.sample(model, [scene], steps=1, seed=3)[0]
    assert sparse["psnr"] == pytest.approx(psnr(other, clip), abs=1e-6)
    assert sparse["density"] == pytest.approx(applied.report().density)
    assert (dense["density"], dense["ratio"], len(dense["seconds"])) == (1.0, None, 2)
    medians = [sum(row["seconds"]) / 2 for row in (dense, sparse)]
    assert sparse["ratio"] == pytest.approx(medians[1] / medians[0])
    frame = frames_of(found["output"])[7].float() / 255
    scale, words = 16, 50
    for shown, left in ((clip, 0), (other, 24 * scale + 8)):
        middle = frame[words + scale // 2 :: scale, left + scale // 2 : left + 24 * scale : scale]
        assert (middle - shown[7].permute(1, 2, 0)).abs().mean() < 0.03


def test_without_compare_the_clip_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    line = "sample moving_wan --method strided --set block_size=16 --steps 1 --output a.gif"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert "strided(" in out and "dense" not in out and out.endswith("wrote a.gif\n")
    assert frames_of("a.gif")[0].shape[1] == 384


def test_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_prompts.wan().save_pretrained("pipe")
    capsys.readouterr()
    call = '{"num_frames": 9, "height": 48, "width": 64, "guidance_scale": 1.0}'
    line = (
        "sample pipe --method block_topk --density 0.5 --set block_size=16 --compare --steps 1 --json --output a.gif"
    )
    assert main([*line.split(), "--prompt", "a dog", "--call", call]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][1]["attention"] == "block_topk(block_size=16, density=0.5)"
    # One run of each, in which the noise was the same.
    assert [len(row["seconds"]) for row in found["rows"]] == [1, 1] and found["rows"][1]["psnr"] > 20
    frames = frames_of("a.gif")
    assert len(frames) == 9 and frames[0].shape == (50 + 6 * 48, 2 * 6 * 64 + 8, 3)
    for options, said in (
        (
            "--method radial --density 0.5 --prompt dog",
            "`density` of radial must be set by its parameter",
        ),
        ("--method radial", "`prompt` must say what a pipeline is to show, got none for pipe"),
        ("--method radial --prompt dog --call {", "`call` must be a JSON object, got {"),
        ('--method radial --prompt dog --call {"output_type":"pt"}', "`call` must leave out what the command sets"),
    ):
        assert main(["sample", "pipe", *options.split()]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("model", ["byte_llama", "lm"])
def test_a_model_that_makes_no_pictures(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lm").mkdir()
    Path("lm/config.json").write_text("{}")
    assert main(["sample", model, "--method", "radial", "--prompt", "dog"]) == 2
    assert f"`model` must make videos or images, got {model}" in capsys.readouterr().err


def fit(name: str, density: float | None, grid: tuple[int, int, int], **settings: Any) -> Any:
    layout = TokenLayout.video(*grid)
    q, k = torch.randn(2, 1, 2, layout.kv_len, 8, generator=torch.Generator().manual_seed(0))
    calls = [Call(q, k, k, Context(layout, num_heads=2, num_kv_heads=2, head_dim=8))]
    subject = command.Subject(None, lambda steps: q, "", lambda: calls)
    return command._turned(name, settings, density, subject)


def test_a_method_is_turned_to_a_density_and_keeps_what_is_set(caplog: pytest.LogCaptureFixture) -> None:
    assert fit("block_topk", None, (6, 8, 8), block_size=16).density == pytest.approx(0.25, rel=0.1)
    assert fit("block_topk", 0.5, (6, 8, 8), block_size=16).density == pytest.approx(0.5, rel=0.1)
    assert not caplog.messages
    fit("radial", 0.05, (6, 8, 8), block_size=16)
    assert "radial comes no nearer to a density of 0.05 than 0." in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method radail", "`method` must be one of"),
        ("--method radial --set decy=1", "got decy (nearest: decay)"),
        ("--method radial --set decay", "`set` must be PARAMETER=VALUE, such as block_size=64, got 'decay'"),
        ("--method radial --set decay=-1", "`decay` must be more than 0, got -1"),
        ("--method radial --density 2", "`density` must be more than 0 and at most 1, got 2.0"),
        ("--method dense --density 0.5", "`density` must be left out for dense"),
        ("--method radial --density 0.5 --quality fast", "`density` must be left out beside --quality"),
        ("--set decay=1", "`method` must be given with --set"),
        ("--method radial --quality best", "`quality` must be one of high, balanced, fast; got 'best'"),
        ("--method radial --output a.avi", "`output` must end in .mp4 or .gif, got a.avi"),
        ("--method radial --output no/a.gif", "`output` must be in a folder that is there, got no/a.gif"),
        ("--method radial --steps 0", "`steps` must be at least 1, got 0"),
        ("--method radial --seed -1", "`seed` must be at least 0, got -1"),
        ("--method radial --frames-per-second 0", "`frames_per_second` must be at least 1, got 0"),
        ("--method radial --prompt dog", "`prompt` must name one of disc, square, cross for moving_wan, got 'dog'"),
        ("--method radial --call {}", "--call must be left out for moving_wan"),
        ("--method vertical_slash --set slash=9 --steps 1", "`method` 'vertical_slash' needs a causal layout"),
        ("--method ./nope", "`source` must be a folder that exists or a Hub id"),
    ],
    ids=lambda text: text.replace(" ", "-")[:40],
)
def test_what_cannot_work_is_one_line(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "moving_wan", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out and not list(Path().iterdir())


def test_a_missing_package_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert main("sample moving_wan --method radial --output a.mp4".split()) == 2
    assert "a film needs av (pip install 'hf-sparse-attn[video]')" in capsys.readouterr().err
