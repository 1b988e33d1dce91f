"""Who is measured, and in which order: a worker for each backend, outputs compared, and repetitions in turns."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from benchmarks.workers import Worker

LOGITS_BOUNDS = {"float32": 1e-4, "bfloat16": 0.12, "float16": 0.02, "int8": 0.2}
"""How far logits may differ, relative to their scale, by precision; the tests have the bounds of exactness."""


@contextmanager
def started(options, in_torch: type, in_tensorflow: type | None = None, **kwargs) -> Iterator[dict[str, Worker]]:
    """A worker for each backend of the command line, for as long as the context lasts.

    Args:
        in_torch, in_tensorflow: classes of what lives in it, the latter for "tf" and its like; their constructors get
            `kind`, the name of the backend, and `kwargs`.
    """
    with ExitStack() as stack:
        workers = {}
        for name in options.backend:
            served = in_tensorflow if name.startswith("tf") else in_torch
            workers[name] = stack.enter_context(Worker(served, options.threads, kind=name, **kwargs))
        yield workers


def in_turns(workers: dict[str, Worker], repeats: int, method: str, *args, timed=False) -> dict[str, list]:
    """What a method returns for each backend, `repeats` times: one of each backend, then the next.

    Args:
        timed: the seconds that it takes instead.
    """
    results = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            results[name].append((worker.seconds if timed else worker.call)(method, *args))
    return results


def seconds_of_outputs(options, served: tuple[type, ...], inputs: tuple, what: str | None, **kwargs) -> dict[str, list]:
    """Seconds in which each backend makes its `output`, in turns, after a first time that warms up.

    Args:
        served: classes as for `started`, with the methods `prepare`, which takes `inputs`, and `output`.
        what: the name of the outputs, which must all be equal; None if they need not.
    """
    with started(options, *served, **kwargs) as workers:
        outputs = {}
        for name, worker in workers.items():
            worker.call("prepare", *inputs)
            outputs[name] = worker.call("output")
        if what is not None:
            refuse_others(outputs, what)
        return in_turns(workers, options.repeats, "output", timed=True)


def refuse_above(bound: float, outputs: dict[str, np.ndarray], what: str) -> dict[str, float]:
    """The largest difference of each backend's output from the first one's, relative to the largest value of that.

    Raises:
        SystemExit: naming the backend, and what of it differs more than the bound: then nothing is timed.
    """
    first = next(iter(outputs.values()))
    differences = {name: float(np.abs(array - first).max() / np.abs(first).max()) for name, array in outputs.items()}
    for name, difference in differences.items():
        if not difference <= bound:  # false for NaN as well
            raise SystemExit(f"{name}: {what} differ from the first backend's by {difference:.1e} of their scale.")
    return differences


def refuse_others(outputs: dict[str, np.ndarray], what: str):
    """Refuse outputs that are not equal to the first backend's in shape and every value.

    Raises:
        SystemExit: naming the backend, and what of it differs, and where first: then nothing is timed.
    """
    first = next(iter(outputs.values()))
    for name, array in outputs.items():
        if array.shape != first.shape:
            raise SystemExit(f"{name}: {what} have shape {array.shape}, the first backend's {first.shape}.")
        places = np.argwhere(array != first).tolist()
        if places:
            place = tuple(places[0])
            raise SystemExit(
                f"{name}: {what} differ from the first backend's in {len(places)} of {array.size} places, the first "
                f"at {place}: {array[place]} against {first[place]}."
            )
