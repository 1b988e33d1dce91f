"""Processes of their own for what is measured, so that one framework's threads and memory do not touch another's.

Unusual: a worker lives through all repetitions and sleeps between them, so that the rows of a table can be measured in
turns, each on a machine that is as warm, as hot and as busy as it was for the others.
"""

import importlib
import multiprocessing
import os
import resource
import time
import traceback

_PAUSE = 0.3  # seconds in which the last worker's threads stop spinning before the next one is timed


class Worker:
    """An object that lives in a process of its own; `call` runs its methods there.

    Args:
        target: "module:Class". kwargs: of its constructor.
        threads: for the worker's parallel regions; set before anything is imported there.
    """

    def __init__(self, target: str, threads: int, **kwargs):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with _Environment(OMP_NUM_THREADS=str(threads), TF_CPP_MIN_LOG_LEVEL="2", HF_HUB_OFFLINE="1"):
            self._process = context.Process(target=_serve, args=(theirs, target, kwargs), daemon=True)
            self._process.start()
        theirs.close()
        self._receive(target)

    def call(self, method: str, *args, **kwargs):
        """The result of a method, after a short pause."""
        time.sleep(_PAUSE)
        self._connection.send((method, args, kwargs))
        return self._receive(method)

    def _receive(self, what: str):
        try:
            is_result, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"The worker ended in {what} with status {self._process.exitcode}.") from None
        if not is_result:
            raise RuntimeError(f"The worker failed in {what}:\n{value}")
        return value

    def close(self):
        """End the process."""
        self._connection.close()
        self._process.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class _Environment:
    """Environment variables for the time in which a process is started."""

    def __init__(self, **variables):
        self.variables = variables

    def __enter__(self):
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *exception):
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection, target: str, kwargs: dict):
    module, name = target.split(":")
    try:
        served = getattr(importlib.import_module(module), name)(**kwargs)
        connection.send((True, None))
        while True:
            method, args, kwargs = connection.recv()
            connection.send((True, getattr(served, method)(*args, **kwargs)))
    except EOFError:
        return
    except BaseException:
        connection.send((False, traceback.format_exc()))


def resident_bytes() -> int:
    """The resident set of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def reset_peak() -> bool:
    """Let the peak that `peak_bytes_since_reset` reports start anew; False where the system does not allow it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def peak_bytes_since_reset() -> int:
    """The largest resident set since `reset_peak`."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report VmHWM")


class Peak:
    """The largest number of bytes since it was made: of this process, or of the accelerator if torch is given."""

    def __init__(self, torch=None):
        self.torch = torch
        if torch is not None:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = resident_bytes()
            self._is_known = reset_peak()

    def bytes(self) -> int | None:
        """The peak; None where the system does not tell."""
        if self.torch is not None:
            return self.torch.cuda.max_memory_allocated()
        return peak_bytes_since_reset() if self._is_known else None

    def added(self) -> int | None:
        """What it adds to the bytes that there were when it was made; None where the system does not tell."""
        peak = self.bytes()
        return None if peak is None else peak - self.before
