"""One HDF5 file as a source of tensors: read by rows or by columns, and trusted in nothing.

HDF5 can do far more than a checkpoint needs, and most of it can be turned against a reader: links to other files,
links in a circle, values kept in other files, compressed values that expand without bound. All that is refused; what is
left are groups in a tree and datasets whose values lie in the file, plain, in one piece each.

Keras stores bfloat16 as opaque elements of two bytes with an attribute `dtype`; nothing else is bfloat16.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from idefics_common.checkpoint import CheckpointError, TensorInfo
from idefics_common.checkpoint.errors import quote

MAX_OBJECTS = 100_000
MAX_DEPTH = 32

OPAQUE = np.dtype("V2")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PLAIN_DTYPES = {np.dtype(name) for name in ("<f8", "<f4", "<f2", "<i8", "<i4", "<u4", "<i2", "i1", "u1")}
_PLAIN_LAYOUTS = (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT)

# what h5py raises for a damaged file, depending on the damage
_H5_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, AttributeError, MemoryError)


class H5File:
    """An open HDF5 file; a `TensorSource`.

    Args:
        path: the file.
        format_name: value of `format`.
        name_dataset: the name of the tensor in a dataset, from its path; None for a dataset that is none.

    Raises CheckpointError for a file that is damaged, or is more than groups and plain datasets.
    """

    def __init__(self, path: Path, format_name: str, name_dataset: Callable[[str], str | None]):
        self.path, self.format = path, format_name
        self.size = _size_of_regular_file(path)
        try:
            self._file = h5py.File(path, "r", locking=False)
        except _H5_ERRORS as error:
            raise CheckpointError(path, f"cannot be read as HDF5: {_reason(error)}") from error
        try:
            self._datasets = dict(self._walk())
            self._refuse_overlaps()
            self._paths = self._name_all(name_dataset)
        except CheckpointError:
            self._file.close()
            raise
        except _H5_ERRORS as error:
            self._file.close()
            raise CheckpointError(path, f"is damaged: {_reason(error)}") from error

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._paths)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.info(name).nbytes for name in self)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises CheckpointError for a name that is not in the file."""
        stored = self._datasets[self._path_of(name)]
        return TensorInfo(name, stored.dtype, stored.shape, stored.nbytes, stored.file, stored.offset)

    def read(self, name: str) -> np.ndarray:
        """The tensor in memory of its own."""
        info = self.info(name)
        if info.shape:
            return self.read_rows(name, 0, info.shape[0])
        out = np.empty((), info.dtype)
        self._read_into(name, (), out)
        return out

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis, in memory of their own or in `out`."""
        return self.read_block(name, 0, start, stop, out)

    def read_block(self, name: str, axis: int, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """The part of a tensor with `start:stop` along one axis.

        Args:
            out: C-contiguous array of the part's shape and of the tensor's dtype to fill; by default a new one.

        Raises ValueError for a part or an `out` that do not fit, CheckpointError for an unknown name.
        """
        info = self.info(name)
        if not 0 <= start <= stop <= info.shape[axis]:
            raise ValueError(f"{self.path}: tensor {quote(name)}: axis {axis} of {info.shape} has no {start}:{stop}")
        shape = (*info.shape[:axis], stop - start, *info.shape[axis + 1 :])
        if out is None:
            out = np.empty(shape, info.dtype)
        elif out.shape != shape or out.dtype != info.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"{self.path}: tensor {quote(name)}: out must be a C-contiguous {info.dtype} array of shape {shape}, "
                f"got {out.dtype} {out.shape}"
            )
        if out.size:
            self._read_into(name, (slice(None),) * axis + (slice(start, stop),), out)
        return out

    def map(self, name: str) -> np.ndarray:
        """The tensor, read-only; a copy, because HDF5 files are not mapped."""
        array = self.read(name)
        array.flags.writeable = False
        return array

    def release(self, name: str) -> None:
        """Nothing: no pages are held."""

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def _name_all(self, name_dataset: Callable[[str], str | None]) -> dict[str, str]:
        paths: dict[str, str] = {}
        for at in self._datasets:
            name = name_dataset(at)
            if name in paths:
                raise CheckpointError(self.path, f"is there twice, as {quote(paths[name])} and as {quote(at)}", name)
            if name is not None:
                paths[name] = at
        return paths

    def _path_of(self, name: str) -> str:
        try:
            return self._paths[name]
        except KeyError:
            raise CheckpointError(self.path, f"not in this file of {len(self)} tensors", name) from None

    def _read_into(self, name: str, selection: tuple, out: np.ndarray) -> None:
        destination = out.view(OPAQUE) if out.dtype == BFLOAT16 else out
        try:
            self._file[self._path_of(name)].read_direct(destination, source_sel=selection)
        except _H5_ERRORS as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(self.path, f"cannot be read: {_reason(error)}", name) from error

    def _walk(self) -> Iterator[tuple[str, TensorInfo]]:
        """Every dataset by its path, once it is known that the groups are a tree."""
        seen: set[int] = set()
        pending = [("", self._file["/"])]
        while pending:
            at, item = pending.pop()
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                raise CheckpointError(self.path, f"refused: {quote(at)} is linked to from two places")
            seen.add(address)
            if len(seen) > MAX_OBJECTS or at.count("/") >= MAX_DEPTH:
                raise CheckpointError(
                    self.path, f"refused: more than {MAX_OBJECTS} objects, or groups nested deeper than {MAX_DEPTH}"
                )
            if isinstance(item, h5py.Dataset):
                yield at, self._check_dataset(at, item)
            elif isinstance(item, h5py.Group):
                # reversed, because the last one is taken first
                pending += reversed([self._follow(item, at, name) for name in item])
            else:
                raise CheckpointError(self.path, f"refused: {quote(at)} is neither a group nor a dataset")

    def _follow(self, group: h5py.Group, at: str, name: str) -> tuple[str, object]:
        path = f"{at}/{name}" if at else name
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise CheckpointError(
                self.path, f"refused: {quote(path)} is a {type(link).__name__}, not an object of its own"
            )
        return path, group[name]

    def _check_dataset(self, at: str, dataset: h5py.Dataset) -> TensorInfo:
        def refuse(problem: str):
            raise CheckpointError(self.path, problem, at)

        properties = dataset.id.get_create_plist()
        if properties.get_layout() not in _PLAIN_LAYOUTS or properties.get_nfilters():
            refuse("refused: its values are compressed, in chunks or in other datasets; expected plain values")
        if properties.get_external_count():
            refuse("refused: its values are in another file")
        if dataset.shape is None:
            refuse("holds no values")
        dtype = dataset.dtype
        if dtype == OPAQUE and self._is_bfloat16(dataset):
            dtype = BFLOAT16
        elif dtype not in _PLAIN_DTYPES:
            refuse(f"dtype {quote(str(dtype))} is none of bfloat16 as Keras marks it, {_names(_PLAIN_DTYPES)}")
        nbytes = dataset.size * dtype.itemsize
        offset = dataset.id.get_offset()
        if properties.get_layout() == h5py.h5d.COMPACT:
            offset = 0
        elif nbytes and (offset is None or offset + nbytes > self.size):
            refuse(f"its {nbytes} bytes do not lie in the file of {self.size}: truncated, or never written")
        return TensorInfo(at, dtype, dataset.shape, nbytes, self.path, offset or 0)

    def _is_bfloat16(self, dataset: h5py.Dataset) -> bool:
        """Whether two opaque bytes are marked by Keras, which does so where HDF5 has no type for a dtype of that size.

        What the mark says is not read, for HDF5 takes as much memory as a string is said to be long, 4 GB at most.
        """
        if "dtype" not in dataset.attrs:
            return False
        mark = dataset.attrs.get_id("dtype")
        return mark.shape in ((), (1,)) and mark.get_type().get_class() == h5py.h5t.STRING

    def _refuse_overlaps(self) -> None:
        end, before = 0, ""
        for info in sorted(self._datasets.values(), key=lambda info: info.offset):
            if info.nbytes and info.offset:
                if info.offset < end:
                    raise CheckpointError(self.path, f"shares bytes with {quote(before)}", info.name)
                end, before = info.offset + info.nbytes, info.name


def _size_of_regular_file(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(path, "is not a regular file")
    return status.st_size


def _reason(error: Exception) -> str:
    return str(error).strip("'\"").partition("\n")[0] or type(error).__name__


def _names(dtypes) -> str:
    return ", ".join(sorted(dtype.name for dtype in dtypes))
