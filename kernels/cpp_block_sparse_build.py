"""Compiles the C++ kernels for the machine they run on, once per dtype and kernel, and keeps the libraries."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock

import torch

from hf_sparse_attn.cost.table import cpu_features as cpu_features

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_STORED = {torch.float32: "float", torch.bfloat16: "BFloat", torch.float16: "Half", torch.float64: "double"}
# By name of a kernel: its source and what is defined for it.
_KERNELS = {
    "forward": ("cpp_block_sparse.cpp", "-DBACKWARD=0"),
    "backward": ("cpp_block_sparse.cpp", "-DBACKWARD=1"),
    "decode": ("cpp_decode.cpp",),
}
_COMPILERS = ("g++", "c++", "clang++")
# By machine: how a compiler is told to use all that this CPU has.
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-strict-aliasing", "-w")
# Bytes of the checksum that is kept behind a library; what loads it reads no further than its own end.
_DIGEST = hashlib.sha256().digest_size
# A compiler that takes longer is taken for stuck.
_SECONDS = 300
_BUILDING = Lock()


class CannotBuild(RuntimeError):
    """There is no library, and why."""


def why_not(dtype: torch.dtype) -> str | None:
    """Why no library can be made here, as far as can be told without compiling anything; None where one may be."""
    if dtype not in _STORED:
        return f"needs {', '.join(str(d).removeprefix('torch.') for d in _STORED)}, got {str(dtype)[6:]}"
    if sys.platform != "linux" or platform.machine() not in _NATIVE:
        return f"needs Linux on {' or '.join(_NATIVE)}, this is {sys.platform} on {platform.machine()}"
    if compiler() is None:
        return f"needs a C++ compiler: none of {', '.join(_COMPILERS)} is on the path"
    return None


def library(dtype: torch.dtype, kernel: str) -> ctypes.CDLL:
    """The library for a dtype and kernel of _KERNELS; compiled where it was not yet (seconds, once per machine).

    Raises:
        CannotBuild: no compiler, or it failed; asked again it is not tried again.
    """
    # Threads that come together wait for one of them.
    with _BUILDING:
        found = _library(dtype, kernel)
    if isinstance(found, str):
        raise CannotBuild(found)
    return found


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """Path of the compiler that is used, or None."""
    return next((found for name in _COMPILERS if (found := shutil.which(name))), None)


@cache
def _library(dtype: torch.dtype, kernel: str) -> ctypes.CDLL | str:
    reason = why_not(dtype)
    if reason is not None:
        return reason
    try:
        path = _folder() / f"{_STORED[dtype]}_{kernel}_{_key()}.so"
        # Another process may be making the same library.
        with _locked(path.parent):
            found = _kept(path)
            if found is None:
                _compile(dtype, kernel, path)
                found = ctypes.CDLL(str(path))
    except subprocess.SubprocessError as error:
        shown = getattr(error, "stderr", None) or str(error)
        return f"{compiler()} cannot compile it: {shown.strip().partition(chr(10))[0]}"
    except OSError as error:
        return f"its library cannot be made or loaded: {error}"
    found.hsa_run.restype = ctypes.c_int64
    found.hsa_call_bytes.restype = ctypes.c_int64
    return found


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library that was kept; None where there is none, or what is there is not one that was made here."""
    try:
        kept = path.read_bytes()
        # A library that is cut short may load and end the process when it is called.
        if kept[-_DIGEST:] == _digest(kept[:-_DIGEST]):
            return ctypes.CDLL(str(path))
        log.warning("%s is damaged or of another program: it is compiled anew", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be loaded and is compiled anew: %s", path, error)
    return None


def _digest(library: bytes) -> bytes:
    return hashlib.sha256(library).digest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder against other threads and processes, where its file system can do that."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _compile(dtype: torch.dtype, kernel: str, path: Path) -> None:
    log.info("compiling %s, once for this machine", path.name)
    begin = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        source, *defines = _KERNELS[kernel]
        command = (str(compiler()), *_FLAGS, _NATIVE[platform.machine()], f"-DSTORED={_STORED[dtype]}", *defines)
        subprocess.run(
            [*command, str(_SOURCES / source), "-o", str(made)],
            check=True, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
        signature = _digest(made.read_bytes())
        with made.open("ab") as file:
            file.write(signature)
        if path.is_dir():
            shutil.rmtree(path)
        # At once: another process may be loading it.
        made.replace(path)
    log.info("compiled %s in %.1f s", path.name, time.perf_counter() - begin)


@lru_cache(maxsize=1)
def _folder() -> Path:
    """Where libraries are kept between runs; a folder of this process alone where the home cannot be written."""
    kept = Path.home() / ".cache" / "hf_sparse_attn" / "cpp"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept):
            return kept
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hf_sparse_attn_"))


@lru_cache(maxsize=1)
def _key() -> str:
    """Changes with the sources, the compiler, the flags and the CPU."""
    parts = [source.read_text() for source in sorted(_SOURCES.glob("cpp_*")) if source.suffix != ".py"]
    version = subprocess.run([str(compiler()), "--version"], check=True, capture_output=True, text=True, timeout=60)
    parts += [version.stdout, *_FLAGS, _NATIVE[platform.machine()], *sorted(cpu_features())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
