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
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


class Server:
    """A process that has imported torch and nothing else, and forks one like it for all code that it is to run."""

    def __init__(self) -> None:
        program = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        # It ends when this process does, with which its standard input closes.
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code: str, *, cwd: Path = ROOT, processes: int = 1, **env: str) -> subprocess.CompletedProcess[str]:
        """What `python -c code` would do in a process of its own.

        Args:
            code: what runs.
            cwd: where, which comes first on its module path.
            processes: how many run it, as torch.distributed.run would start them.
            env: changes of the environment; torch has read what it reads before.
        """
        to, back = self.process.stdin, self.process.stdout
        assert to is not None and back is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            where = {"cwd": str(cwd), "env": {**os.environ, **env}, "out": str(out), "err": str(err)}
            print(json.dumps({"code": code, "processes": processes, **where}), file=to, flush=True)
            status = int(back.readline())
            return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())


@functools.cache
def _server() -> Server:
    return Server()


def run_code(code: str, **where: Any) -> subprocess.CompletedProcess[str]:
    """Server.run() of the one server of the tests, which starts when it is first asked."""
    return _server().run(code, **where)


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
