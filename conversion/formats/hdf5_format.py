"""What both formats in HDF5 have in common: files that are read by name and laid out, whole or in shards."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py

from conversion.formats.base import Format, Output
from conversion.formats.hdf5_reader import H5File
from idefics_common.checkpoint.checkpoint import Checkpoint
from idefics_common.checkpoint.index import WeightMap, open_shards


class H5Format(Format):
    """A format of HDF5 files."""

    @abstractmethod
    def tensor_name(self, path: str, is_whole: bool) -> str | None:
        """The name of the tensor in the dataset at a path in a whole file or a shard; None if it is no tensor."""

    @abstractmethod
    def read_index(self, path: Path) -> WeightMap:
        """The shards of each entry of an index. Raises CheckpointError for a file that is no index."""

    def entry_of(self, name: str) -> str:
        """The entry of the index under which a tensor stands."""
        return name

    @abstractmethod
    def add_tensors(self, file: h5py.File, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        """Lay out a whole file or a shard; gives the name of each tensor with its offset."""

    def open(self, path: Path) -> Checkpoint:
        def open_file(file: Path) -> H5File:
            return H5File(file, self.name, lambda dataset: self.tensor_name(dataset, is_whole))

        is_whole = path.suffix != ".json"
        if is_whole:
            return Checkpoint(path, [open_file(path)])
        return Checkpoint(path, open_shards(path, self.read_index(path), self.ending, open_file, self.entry_of))

    def lay_out_file(self, path: Path, outputs: Sequence[Output], is_whole: bool) -> dict[str, int]:
        with h5py.File(path, "x") as file:
            return dict(self.add_tensors(file, outputs, is_whole))
