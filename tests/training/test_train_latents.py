"""Latents come back bit for bit, a damaged folder is refused by name, and a kill costs one shard at most."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse_attn.training.video import latents as train_latents
from hf_sparse_attn.training.video.latents import INDEX, LatentData, LatentSample, LatentWriter
from tests.support.latents import write_latents
from tests.support.processes import exit_code

# Above the bytes of two samples of `_sample` and below those of three.
SHARD = 5000


def _sample(number: int, dtype: torch.dtype = torch.float32) -> LatentSample:
    made = torch.Generator().manual_seed(number)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made).to(dtype)

    conditions = {"prompt_embeds": random(7, 5), "prompt_attention_mask": torch.arange(7) < 3 + number % 3}
    if number % 2:
        conditions["image_embeds"] = random(2, 3)
    return LatentSample(random(4, 3, 5 + number % 4, 7), conditions)


def _samples(count: int = 9) -> list[LatentSample]:
    return [_sample(number) for number in range(count)]


def _assert_same(found: LatentSample, expected: LatentSample) -> None:
    assert found.latents.dtype == expected.latents.dtype and torch.equal(found.latents, expected.latents)
    assert set(found.conditions) == set(expected.conditions)
    for name, value in expected.conditions.items():
        assert found.conditions[name].dtype == value.dtype and torch.equal(found.conditions[name], value)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [1, SHARD, 1 << 20], ids=["one each", "a few each", "one for all"])
def test_samples_of_many_shapes_come_back_bit_for_bit(shard_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    samples = [_sample(number, dtype) for number in range(9)]
    data = write_latents(tmp_path / "latents", samples, shard_bytes)
    assert len(data) == 9
    shards = len(_shards(tmp_path / "latents"))
    assert 1 < shards < 9 if shard_bytes == SHARD else shards == (9 if shard_bytes == 1 else 1)
    for index in (8, 0, 3, 4, 1, 2, 7, 6, 5):
        _assert_same(data[index], samples[index])
    assert [sample.latents.shape for sample in data] == [sample.latents.shape for sample in samples]
    assert sorted(p.name for p in (tmp_path / "latents").iterdir() if p.name.startswith(".")) == []
    for index in (9, -1):
        with pytest.raises(IndexError, match=f"`index` must be from 0 to 8, got {index}"):
            data[index]


def test_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    samples = _samples(40)
    data = write_latents(tmp_path, samples, 1)
    for index in [*range(40), 0, 39, 20]:
        _assert_same(data[index], samples[index])


def test_what_was_given_may_change_afterwards(tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path)
    whole = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    # A view, one that is not contiguous, and one tensor under two names.
    writer.add(LatentSample(whole.transpose(1, 3), {"a": whole[0], "b": whole[0]}), "first")
    expected = whole.clone()
    whole.zero_()
    writer.close()
    data = LatentData(tmp_path)
    _assert_same(data[0], LatentSample(expected.transpose(1, 3), {"a": expected[0], "b": expected[0]}))
    assert data.name(0) == "first"


# ---------------------------------------------------------------------- stopping and going on


def _broken(at: int) -> Iterator[LatentSample]:
    for number, sample in enumerate(_samples()):
        if number == at:
            raise RuntimeError("interrupted")
        yield sample


@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_an_interrupted_run_is_refused_and_gone_on_with(at: int, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        write_latents(tmp_path, _broken(at), SHARD)
    with pytest.raises(ValueError, match=r"written to the end, got \d samples of a run that stopped in"):
        LatentData(tmp_path)
    kept = {p: (p.stat().st_ino, p.read_bytes()) for p in _shards(tmp_path)}
    assert len(LatentWriter(tmp_path)) <= at
    data = write_latents(tmp_path, _samples(), SHARD)
    for index, expected in enumerate(_samples()):
        _assert_same(data[index], expected)
    # What was there has not been written again.
    assert all(p.stat().st_ino == inode and p.read_bytes() == held for p, (inode, held) in kept.items())
    whole = write_latents(tmp_path / "at once", _samples(), SHARD)
    assert whole.samples == data.samples


def test_a_finished_folder_is_opened_and_not_written(tmp_path: Path) -> None:
    write_latents(tmp_path, _samples(), SHARD, {"size": (1, 2)})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = write_latents(tmp_path, _broken(0), SHARD, {"size": (1, 2)})
    assert len(again) == 9 and {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_kill_between_shards_and_index(tmp_path: Path) -> None:
    """A process that ends at once, with a shard on the disk that the index does not name yet."""

    def run() -> None:
        real, calls = train_latents.LatentWriter._write_index, []

        def write(self: Any) -> None:
            calls.append(0)
            if len(calls) == 3:
                os._exit(9)
            real(self)

        train_latents.LatentWriter._write_index = write
        write_latents(tmp_path / "latents", _samples(), SHARD)

    assert exit_code(run) == 9
    assert len(_shards(tmp_path / "latents")) == 2
    index = json.loads((tmp_path / "latents" / INDEX).read_text())
    assert {s["shard"] for s in index["samples"]} == {"latents-00000.safetensors"}
    data = write_latents(tmp_path / "latents", _samples(), SHARD)
    for number, expected in enumerate(_samples()):
        _assert_same(data[number], expected)


def test_a_full_disk_is_an_error_of_the_system_and_loses_nothing(tmp_path: Path) -> None:
    folder, said = tmp_path / "latents", tmp_path / "said"

    def run() -> None:
        writer = LatentWriter(folder)
        writer.add(LatentSample(torch.zeros(1, 1, 9, 9), {}))
        writer.flush()
        # No file can be larger than this, as on a disk that has no more room.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        writer.add(LatentSample(torch.zeros(1, 1, 99, 99), {}))
        try:
            writer.flush()
        except OSError as error:
            said.write_text(str(error))

    assert exit_code(run) == 0
    assert f"{folder}/latents-00001.safetensors must have room on its disk" in said.read_text()
    assert len(LatentWriter(folder)) == 1
    assert {path.name for path in folder.iterdir()} == {INDEX, "latents-00000.safetensors"}


def test_left_over_files_are_removed_when_they_are_old(tmp_path: Path) -> None:
    new, old, other = (tmp_path / n for n in (".index.json.7", ".latents-00000.safetensors.8", ".keep"))
    for path in (new, old, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    LatentWriter(tmp_path)
    assert new.exists() and other.exists() and not old.exists()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (LatentSample(torch.zeros(3, 4, 5), {}), r"`latents` must be \[channels, .*\], got \[3, 4, 5\] for 'clip'"),
        (LatentSample(torch.zeros(3, 0, 4, 5), {}), r"`latents` must be \[channels"),
        (LatentSample(torch.full((1, 1, 1, 1), float("nan")), {}), "`latents` must be finite, got .* for 'clip'"),
        (LatentSample(torch.zeros(1, 1, 1, 1), {"a": torch.tensor([1, torch.inf])}), "`a` must be finite"),
        (LatentSample(torch.zeros(1, 1, 1, 1), {"latents": torch.zeros(1)}), "must not be called 'latents'"),
    ],
    ids=["three axes", "empty", "nan", "infinite", "name"],
)
def test_a_sample_that_is_none_is_refused(sample: LatentSample, message: str, tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path)
    with pytest.raises(ValueError, match=message):
        writer.add(sample, "clip")
    writer.add(_sample(0))
    assert len(writer) == 1


def test_writers_refuse_what_they_cannot_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`samples` must be at least one, got none"):
        write_latents(tmp_path / "none", [])
    with pytest.raises(ValueError, match="`shard_bytes` must be at least 1, got 0"):
        write_latents(tmp_path / "none", _samples(), 0)
    write_latents(tmp_path, _samples(1), SHARD, {"frames": 5})
    with pytest.raises(ValueError, match="`folder` must be empty or hold latents of the same key"):
        write_latents(tmp_path, _samples(1), SHARD, {"frames": 9})
    with pytest.raises(ValueError, match="must hold latents that were not finished"):
        LatentWriter(tmp_path, {"frames": 5}).add(_sample(0))


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def _truncate(folder: Path) -> None:
    path = _shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-3])


def _wrong_shape(folder: Path) -> None:
    path = _shards(folder)[0]
    held = load_file(path)
    held["1.prompt_embeds"] = held["1.prompt_embeds"][:-1].clone()
    save_file(held, path)


def _conditions(index: dict[str, Any]) -> dict[str, Any]:
    return index["samples"][2]["conditions"]  # type: ignore[no-any-return]


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no index": (lambda f: (f / INDEX).unlink(), FileNotFoundError, "`folder` must hold index.json"),
    "no shard": (lambda f: _shards(f)[1].unlink(), FileNotFoundError, "got none at .*latents-00001.safetensors"),
    "truncated": (_truncate, ValueError, "`folder` must hold whole shards, got .*latents-00001.safetensors"),
    "shape": (_wrong_shape, ValueError, r"`prompt_embeds` of \[7, 5\] for sample 1, got \[6, 5\] in .*00000"),
    "tensor": (_edit(lambda i: _conditions(i).update(more=[3])), ValueError, r"`more` of \[3\] for sample 2, got"),
    "no json": (lambda f: (f / INDEX).write_text("{"), ValueError, "must hold an index.json of latents, got"),
    "other json": (lambda f: (f / INDEX).write_text("[]"), ValueError, "must hold an index.json of latents, got"),
    "format": (_edit(lambda i: i.update(format="x")), ValueError, "must hold an index.json of latents, got"),
    "version": (_edit(lambda i: i.update(version=2)), ValueError, "`version` of .* must be 1, got 2"),
    "samples": (_edit(lambda i: i.update(samples=[{}])), ValueError, "with shard, name and shapes of every sample"),
    "outside": (_edit(lambda i: i["samples"][0].update(shard="../a.safetensors")), ValueError, "with shard, name and"),
    "axes": (_edit(lambda i: i["samples"][0].update(latents=[1, 2])), ValueError, "with shard, name and shapes"),
    "complete": (_edit(lambda i: i.pop("complete")), ValueError, "with shard, name and shapes"),
    "empty": (_edit(lambda i: i.update(samples=[])), ValueError, "at least one sample, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(case: str, tmp_path: Path) -> None:
    write_latents(tmp_path, _samples(), SHARD)
    damage, error, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(error, match=message):
        LatentData(tmp_path)
