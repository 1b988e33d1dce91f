"""State in and out by canonical name: Keras variables from checkpoint files in PyTorch's layout or Keras's, and back.

Unusual: names and layouts come from the parameter table, nowhere else. Tensors are read in blocks of rows, not
through a memory map, whose page faults take longer than the copies; each is turned into memory that its variable keeps.

Mirrors `idefics_pt/weights.py`, which leaves loading itself to transformers.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from idefics_common.checkpoint import Checkpoint, keras_file
from idefics_common.parameters import MODEL, Parameter, Part, expand
from idefics_common.parameters.layouts import IDENTITY, KERAS_LAYOUTS, Layout
from idefics_tf.host_memory import aligned_empty, take_over

_LARGE = 2**30  # bytes from which loading shows its progress
_READERS = 2  # threads; a copy keeps one core busy, and two of them most of the memory bus
_BLOCK = 2**19  # bytes read at a time: fit for a cache
_LINE = 64  # bytes of a cache line


class Weight(NamedTuple):
    """A variable of a model, its row of the parameter table, and how its axes are ordered."""

    parameter: Parameter
    variable: keras.Variable
    layout: Layout


def weights_by_name(model) -> dict[str, Weight]:
    """The weights of a model by canonical name, which starts with "model." with and without a head; tied ones aside."""
    prefix = f"{model.path}/"
    variables = {variable.path.removeprefix(prefix): variable for variable in model.weights}
    start = "" if model.has_head else f"{MODEL.keras}/"
    return {
        parameter.name: Weight(
            parameter, variables[parameter.keras_path.removeprefix(start)], KERAS_LAYOUTS[parameter.kind]
        )
        for parameter in expand(model.config)
        if parameter.tied_to is None and (model.has_head or parameter.part != Part.HEAD)
    }


def dtype_of(checkpoint: Checkpoint) -> str:
    """The dtype of most bytes of a checkpoint; a model keeps it unless told otherwise."""
    nbytes = Counter()
    for info in checkpoint.infos.values():
        nbytes[info.dtype.name] += info.nbytes
    dtype = nbytes.most_common(1)[0][0]
    return "float32" if dtype == "float64" else dtype


def bytes_of_variables(checkpoint: Checkpoint, names: dict[str, str], dtype) -> dict[str, int]:
    """Bytes in host memory of each variable of a model with a dtype or policy, by its name in the file.

    Empty where there is a GPU: variables are there.
    """
    if tf.config.list_physical_devices("GPU"):
        return {}
    itemsize = np.dtype(keras.dtype_policies.get(dtype).variable_dtype).itemsize
    return {name: math.prod(checkpoint.info(name).shape) * itemsize for name in names}


def read_weights(model, checkpoint: Checkpoint, names: dict[str, str], memory: dict[str, np.ndarray]) -> None:
    """Assign every weight of a model from a checkpoint, in the order of the file.

    A few threads read ahead, by at most `_READERS` tensors. So memory holds the model, a block for each thread, and
    where variables are not in host memory, that many tensors and one once more.

    Args:
        names: canonical names of the tensors to read, by their names in the file.
        memory: arrays of bytes to use up for tensors of the file, by name; see `idefics_tf.host_memory.provided`.
    """
    weights = weights_by_name(model)
    wanted = [name for name in checkpoint if name in names]
    missing = weights.keys() - {names[name] for name in wanted}
    assert not missing, f"no values to read for {sorted(missing)}"

    def read(file_name: str) -> np.ndarray:
        _, variable, layout = weights[names[file_name]]
        if checkpoint.format == keras_file.FORMAT:
            layout = IDENTITY  # the file has the axes of the variables
        return _read_tensor(checkpoint, file_name, layout, np.dtype(variable.dtype), memory.pop(file_name, None))

    total = sum(checkpoint.info(name).nbytes for name in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=total < _LARGE) as progress:
        for file_name, array in zip(wanted, _map_ahead(read, wanted), strict=True):
            weights[names[file_name]].variable.assign(take_over(array))
            progress.update(checkpoint.info(file_name).nbytes)


def _read_tensor(
    checkpoint: Checkpoint, name: str, layout: Layout, dtype: np.dtype, memory: np.ndarray | None
) -> np.ndarray:
    """A tensor of at least one dimension, in a layout and a dtype, in memory that a variable can take over."""
    info = checkpoint.info(name)
    rows, shape = info.shape[0], layout.shape(info.shape)
    array = aligned_empty(shape, dtype) if memory is None else memory.view(dtype).reshape(shape)
    if layout == IDENTITY and dtype == info.dtype:
        return checkpoint.read_rows(name, 0, rows, array)
    canonical = layout.inverse(array)
    line = _LINE // dtype.itemsize  # as many rows fill cache lines when they become columns
    step = max(1, _BLOCK * rows // info.nbytes // line) * line
    block = np.empty((step, *info.shape[1:]), info.dtype)
    padded = _padded_rows(block.shape, dtype, line)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        padded[:count] = checkpoint.read_rows(name, start, start + count, block[:count])
        canonical[start : start + count] = padded[:count]
    return array


def _padded_rows(shape: tuple[int, ...], dtype: np.dtype, padding: int) -> np.ndarray:
    """An uninitialised array with unused values after each row.

    When rows become columns, a value of each row is read in turn. Rows that are a power of two apart would drive each
    other out of the cache, which knows them by the lower bits of their addresses: that takes three times as long.
    """
    width = math.prod(shape[1:])
    return np.empty((shape[0], width + padding), dtype)[:, :width].reshape(shape)


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
