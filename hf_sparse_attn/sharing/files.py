"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

# On Windows a file cannot be replaced while another program, a virus scanner for one, looks into it: 2.5 s at most.
_PAUSES = tuple(0.01 * 2**i for i in range(8))
# Of a name, so that what is put before and behind it makes none that is too long for a disk.
_LONGEST = 100


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside its place and put there when it is whole.

    Raises:
        OSError: it cannot be written; what was there before is kept.
    """
    from safetensors import SafetensorError

    # Of this thread alone: another may write the same file.
    temporary = path.with_name(f".{path.name[:_LONGEST]}.{os.getpid()}-{threading.get_ident()}")
    try:
        write(temporary)
        to_disk(temporary)
        move(temporary, path)
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
    """`replace_file` with a text, of the same bytes on every system."""
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def move(source: Path, target: Path) -> None:
    """`os.replace`, tried again on Windows for as long as another program may look into a file for.

    Raises:
        OSError: it cannot be moved; both are as they were.
    """
    for pause in _PAUSES:
        try:
            return os.replace(source, target)
        except PermissionError:
            # A folder is never replaced there, however long one waits.
            if sys.platform != "win32" or target.is_dir():
                raise
        time.sleep(pause)
    os.replace(source, target)


def new_folder(parent: Path, prefix: str) -> Path:
    """Makes a folder of a name of its own, readable by whom the user's umask lets read; `mkdtemp` lets nobody."""
    made = parent / f"{prefix}{uuid.uuid4().hex[:12]}"
    made.mkdir()
    return made


def to_disk(file: Path) -> None:
    """Waits until a file is on the disk: after a power cut its name must not stand for an empty one."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
