"""Tensors as ranges of bytes in one file: what safetensors and `.bin` readers have in common.

Two ways to the values. `read` and `read_block` copy from the file into ordinary memory and leave no page of a
memory map resident, which is what a converter with bounded memory needs. `map` gives views of a read-only
memory map, which is what loading a model wants; `release` gives its pages back. `read` of a file that is cut
short meanwhile is an error, where touching a mapped array would kill the process.

POSIX only (`os.preadv`); safe to call from several threads.
"""

import mmap
import os
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np

from idefics_common.checkpoint.errors import CheckpointError
from idefics_common.checkpoint.files import open_regular_file
from idefics_common.checkpoint.tensor_source import TensorInfo, TensorSource

# Linux moves at most 2 GiB less a page per call; asking for less keeps the arithmetic plain.
_LONGEST_READ = 1 << 30


class TensorFile(TensorSource):
    """One open file of tensors. Subclasses say in `_read_layout` which tensors lie where."""

    format: ClassVar[str]

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._file = open_regular_file(self.path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._refuse_lfs_pointer()
            infos = sorted(self._read_layout(), key=lambda info: info.offset)
        except BaseException:
            self._file.close()
            raise
        self.infos = {info.name: info for info in infos}

    @abstractmethod
    def _read_layout(self) -> list[TensorInfo]:
        """Check the whole file but for the values, and describe its tensors. Raises CheckpointError."""

    def map(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file, which stays valid after `close`.

        A file may put a tensor at an address that the processor reads slowly or not at all (safetensors
        permits odd ones); that one comes as a read-only copy.
        """
        view = self._map_view(self.info(name))
        if not view.flags.aligned:
            view = self.read(name)
            view.flags.writeable = False
        return view

    def release(self, name: str) -> None:
        """Give back the resident pages of a mapped tensor. Its arrays stay valid: the file is read again."""
        info = self.info(name)
        extent = _extent(info)
        if self._map is None or extent == 0:
            return
        first_page = info.offset - info.offset % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first_page, info.offset + extent - first_page)

    def close(self) -> None:
        """Close the file. Mapped arrays keep the memory map alive until the last of them is gone."""
        self._file.close()
        self._map = None

    def _fill(self, out: np.ndarray, info: TensorInfo, axis: int, start: int, stop: int) -> None:
        if info.strides is None and axis == 0:
            row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
            self._read_into(out.reshape(-1).view(np.uint8), info.offset + start * row_bytes, info.name)
            return
        view = self._map_view(info)
        # A scalar has no rows to slice.
        out[...] = view[(slice(None),) * axis + (slice(start, stop),)] if info.shape else view
        self.release(info.name)

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

    def _map_view(self, info: TensorInfo) -> np.ndarray:
        """The stored values in place, not necessarily aligned."""
        self._refuse_closed()
        if info.nbytes == 0:
            empty = np.empty(info.shape, info.dtype)
            empty.flags.writeable = False
            return empty
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        return np.ndarray(info.shape, info.dtype, self._map, info.offset, info.strides)

    def _refuse_closed(self) -> None:
        if self._file.closed:
            raise CheckpointError(self.path, "is closed; its tensors can no longer be read")

    def _refuse_lfs_pointer(self) -> None:
        if self._read_bytes(0, 32).startswith(b"version https://git-lfs"):
            raise CheckpointError(
                self.path, "is a Git LFS pointer, not the file it points to; fetch that with `git lfs pull`"
            )


def _extent(info: TensorInfo) -> int:
    """Bytes from the first value to the end of the last; less or more than `nbytes` where strided."""
    if info.strides is None or info.nbytes == 0:
        return info.nbytes
    steps = zip(info.shape, info.strides, strict=True)
    return sum((size - 1) * stride for size, stride in steps) + info.dtype.itemsize
