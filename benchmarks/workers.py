"""Processes of their own for what is measured, so that one framework's threads and memory do not touch another's.

Unusual: a worker lives through all repetitions and sleeps between them, so that the rows of a table can be measured in
turns, each on a machine that is as warm, as hot and as busy as it was for the others.
"""

import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

_PAUSE = 0.3  # seconds in which the last worker's threads stop spinning before the next one is timed
_served = None  # in a worker: the object that lives there


class Worker:
    """An object that lives in a process of its own; `call` runs its methods there.

    Args:
        served: its class; imports frameworks only when an object is made. kwargs: of its constructor.
        threads: for the worker's parallel regions; set before anything is imported there.
    """

    def __init__(self, served: type, threads: int, **kwargs):
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        variables = {"OMP_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1"}
        with mock.patch.dict(os.environ, variables):
            self._pool.submit(_make, served, kwargs).result()

    def call(self, method: str, *args):
        """The result of a method, after a short pause."""
        return self._timed(method, args)[1]

    def seconds(self, method: str, *args) -> float:
        """The seconds that a method takes, after a short pause."""
        return self._timed(method, args)[0]

    def _timed(self, method: str, args):
        time.sleep(_PAUSE)
        return self._pool.submit(_call, method, args).result()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._pool.shutdown()


def _make(served: type, kwargs: dict):
    global _served
    _served = served(**kwargs)


def _call(method: str, args: tuple) -> tuple:
    begin = time.perf_counter()
    result = getattr(_served, method)(*args)
    return time.perf_counter() - begin, result


class Peak:
    """The largest number of bytes since it was made: of this process, or of the accelerator if torch is given."""

    def __init__(self, torch=None):
        self.torch = torch
        if torch is not None:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the system's own record starts anew
            self._record = Path("/proc/self/status")
        except OSError:
            self._record = None

    def bytes(self) -> int | None:
        """The peak; None where the system does not tell."""
        if self.torch is not None:
            return self.torch.cuda.max_memory_allocated()
        lines = self._record.read_text().splitlines() if self._record else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)

    def added(self) -> int | None:
        """What it adds to the bytes that there were when it was made; None where the system does not tell."""
        peak = self.bytes()
        return None if peak is None else peak - self.before
