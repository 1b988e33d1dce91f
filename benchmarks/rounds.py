"""Who is measured, and in which order: a worker for each backend, outputs compared, and repetitions in turns."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from benchmarks.workers import Worker

LOGITS_BOUNDS = {"float32": 1e-4, "bfloat16": 0.12, "float16": 0.02, "int8": 0.2}
"""How far logits may differ, relative to their scale, by precision; the tests have the bounds of exactness."""


@contextmanager
def started(options, target: str, **kwargs) -> Iterator[dict[str, Worker]]:
    """A worker for each backend of the command line, for as long as the context lasts.

    Args:
        target: "module:Class" of what lives in it; its constructor gets `kind`, the name of the backend, and `kwargs`.
    """
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(Worker(target, options.threads, kind=name, **kwargs)) for name in options.backend
        }


def in_turns(workers: dict[str, Worker], repeats: int, method: str, *args) -> dict[str, list]:
    """What a method returns for each backend, `repeats` times: one of each backend, then the next."""
    results = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            results[name].append(worker.call(method, *args))
    return results


def seconds_of_equals(options, target: str, inputs: tuple, what: str, **kwargs) -> dict[str, list[float]]:
    """Seconds of each backend in turns, once all have given the same `output`, bit by bit, which also warms them up.

    Args:
        target, kwargs: as for `started`. What lives there has `prepare`, which takes `inputs`, `output` and `seconds`.
        what: the name of the outputs.
    """
    with started(options, target, **kwargs) as workers:
        reference = None
        for name, worker in workers.items():
            worker.call("prepare", *inputs)
            output = worker.call("output")
            reference = output if reference is None else reference
            refuse_other(output, reference, name, what)
        return in_turns(workers, options.repeats, "seconds")


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


def refuse_other(array: np.ndarray, reference: np.ndarray, name: str, what: str):
    """Refuse what is not equal to the reference in shape and every value.

    Raises:
        SystemExit: naming the backend, and what of it differs from the first backend's, and where first.
    """
    if array.shape != reference.shape:
        raise SystemExit(f"{name}: {what} have shape {array.shape}, the first backend's {reference.shape}.")
    places = np.argwhere(array != reference).tolist()
    if places:
        place = tuple(places[0])
        raise SystemExit(
            f"{name}: {what} differ from the first backend's in {len(places)} of {array.size} places, the first at "
            f"{place}: {array[place]} against {reference[place]}."
        )
