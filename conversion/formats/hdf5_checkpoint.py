"""Checkpoints in HDF5, whole or in shards: what both formats of this kind have in common.

A format says how one file names its tensors and what its index looks like; opening, and holding the shards against the
index, is the same for both.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from conversion.formats.base import Format, Output, Place
from conversion.formats.hdf5_reader import H5File
from conversion.formats.hdf5_writer import H5Layout, lay_out_h5
from idefics_common.checkpoint import Checkpoint, CheckpointError
from idefics_common.checkpoint.index import shard_paths


class H5Checkpoint(Checkpoint):
    """An open checkpoint in HDF5: a `TensorSource` that can also be read by columns."""

    def __init__(self, path: Path, files: Sequence[H5File]):
        super().__init__(path, list(files))

    def read_block(self, name: str, axis: int, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """See `H5File.read_block`."""
        return self._find(name).read_block(name, axis, start, stop, out)


class H5Format(Format):
    """A format of HDF5 files.

    Attributes:
        shard_ending: of the names of shards.
        index_entries: what the entries of an index are, for messages.
    """

    shard_ending: str
    index_entries: str

    @abstractmethod
    def tensor_name(self, path: str, is_whole: bool) -> str | None:
        """The name of the tensor in the dataset at a path in a whole file or a shard; None if it is no tensor."""

    @abstractmethod
    def read_index(self, path: Path) -> dict[str, list[str]]:
        """The shards of each entry of an index. Raises CheckpointError for a file that is no index."""

    @abstractmethod
    def entry_of(self, name: str) -> str:
        """The entry of the index under which a tensor is found."""

    @abstractmethod
    def lay_out_file(self, file: H5Layout, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        """Lay out a whole file or a shard; gives the name of each tensor with its offset."""

    @abstractmethod
    def write_index(self, path: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> None:
        """Write the index of shards."""

    def open(self, path: Path) -> H5Checkpoint:
        if path.suffix != ".json":
            return H5Checkpoint(path, [self._open_file(path, is_whole=True)])
        index = self.read_index(path)
        shard_names = [name for names in index.values() for name in names]
        with ExitStack() as stack:
            shards = [
                stack.enter_context(closing(self._open_file(shard_path, is_whole=False)))
                for shard_path in shard_paths(path, shard_names, self.shard_ending, self.index_entries)
            ]
            self._compare_with_index(path, index, shards)
            stack.pop_all()
        return H5Checkpoint(path, shards)

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for file_name, shard in zip(self.file_names(len(shards)), shards, strict=True):
            with lay_out_h5(directory / file_name) as file:
                for name, offset in self.lay_out_file(file, shard, len(shards) == 1):
                    places[name] = Place(file_name, offset)
        if len(shards) > 1:
            self.write_index(directory / self.directory_files[1], shards, places)
        return places

    def _open_file(self, path: Path, is_whole: bool) -> H5File:
        return H5File(path, self.name, lambda dataset: self.tensor_name(dataset, is_whole))

    def _compare_with_index(self, index_path: Path, index: Mapping[str, list[str]], shards: Sequence[H5File]) -> None:
        """Every tensor lies in a shard that the index names for its entry, and in one only; or CheckpointError."""
        shard_of: dict[str, Path] = {}
        found = set()
        for shard in shards:
            for name in shard:
                entry = self.entry_of(name)
                found.add((entry, shard.path.name))
                if shard.path.name not in index.get(entry, ()):
                    raise CheckpointError(
                        shard.path, f"is in this shard, where {index_path.name} does not look for it", name
                    )
                if name in shard_of:
                    raise CheckpointError(shard.path, f"is also in {shard_of[name].name}", name)
                shard_of[name] = shard.path
        for entry, names in index.items():
            for name in names:
                if (entry, name) not in found:
                    raise CheckpointError(index_path, f"nothing of it is in {name}, where the index puts it", entry)
