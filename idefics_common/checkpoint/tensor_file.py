"""Tensors as ranges of bytes in one file: what safetensors and `.bin` readers have in common.

Values are copied into ordinary memory, and no page of the file stays in that of the process, which is what a converter
with bounded memory needs. Rows are read, so that a file that is cut short meanwhile is an error. Only values that lie
in another order are copied through a memory map, which lasts as long as that one copy.

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

    def close(self) -> None:
        self._file.close()

    def _fill(self, out: np.ndarray, info: TensorInfo, axis: int, start: int, stop: int) -> None:
        if info.strides is None and axis == 0:
            row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
            self._read_into(out.reshape(-1).view(np.uint8), info.offset + start * row_bytes, info.name)
            return
        self._refuse_closed()
        if out.size:
            mapped = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
            view = np.ndarray(info.shape, info.dtype, mapped, info.offset, info.strides)
            # A scalar has no rows to slice.
            out[...] = view[(slice(None),) * axis + (slice(start, stop),)] if info.shape else view

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

    def _refuse_closed(self) -> None:
        if self._file.closed:
            raise CheckpointError(self.path, "is closed; its tensors can no longer be read")

    def _refuse_lfs_pointer(self) -> None:
        if self._read_bytes(0, 32).startswith(b"version https://git-lfs"):
            raise CheckpointError(
                self.path, "is a Git LFS pointer, not the file it points to; fetch that with `git lfs pull`"
            )
