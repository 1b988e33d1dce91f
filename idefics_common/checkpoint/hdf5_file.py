"""One HDF5 file as a source of tensors: read by rows or by columns, and trusted in nothing.

HDF5 can do far more than a checkpoint needs, and most of it can be turned against a reader: links to other files,
links in a circle, values kept in other files, compressed values that expand without bound. All that is refused; what is
left are groups in a tree and datasets whose values lie in the file, plain, in one piece each.

Keras stores bfloat16 as opaque elements of two bytes with an attribute `dtype`; nothing else is bfloat16.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from idefics_common.checkpoint.checkpoint import Checkpoint
from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.files import open_regular_file
from idefics_common.checkpoint.index import WeightMap, open_shards
from idefics_common.checkpoint.tensor_source import TensorInfo, TensorSource

MAX_OBJECTS = 100_000
MAX_DEPTH = 32

OPAQUE = np.dtype("V2")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PLAIN_DTYPES = {np.dtype(name) for name in ("<f8", "<f4", "<f2", "<i8", "<i4", "<u4", "<i2", "i1", "u1")}
_PLAIN_LAYOUTS = (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT)

# what h5py raises for a damaged file, depending on the damage
_H5_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, AttributeError, MemoryError)


def open_h5(
    path: Path,
    format_name: str,
    ending: str,
    tensor_name: Callable[[str, bool], str | None],
    read_index: Callable[[Path], WeightMap],
    entry_of: Callable[[str], str] = str,
) -> Checkpoint:
    """Open and check an HDF5 file of tensors, or the shards of an index, whose name ends in ``.json``.

    Args:
        format_name: of the format of the checkpoint.
        ending: of the names of shards.
        tensor_name: the name of the tensor in the dataset at a path, in a whole file or in a shard; None if it is none.
        read_index: reads the shards of each entry of an index.
        entry_of: the entry of the index under which a tensor stands; its own name by default.

    Raises CheckpointError, naming the file and where there is one the tensor.
    """

    def open_file(file: Path) -> H5File:
        return H5File(file, format_name, lambda dataset: tensor_name(dataset, is_whole))

    is_whole = path.suffix != ".json"
    if is_whole:
        return Checkpoint(path, [open_file(path)])
    return Checkpoint(path, open_shards(path, read_index(path), ending, open_file, entry_of))


class H5File(TensorSource):
    """An open HDF5 file.

    Args:
        path: the file.
        format_name: value of `format`.
        name_dataset: the name of the tensor in a dataset, from its path; None for a dataset that is none.

    Raises CheckpointError for a file that is damaged, or is more than groups and plain datasets.
    """

    def __init__(self, path: Path, format_name: str, name_dataset: Callable[[str], str | None]):
        self.path, self.format = path, format_name
        with open_regular_file(path) as file:
            self.size = os.fstat(file.fileno()).st_size
        try:
            self._file = h5py.File(path, "r", locking=False)
        except _H5_ERRORS as error:
            raise CheckpointError(path, f"cannot be read as HDF5: {_reason(error)}") from error
        try:
            datasets = dict(self._walk())
            self._refuse_overlaps(datasets.values())
            self._paths = self._name_all(datasets, name_dataset)
        except CheckpointError:
            self._file.close()
            raise
        except _H5_ERRORS as error:
            self._file.close()
            raise CheckpointError(path, f"is damaged: {_reason(error)}") from error
        self.infos = {name: replace(datasets[at], name=name) for name, at in self._paths.items()}

    def close(self) -> None:
        self._file.close()

    def _fill(self, out: np.ndarray, info: TensorInfo, axis: int, start: int, stop: int) -> None:
        if not out.size:
            return
        selection = (slice(None),) * axis + (slice(start, stop),) if info.shape else ()
        destination = out.view(OPAQUE) if out.dtype == BFLOAT16 else out
        try:
            self._file[self._paths[info.name]].read_direct(destination, source_sel=selection)
        except _H5_ERRORS as error:
            raise CheckpointError(self.path, f"cannot be read: {_reason(error)}", info.name) from error

    def _name_all(self, datasets: Iterable[str], name_dataset: Callable[[str], str | None]) -> dict[str, str]:
        """The path of each tensor's dataset by the name of the tensor."""
        paths: dict[str, str] = {}
        for at in datasets:
            name = name_dataset(at)
            if name in paths:
                raise CheckpointError(self.path, f"is there twice, as {quote(paths[name])} and as {quote(at)}", name)
            if name is not None:
                paths[name] = at
        return paths

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
            known = ", ".join(sorted(plain.name for plain in _PLAIN_DTYPES))
            refuse(f"dtype {quote(str(dtype))} is none of bfloat16 as Keras marks it, {known}")
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

    def _refuse_overlaps(self, infos: Iterable[TensorInfo]) -> None:
        end, before = 0, ""
        for info in sorted(infos, key=lambda info: info.offset):
            if info.nbytes and info.offset:
                if info.offset < end:
                    raise CheckpointError(self.path, f"shares bytes with {quote(before)}", info.name)
                end, before = info.offset + info.nbytes, info.name


def _reason(error: Exception) -> str:
    return str(error).strip("'\"").partition("\n")[0] or type(error).__name__
