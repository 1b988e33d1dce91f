"""Tensors as ranges of bytes in one file: what safetensors and `.bin` readers have in common.

Two ways to the values. `read` and `read_rows` copy from the file into ordinary memory and leave no page of a
memory map resident, which is what a converter with bounded memory needs. `map` gives views of a read-only
memory map, which is what loading a model wants; `release` gives its pages back. `read` of a file that is cut
short meanwhile is an error, where touching a mapped array would kill the process.

POSIX only (`os.preadv`); safe to call from several threads.
"""

import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.source import TensorInfo

# Linux moves at most 2 GiB less a page per call; asking for less keeps the arithmetic plain.
_LONGEST_READ = 1 << 30


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's description and, where it is not stored row after row, its strides in bytes."""

    info: TensorInfo
    strides: tuple[int, ...] | None = None

    @property
    def extent(self) -> int:
        """Bytes from the first value to the end of the last; less or more than `nbytes` where strided."""
        if self.strides is None or self.info.nbytes == 0:
            return self.info.nbytes
        steps = zip(self.info.shape, self.strides, strict=True)
        return sum((size - 1) * stride for size, stride in steps) + self.info.dtype.itemsize


class TensorFile(ABC):
    """One open file of tensors. Subclasses say in `_read_layout` which tensors lie where."""

    format: ClassVar[str]

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._file = _open_regular_file(self.path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._refuse_lfs_pointer()
            stored = sorted(self._read_layout(), key=lambda tensor: tensor.info.offset)
        except BaseException:
            self._file.close()
            raise
        self._stored = {tensor.info.name: tensor for tensor in stored}

    @abstractmethod
    def _read_layout(self) -> list[StoredTensor]:
        """Check the whole file but for the values, and describe its tensors. Raises CheckpointError."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of their place in the file."""
        return tuple(self._stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together; those that share their bytes (tied, in a `.bin`) count each."""
        return sum(tensor.info.nbytes for tensor in self._stored.values())

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises CheckpointError for a name that is not in the file."""
        return self._find(name).info

    def read(self, name: str) -> np.ndarray:
        """The tensor in memory of its own: writable, contiguous, exactly the stored bits."""
        stored = self._find(name)
        info = stored.info
        if stored.strides is not None:
            out = np.empty(info.shape, info.dtype)
            self._copy_strided(stored, slice(None), out)
            return out
        raw = np.empty(info.nbytes, np.uint8)
        self._read_into(raw, info.offset, name)
        return raw.view(info.dtype).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis.

        Args:
            name: a tensor with at least one dimension.
            start, stop: 0 <= start <= stop <= shape[0].
            out: C-contiguous array of the rows' shape and of the tensor's dtype to fill; by default a new one.

        Raises ValueError for rows or an `out` that do not fit, CheckpointError for an unknown name.
        """
        stored = self._find(name)
        info = stored.info
        if not info.shape:
            raise ValueError(f"{self.path}: tensor {quote(name)} is a scalar and has no rows")
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{self.path}: tensor {quote(name)} has {info.shape[0]} rows, not {start}:{stop}")
        shape = (stop - start, *info.shape[1:])
        if out is None:
            out = np.empty(shape, info.dtype)
        elif out.shape != shape or out.dtype != info.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"{self.path}: tensor {quote(name)}: out must be a C-contiguous {info.dtype} array of shape {shape}, "
                f"got {out.dtype} {out.shape}"
            )
        if stored.strides is not None:
            self._copy_strided(stored, slice(start, stop), out)
            return out
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        self._read_into(out.reshape(-1).view(np.uint8), info.offset + start * row_bytes, name)
        return out

    def map(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file, which stays valid after `close`.

        A file may put a tensor at an address that the processor reads slowly or not at all (safetensors
        permits odd ones); that one comes as a read-only copy.
        """
        stored = self._find(name)
        view = self._map_view(stored)
        if not view.flags.aligned:
            view = self.read(name)
            view.flags.writeable = False
        return view

    def release(self, name: str) -> None:
        """Give back the resident pages of a mapped tensor. Its arrays stay valid: the file is read again."""
        stored = self._find(name)
        if self._map is None or stored.extent == 0:
            return
        offset = stored.info.offset
        first_page = offset - offset % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first_page, offset + stored.extent - first_page)

    def close(self) -> None:
        """Close the file. Mapped arrays keep the memory map alive until the last of them is gone."""
        self._file.close()
        self._map = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._stored[name]
        except KeyError:
            raise CheckpointError(self.path, f"not in this file of {len(self)} tensors", name) from None

    def _read_into(self, raw: np.ndarray, offset: int, name: str | None = None) -> None:
        """Fill `raw`, contiguous bytes, from `offset` in the file; `name` is for the message."""
        self._refuse_closed()
        done = 0
        while done < raw.nbytes:
            try:
                got = os.preadv(self._file.fileno(), [raw[done : done + _LONGEST_READ]], offset + done)
            except OSError as error:
                raise CheckpointError(self.path, f"cannot be read: {error.strerror}", name) from error
            if got == 0:
                problem = f"the file ends at byte {offset + done}; it had {self.size} bytes when it was opened"
                raise CheckpointError(self.path, problem, name)
            done += got

    def _read_bytes(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`, fewer where the file ends before."""
        raw = np.empty(max(0, min(count, self.size - offset)), np.uint8)
        self._read_into(raw, offset)
        return raw.tobytes()

    def _map_view(self, stored: StoredTensor) -> np.ndarray:
        """The stored values in place, not necessarily aligned."""
        self._refuse_closed()
        info = stored.info
        if info.nbytes == 0:
            empty = np.empty(info.shape, info.dtype)
            empty.flags.writeable = False
            return empty
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        return np.ndarray(info.shape, info.dtype, self._map, info.offset, stored.strides)

    def _copy_strided(self, stored: StoredTensor, rows: slice, out: np.ndarray) -> None:
        view = self._map_view(stored)
        # A scalar has no rows to slice.
        out[...] = view[rows] if stored.info.shape else view
        self.release(stored.info.name)

    def _refuse_closed(self) -> None:
        if self._file.closed:
            raise CheckpointError(self.path, "is closed; its tensors can no longer be read")

    def _refuse_lfs_pointer(self) -> None:
        if self._read_bytes(0, 32).startswith(b"version https://git-lfs"):
            raise CheckpointError(
                self.path, "is a Git LFS pointer, not the file it points to; fetch that with `git lfs pull`"
            )


def _open_regular_file(path: Path) -> BinaryIO:
    try:
        # Asked before opening: opening a named pipe would wait for its writer for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(path, "is not a regular file")
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
