"""What both formats in HDF5 have in common: files that are laid out, whole or in shards."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py

from conversion.formats.base import Format, Output


class H5Format(Format):
    """A format of HDF5 files."""

    @abstractmethod
    def add_tensors(self, file: h5py.File, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        """Lay out a whole file or a shard; gives the name of each tensor with its offset."""

    def lay_out_file(self, path: Path, outputs: Sequence[Output], is_whole: bool) -> dict[str, int]:
        with h5py.File(path, "x") as file:
            return dict(self.add_tensors(file, outputs, is_whole))
