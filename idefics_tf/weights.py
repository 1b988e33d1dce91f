"""State in and out by canonical name: Keras variables from checkpoint files in PyTorch's layout, and back.

Unusual: names and layouts come from the parameter table, nowhere else. Tensors are read in blocks of rows, not
through a memory map, whose page faults take longer than the copies; each is turned into memory that its variable keeps.

Mirrors `idefics_pt/weights.py`, which leaves loading itself to transformers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import keras
import numpy as np
from tqdm.auto import tqdm

from idefics_common.checkpoint import Checkpoint, compare_names_and_shapes
from idefics_common.layouts import KERAS_LAYOUTS, Layout
from idefics_common.parameters import MODEL, Parameter, Part, expand, stale_buffer_names
from idefics_tf.host_memory import aligned_empty, take_over

_LARGE = 2**30  # bytes from which loading shows its progress
_READERS = 2  # threads; a copy keeps one core busy, and two of them most of the memory bus
_BLOCK = 2**19  # bytes read at a time: fit for a cache, and enough rows to fill cache lines when they become columns


class Weight(NamedTuple):
    """A variable of a model, its row of the parameter table, and how its axes are ordered."""

    parameter: Parameter
    variable: keras.Variable
    layout: Layout


def parameters(config, with_head: bool) -> tuple[Parameter, ...]:
    """The parameters of a model, all named as in a checkpoint with a head. Tied ones are among them."""
    return tuple(parameter for parameter in expand(config) if with_head or parameter.part != Part.HEAD)


def weights_by_name(model) -> dict[str, Weight]:
    """The weights of a model by canonical name, which starts with "model." with and without a head; tied ones aside."""
    prefix = f"{model.path}/"
    variables = {variable.path.removeprefix(prefix): variable for variable in model.weights}
    start = "" if model.has_head else f"{MODEL.keras}/"
    return {
        parameter.name: Weight(
            parameter, variables[parameter.keras_path.removeprefix(start)], KERAS_LAYOUTS[parameter.kind]
        )
        for parameter in parameters(model.config, model.has_head)
        if parameter.tied_to is None
    }


def names_in_file(checkpoint: Checkpoint, config, with_head: bool) -> dict[str, str]:
    """The canonical name of each tensor that a model wants from a checkpoint, by its name there.

    A checkpoint of the model without a head may leave out the "model." of all names, as transformers writes it.

    Raises:
        CheckpointError: listing missing, unexpected and mismatched tensors with their shapes.
    """
    prefix = f"{MODEL.name}."
    wanted = parameters(config, with_head)
    is_bare = not with_head and not any(name.startswith(prefix) for name in checkpoint.names)
    file_names = {parameter.name: parameter.name.removeprefix(prefix if is_bare else "") for parameter in wanted}
    ignorable = {name.removeprefix(prefix if is_bare else "") for name in stale_buffer_names(config)}
    if not with_head:
        ignorable |= {parameter.name for parameter in expand(config) if parameter.part == Part.HEAD}
    compare_names_and_shapes(
        checkpoint.infos,
        {file_names[parameter.name]: parameter.shape for parameter in wanted},
        ignorable=ignorable,
        optional={file_names[parameter.name] for parameter in wanted if parameter.tied_to is not None},
    ).raise_if_bad(checkpoint.path)
    return {file_names[parameter.name]: parameter.name for parameter in wanted if parameter.tied_to is None}


def dtype_of(checkpoint: Checkpoint) -> str:
    """The dtype of most bytes of a checkpoint; a model keeps it unless told otherwise."""
    nbytes = Counter()
    for info in checkpoint.infos.values():
        nbytes[info.dtype.name] += info.nbytes
    dtype = nbytes.most_common(1)[0][0]
    return "float32" if dtype == "float64" else dtype


def read_weights(model, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    """Assign every weight of a model from a checkpoint, in the order of the file.

    A few threads read ahead, by at most `_READERS` tensors. So memory holds the model, a block for each thread, and
    where variables are not in host memory, that many tensors and one once more.

    Args:
        names: result of `names_in_file`.
    """
    weights = weights_by_name(model)
    wanted = [name for name in checkpoint.names if name in names]
    missing = weights.keys() - {names[name] for name in wanted}
    assert not missing, f"no values to read for {sorted(missing)}"

    def read(file_name: str) -> np.ndarray:
        _, variable, layout = weights[names[file_name]]
        return _read_tensor(checkpoint, file_name, layout, np.dtype(variable.dtype))

    total = sum(checkpoint.info(name).nbytes for name in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=total < _LARGE) as progress:
        for file_name, array in zip(wanted, _map_ahead(read, wanted), strict=True):
            weights[names[file_name]].variable.assign(take_over(array))
            progress.update(checkpoint.info(file_name).nbytes)


def _read_tensor(checkpoint: Checkpoint, name: str, layout: Layout, dtype: np.dtype) -> np.ndarray:
    """A tensor of at least one dimension, in a layout and a dtype, in memory that a variable can take over."""
    info = checkpoint.info(name)
    array = aligned_empty(layout.shape(info.shape), dtype)
    canonical = layout.inverse(array)
    rows = info.shape[0]
    step = max(1, min(rows, _BLOCK * rows // info.nbytes))
    block = np.empty((step, *info.shape[1:]), info.dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        canonical[start:stop] = checkpoint.read_rows(name, start, stop, block[: stop - start])
    return array


def _map_ahead(function: Callable, items: Iterable, threads: int = _READERS) -> Iterator:
    """Like `map`, by `threads` threads that work on the next as many items while a result is used."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
