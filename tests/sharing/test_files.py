"""Files and locks, on systems of other kinds, too: what differs there is stood in for."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_sparse_attn.sharing import files
from hf_sparse_attn.sharing.hub import is_hub_id, local_folder
from hf_sparse_attn.training.files import alone
from hf_sparse_attn.training.text import data as text_data
from hf_sparse_attn.training.video.latents import read_index


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


class Msvcrt(types.ModuleType):
    """The locks of Windows: of a byte at the place of a file, told by an error of its own when another has it."""

    LK_UNLCK, LK_LOCK, LK_NBLCK = 0, 1, 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, number: int, mode: int, count: int) -> None:
        place = os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR)
        assert count == 1
        if mode == self.LK_UNLCK:
            if self.held.pop(place, None) != number:
                raise OSError(errno.EACCES, "Permission denied")
        elif place in self.held:
            raise OSError(errno.EACCES, "Permission denied")
        else:
            self.held[place] = number


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Msvcrt:
    """A system on which no open file can be removed or replaced."""
    made = Msvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", made)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    return made


def refusing(times: int, of: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """A function that another program's look at the file keeps from working so many times."""
    tried: list[int] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        tried.append(1)
        if len(tried) <= times:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return of(*args, **kwargs)

    return function, tried


def test_a_file_that_is_looked_into_is_replaced_a_little_later(
    windows: Msvcrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "a.json", "before")
    replace, tried = refusing(3, os.replace)
    monkeypatch.setattr(os, "replace", replace)
    files.write_text(tmp_path / "a.json", "after\n")
    assert (tmp_path / "a.json").read_bytes() == b"after\n" and len(tried) == 4
    monkeypatch.setattr(os, "replace", refusing(99, replace)[0])
    with pytest.raises(PermissionError):
        files.write_text(tmp_path / "a.json", "never")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "after\n"


def test_a_folder_that_is_there_is_not_waited_for(
    windows: Msvcrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "there"):
        (tmp_path / name).mkdir()
    replace, tried = refusing(99, os.replace)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        files.move(tmp_path / "new", tmp_path / "there")
    assert len(tried) == 1
    with pytest.raises(PermissionError):
        files.move(tmp_path / "new", tmp_path / "free")
    assert len(tried) > 5


def test_elsewhere_a_file_that_may_not_be_replaced_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, tried = refusing(99, os.replace)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        files.write_text(tmp_path / "a", "x")
    assert len(tried) == 1 and not list(tmp_path.iterdir())


def test_texts_are_the_same_bytes_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows writes a line's end as two characters where it is not told otherwise."""
    own = Path.write_text

    def write_text(self: Path, text: str, encoding: Any = None, errors: Any = None, newline: Any = None) -> int:
        return own(self, text, encoding, errors, "\r\n" if newline is None else newline)

    monkeypatch.setattr(Path, "write_text", write_text)
    files.write_text(tmp_path / "a", "one\ntwo\n")
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\n"


def test_two_threads_write_one_file_and_each_leaves_it_whole(tmp_path: Path) -> None:
    path, failed = tmp_path / "a", []
    both = threading.Barrier(2)

    def write(text: str) -> None:
        try:
            for _ in range(50):
                both.wait()
                files.write_text(path, text)
        except Exception as error:
            failed.append(error)
            both.abort()

    texts = ["a" * 10_000, "b" * 20_000]
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_name_as_long_as_a_disk_takes_is_written(tmp_path: Path) -> None:
    files.write_text(tmp_path / ("n" * 255), "x")
    assert [len(p.name) for p in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o755), (0o002, 0o775), (0o077, 0o700)])
def test_folders_and_files_are_readable_as_the_umask_says(mask: int, mode: int, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.txt").write_text("some text " * 100)
    with umask(mask):
        text_data._prepared(text_data.TextSettings(source=str(source), length=16), None, tmp_path / "cache", False)
        files.write_text(tmp_path / "file", "x")
    (made,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE((tmp_path / "cache").stat().st_mode) == mode
    assert {stat.S_IMODE(p.stat().st_mode) for p in made.iterdir()} == {mode & 0o666}
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode & 0o666


# ------------------------------------------------------------------ locks


def test_the_locks_of_windows(windows: Msvcrt, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("left by another version")
    with alone(tmp_path):
        # The first byte, wherever a file that is appended to begins.
        assert [place for _, place in windows.held] == [0]
        with pytest.raises(ValueError, match="no other process trains in"), alone(tmp_path):
            raise AssertionError
        assert len(windows.held) == 1
    assert not windows.held and not (tmp_path / ".lock").exists()
    with pytest.raises(KeyError), alone(tmp_path):
        raise KeyError
    assert not windows.held


def test_a_lock_that_another_process_looks_at_stays_on_windows(
    windows: Msvcrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "unlink", refusing(99, Path.unlink)[0])
    with alone(tmp_path):
        pass
    with alone(tmp_path):
        assert len(windows.held) == 1
    assert not windows.held


@pytest.mark.parametrize("code, refused", [(errno.EAGAIN, 1), (errno.EDEADLK, 1), (errno.ENOLCK, 0), (errno.EIO, 0)])
def test_errors_that_mean_another_process_and_those_that_do_not(
    code: int, refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if refused:
        with pytest.raises(ValueError, match="no other process trains in"), alone(tmp_path):
            raise AssertionError
    else:
        with alone(tmp_path):
            pass


def test_a_lock_that_went_while_it_was_waited_for_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removed the file between the opening and the locking: who holds that holds nothing."""
    flock, calls = fcntl.flock, []

    def late(number: int, mode: int) -> None:
        calls.append(number)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        flock(number, mode)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()
        with pytest.raises(ValueError, match="no other process trains in"), alone(tmp_path):
            raise AssertionError
    assert not (tmp_path / ".lock").exists()


# ------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "name", ["C:/models", "C:\\models\\x", "..\\x", "a\\b", "\\\\server/share", "a/b:stream", "a/b ", "../b", "a/.."]
)
def test_paths_of_windows_are_no_names_on_the_hub(name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(ValueError, match="must be a folder that exists or a Hub id"):
        local_folder(name)


@pytest.mark.parametrize(
    "shard", ["..\\a.safetensors", "C:a.safetensors", "a.txt:b.safetensors", "/a.safetensors", "b/a.safetensors", "a"]
)
def test_no_shard_is_read_from_elsewhere_on_any_system(shard: str, tmp_path: Path) -> None:
    entry = {"shard": shard, "name": "x", "latents": [16, 1, 2, 2], "conditions": {}}
    found = {"format": "hf_sparse_attn.latents", "version": 1, "complete": True, "key": {}, "samples": [entry]}
    (tmp_path / "index.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"must hold an index.json with shard, name and shapes"):
        read_index(tmp_path)
    found["samples"] = [{**entry, "shard": "a.safetensors"}]
    (tmp_path / "index.json").write_text(json.dumps(found))
    assert read_index(tmp_path)["samples"][0]["shard"] == "a.safetensors"
