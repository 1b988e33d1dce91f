"""Who is measured, and in which order: a worker for each backend, and repetitions in turns."""

import numpy as np

from benchmarks.workers import Worker

LOGITS_BOUNDS = {"float32": 1e-4, "bfloat16": 0.12, "float16": 0.02}
"""How far logits may differ, relative to their scale, by precision; the tests have the bounds of exactness."""


def start(options, target: str, **kwargs) -> dict[str, Worker]:
    """A worker for each backend of the command line.

    Args:
        target: "module:Class" of what lives in it; its constructor gets `kind`, the name of the backend, and `kwargs`.
    """
    return {name: Worker(target, options.threads, kind=name, **kwargs) for name in options.backend}


def in_turns(workers: dict[str, Worker], repeats: int, method: str, *args) -> dict[str, list]:
    """What a method returns for each backend, `repeats` times: one of each backend, then the next."""
    results = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            results[name].append(worker.call(method, *args))
    return results


def close(workers: dict[str, Worker]):
    """End all workers."""
    for worker in workers.values():
        worker.close()


def relative_difference(array: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference of two arrays in units of the largest value of the reference."""
    return float(np.abs(array - reference).max() / np.abs(reference).max())


def refuse_above(bound: float, difference: float, name: str, what: str) -> float:
    """The difference, unless it is above the bound: then nothing is timed.

    Raises:
        SystemExit: naming the backend, and what of it differs from the first backend's.
    """
    if not difference <= bound:  # false for NaN as well
        raise SystemExit(f"{name}: {what} differ from the first backend's by {difference:.1e} of their scale.")
    return difference
