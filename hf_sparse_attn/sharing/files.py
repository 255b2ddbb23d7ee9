"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside its place and put there when it is whole.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        to_disk(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        # That library has an error of its own for a full disk.
        raise OSError(f"{path} must have room on its disk, and a folder that can be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike[str], argument: str = "output") -> Path:
    """Makes a folder, and what it is in, unless it is there.

    Raises:
        OSError: it cannot be made or written; names the argument, the folder and the reason.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        why = "a file of that name is there" if folder.is_file() else error.strerror
        raise type(error)(f"`{argument}` must be a folder that can be written, got {folder}: {why}") from error
    return folder


def write_text(path: Path, text: str) -> None:
    """`replace_file` with a text."""
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def to_disk(file: Path) -> None:
    """Waits until a file is on the disk: after a power cut its name must not stand for an empty one."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
