"""Runs of `convert-weights` that die by SIGKILL before the n-th of their calls to the system, however fast they are.

`python -m tests.conversion.killed_runs` serves them: a line of standard input has the number of the call, from 0, and
the arguments of the run; the answer is its exit status and the names of the calls that it made. A run that shall die is
a fork of the serving process, which takes milliseconds; others go on in that process, which so imports what runs need.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import conversion.cli
from conversion.streaming import Buffers

BLOCK_BYTES = 2**13
"""Blocks so small that some of a small checkpoint's tensors have several, between which a run can die too."""

KINDS = ("mkdir", "open", "pwrite", "write", "preadv", "fsync", "unlink", "rmdir")
"""The calls before which a run can die: all of those by which a conversion reads, writes and publishes."""

_REAL = {kind: getattr(os, kind) for kind in KINDS}


class KilledRuns:
    """What asks the serving process."""

    def __init__(self, server: subprocess.Popen):
        self._server = server

    def run(self, *arguments, dies_before: int | None = None) -> tuple[int, list[str]]:
        """Run `convert-weights`, if asked until its call of this number; its exit status and its calls."""
        self._server.stdin.write(json.dumps([dies_before, [str(argument) for argument in arguments]]) + "\n")
        self._server.stdin.flush()
        status, calls = json.loads(self._server.stdout.readline())
        return status, calls


@contextmanager
def killed_runs() -> Iterator[KilledRuns]:
    """Within, there is a process that runs `convert-weights`."""
    command = [sys.executable, "-m", "tests.conversion.killed_runs"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield KilledRuns(server)
        server.stdin.close()


def _count_calls(calls: list[str], dies_before: int | None) -> None:
    """Let the module `os` note its calls of `KINDS` in a list, and kill this process before one of them."""

    def counted(function: Callable) -> Callable:
        def call(*arguments, **options):
            if len(calls) == dies_before:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(function.__name__)
            return function(*arguments, **options)

        return call

    for kind in KINDS:
        setattr(os, kind, counted(_REAL[kind]))


def _serve() -> None:
    Buffers.__init__.__defaults__ = (BLOCK_BYTES,)
    for line in sys.stdin:
        dies_before, arguments = json.loads(line)
        child = 0 if dies_before is None else os.fork()
        if child:
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), []
        else:
            _count_calls(calls := [], dies_before)
            answer = conversion.cli.main([*arguments, "--workers", "1", "--quiet"]), calls
            if dies_before is not None:
                os._exit(answer[0])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
