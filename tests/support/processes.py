"""Processes beside that of the tests, without the seconds that importing torch takes."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


@functools.cache
def _server() -> subprocess.Popen[str]:
    program = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    # It ends when this process does, with which its standard input closes.
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_code(code: str, *, cwd: Path = ROOT, processes: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
    """What `python -c code` would do in a process of its own, in which torch is imported and nothing else is.

    Args:
        code: what runs.
        cwd: where, which comes first on its module path.
        processes: how many run it, as torch.distributed.run would start them.
        env: changes of the environment; torch has read what it reads before.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        call = {
            "code": code,
            "cwd": str(cwd),
            "env": {**os.environ, **env},
            "processes": processes,
            "out": str(out),
            "err": str(err),
        }
        print(json.dumps(call), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())


def exit_code(run: Callable[[], object], timeout: float = 120) -> int | None:
    """How a fork of this process ends that runs `run`: 0, what it gave os._exit(), or less the signal that killed it.

    Threads do not survive a fork: the copy computes on one.
    """

    def alone() -> None:
        torch.set_num_threads(1)
        run()

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        child.join()
        return None
    return child.exitcode
