"""Named tensors of a checkpoint, read one at a time, whole or by rows: what all readers have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote

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
        strides: bytes from one index of each axis to the next, where the values do not lie row after row.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None


class TensorSource(AbstractContextManager):
    """Named tensors that can be read one at a time.

    Iteration gives their names, file by file and in the order of their place in each, so that a pass over all tensors
    reads sequentially.

    Attributes:
        format: name of the format, as `convert-weights --to` spells it: "safetensors", "bin", ...
        path: the file, or for shards their index.
        infos: every tensor's description by its name.
    """

    format: str
    path: Path
    infos: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together; those that share their bytes (tied, in a `.bin`) count each."""
        return sum(info.nbytes for info in self.infos.values())

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises CheckpointError for an unknown name, as all methods do."""
        try:
            return self.infos[name]
        except KeyError:
            raise CheckpointError(self.path, f"not in this checkpoint of {len(self)} tensors", name) from None

    def read(self, name: str) -> np.ndarray:
        """The tensor in new memory: writable, contiguous, exactly the stored bits."""
        info = self.info(name)
        out = np.empty(info.shape, info.dtype)
        self._fill(out, info, 0, 0, info.shape[0] if info.shape else 1)
        return out

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis; see `read_block`."""
        return self.read_block(name, 0, start, stop, out)

    def read_block(self, name: str, axis: int, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """The part of a tensor with `start:stop` along one axis.

        Args:
            name: a tensor with at least one dimension.
            start, stop: 0 <= start <= stop <= shape[axis].
            out: C-contiguous array of the part's shape and of the tensor's dtype to fill; by default a new one.

        Raises ValueError for a part or an `out` that do not fit.
        """
        info = self.info(name)
        if not info.shape:
            raise ValueError(f"{self.path}: tensor {quote(name)} is a scalar and has no rows")
        if not 0 <= start <= stop <= info.shape[axis]:
            what = f"has {info.shape[axis]} {'columns' if axis else 'rows'}, not {start}:{stop}"
            raise ValueError(f"{self.path}: tensor {quote(name)} {what}")
        shape = (*info.shape[:axis], stop - start, *info.shape[axis + 1 :])
        if out is None:
            out = np.empty(shape, info.dtype)
        elif out.shape != shape or out.dtype != info.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"{self.path}: tensor {quote(name)}: out must be a C-contiguous {info.dtype} array of shape {shape}, "
                f"got {out.dtype} {out.shape}"
            )
        self._fill(out, info, axis, start, stop)
        return out

    @abstractmethod
    def _fill(self, out: np.ndarray, info: TensorInfo, axis: int, start: int, stop: int) -> None:
        """Read `start:stop` along an axis into an array of that shape; the whole tensor if it is a scalar."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos
