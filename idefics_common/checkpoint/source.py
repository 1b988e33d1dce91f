"""What a reader of tensors looks like from outside, whatever the file format."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

FLOAT_DTYPES = frozenset(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
"""Dtypes that a parameter may be stored in."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its file describes it.

    Attributes:
        name: name in the file.
        dtype: numpy dtype; bfloat16 is `ml_dtypes.bfloat16`.
        shape: dimensions; `()` for a scalar.
        nbytes: bytes of the values, shape product times item size.
        file: the file that holds it.
        offset: bytes from the start of the file to the first value.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that can be read one at a time, in whole or by rows.

    Iteration and `names` go in the order of the files, so that a pass over all tensors reads sequentially.
    Every method that takes a name raises `CheckpointError` for one that the source does not hold.
    """

    format: str
    """Name of the format, as `convert-weights --to` spells it: "safetensors", "bin", ..."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""

    def info(self, name: str) -> TensorInfo:
        """Name, dtype, shape and place of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """The tensor in memory of its own, writable and contiguous."""

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` along the first axis, in memory of their own or in `out`, which is returned."""

    def map(self, name: str) -> np.ndarray:
        """The tensor as a read-only array; a view of the file where the format allows it."""

    def release(self, name: str) -> None:
        """Give back the memory pages that reading from `map(name)` has made resident."""

    def close(self) -> None: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...
