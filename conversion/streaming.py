"""Tensors in blocks of rows through buffers of a fixed size: transposing, casting, and writing at known offsets.

Peak memory grows neither with a checkpoint nor with its largest tensor: a block of a tensor in another order of axes is
written as one run of bytes per row of the file.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from conversion.errors import ConversionError
from conversion.formats.base import Output

BLOCK_BYTES = 16 * 2**20
"""Size of a block. Smaller ones make short runs of a transposed tensor, larger ones take more memory per worker."""

_CACHE_LINE = 64
_CHUNK = 2**17  # elements whose casting error is measured at a time


class Buffers:
    """Reusable memory for blocks, one piece for each role a block can play; for one thread."""

    def __init__(self, block_bytes: int = BLOCK_BYTES):
        self.block_bytes = block_bytes
        self._memory: dict[str, np.ndarray] = {}

    def array(self, role: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised C-contiguous array in the memory of `role`, which overwrites the last one there."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(role)
        if memory is None or memory.nbytes < nbytes:
            memory = self._memory[role] = np.empty(nbytes, np.uint8)
        return memory[:nbytes].view(dtype).reshape(shape)


def row_blocks(shape: tuple[int, ...], itemsize: int, block_bytes: int) -> Iterator[range]:
    """The rows of a tensor, as many at a time as fit in a block; one at least."""
    step = max(1, block_bytes // (math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        yield range(start, min(start + step, shape[0]))


def transpose_into(out: np.ndarray, view: np.ndarray) -> None:
    """Copy `view`, an array of the same shape in another order of memory, to the C-contiguous `out`.

    Matrices go in strips that fill whole cache lines of `out`, which is several times as fast as numpy's own order.
    """
    if out.ndim != 2:
        np.copyto(out, view)
        return
    step = max(1, _CACHE_LINE // out.itemsize)
    for column in range(0, out.shape[1], step):
        out[:, column : column + step] = view[:, column : column + step]


@dataclass
class CastError:
    """By how much a lossy cast has changed the values of a tensor.

    Attributes:
        largest, total: of the absolute differences. count: how many values.
    """

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def add(self, before: np.ndarray, after: np.ndarray, name: str) -> None:
        """Account for a block. Raises ConversionError for a finite value that is not finite any more."""
        before, after = before.reshape(-1), after.reshape(-1)
        for start in range(0, before.size, _CHUNK):
            exact = before[start : start + _CHUNK].astype(np.float64)
            rounded = after[start : start + _CHUNK].astype(np.float64)
            finite = np.isfinite(exact)
            if not np.isfinite(rounded[finite]).all():
                worst = float(np.abs(exact[finite]).max())
                raise ConversionError(f"tensor {name}: {after.dtype} cannot hold {worst:g}; bfloat16 and float32 can")
            difference = np.abs(exact[finite] - rounded[finite])
            self.largest = max(self.largest, float(difference.max(initial=0.0)))
            self.total += float(difference.sum())
            self.count += exact.size


def cast(block: np.ndarray, dtype: np.dtype, buffers: Buffers) -> np.ndarray:
    """A block in another dtype, in a buffer of its own; rounded to nearest, ties to even."""
    if block.dtype == dtype:
        return block
    out = buffers.array("cast", block.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, block, casting="unsafe")
    return out


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two C-contiguous arrays of one dtype hold the same bits; NaNs with different payloads differ."""
    # long words make the comparison, and the temporary array of its results, short
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))


def write_rows(file: int, offset: int, output: Output, rows: range, block: np.ndarray, buffers: Buffers) -> None:
    """Write consecutive rows of a tensor, given in PyTorch's layout.

    Args:
        file: descriptor of the file. offset: where the tensor starts in it.
    """
    layout, shape = output.layout, output.shape
    if layout.axes is None:
        _write_all(file, as_bytes(block), offset + rows.start * (block.nbytes // len(rows)))
        return
    stored = buffers.array("stored", layout.shape(block.shape), block.dtype)
    transpose_into(stored, layout.apply(block))
    axis = layout.axes.index(0)
    # bytes from one index of the axis to the next; along the axes before it, the block is a run of bytes each
    stride = math.prod(shape[axis + 1 :]) * block.itemsize
    if len(rows) == shape[axis]:
        _write_all(file, as_bytes(stored), offset)
        return
    runs = as_bytes(stored).reshape(math.prod(shape[:axis]), len(rows) * stride)
    for number, run in enumerate(runs):
        _write_all(file, run, offset + (number * shape[axis] + rows.start) * stride)


def _write_all(file: int, raw: np.ndarray, offset: int) -> None:
    view = memoryview(raw)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
