"""Run as a program: imports torch once, and forks a process for every call, which runs code as `python -c` would."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch._dynamo  # noqa: F401  (what takes seconds in every process that uses torch)


def fork(run: Callable[[], int]) -> int:
    """The number of a copy of this process, which ends with the status that `run` gives there."""
    child = os.fork()
    if child == 0:
        os._exit(run())
    return child


def execute(code: str) -> int:
    """The exit status of code in this process, as the interpreter would give it."""
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def together(code: str, processes: int) -> int:
    """Status of the first of several processes of one group to fail, whereupon the others are killed; or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def of(rank: int) -> int:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        return execute(code)

    left = {fork(lambda rank=rank: of(rank)) for rank in range(processes)}
    failed = 0
    while left:
        child, ended = os.wait()
        left.discard(child)
        if ended and not failed:
            failed = os.waitstatus_to_exitcode(ended)
            for other in left:
                os.kill(other, 9)
    return failed


def answer(call: dict[str, Any]) -> int:
    """Runs the code of a call where and as it says."""
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["env"])
    for number, path in enumerate((os.devnull, call["out"], call["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    return execute(call["code"]) if call["processes"] == 1 else together(call["code"], call["processes"])


def main() -> None:
    sys.path[0] = ""
    for line in sys.stdin:
        call = json.loads(line)
        child = fork(lambda call=call: answer(call))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
