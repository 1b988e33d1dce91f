"""What a checkpoint format is to the converter: names, layouts, a reader, and files with holes to write into.

Unusual: a format writes no tensor. It lays out its files, at full length and with everything in place but the values,
and says at which byte each tensor starts. One engine (`conversion.streaming`) then fills the holes of all formats, in
any order and from where an interrupted run stopped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from idefics_common.checkpoint import Checkpoint, open_checkpoint
from idefics_common.checkpoint.index import write_index
from idefics_common.checkpoint.model_tensors import canonical_name
from idefics_common.checkpoint.sharding import shard_names
from idefics_common.parameters import Parameter
from idefics_common.parameters.layouts import IDENTITY, Layout


@dataclass(frozen=True)
class Output:
    """A tensor that is to be written, in the layout of its format.

    Attributes:
        parameter: its row of the parameter table.
        name: its name in the format.
        layout: from the canonical order of axes to the stored one.
        dtype: dtype to store.
    """

    parameter: Parameter
    name: str
    layout: Layout
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return self.layout.shape(self.parameter.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor's values go: the name of a file in the output directory, and the first byte."""

    file: str
    offset: int


class Format(ABC):
    """One on-disk format.

    Attributes:
        name: as ``--to`` spells it.
        stem, ending, index_ending: of the names of its files, and of the index of its shards.
        hub_patterns: of the names of its files in a repository of the hub.
        stores_tied: whether a tensor that is tied to another is written all the same.
    """

    name: ClassVar[str]
    stem: ClassVar[str]
    ending: ClassVar[str]
    index_ending: ClassVar[str]
    hub_patterns: ClassVar[tuple[str, ...]]
    stores_tied: ClassVar[bool] = False

    @property
    def directory_files(self) -> tuple[str, str]:
        """Names under which a checkpoint of this format is found in a directory, best first."""
        return f"{self.stem}{self.ending}", f"{self.stem}{self.index_ending}"

    def recognises(self, file_name: str) -> bool:
        """Whether a file of this name is one of this format, or the index of its shards."""
        return file_name.endswith((self.ending, self.index_ending))

    def file_names(self, count: int) -> list[str]:
        """Names of the files that hold tensors, for so many of them."""
        return shard_names(self.stem, self.ending, count)

    @abstractmethod
    def stored_name(self, parameter: Parameter, with_head: bool = True) -> str:
        """The name of a parameter in this format, in a file of the model with its language head or of that without."""

    @abstractmethod
    def layout(self, parameter: Parameter) -> Layout:
        """How this format orders the axes of a parameter."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Open and check the file, or the shards of the index, at `path`. Raises CheckpointError."""

    def check_writable(self, directory: Path) -> None:  # noqa: B027 - most formats need nothing
        """Raise CheckpointError where what writing this format to a directory needs is not installed."""

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        """What is good to know about an output of this format, a sentence each; most have nothing to say."""
        return []

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        """Write the files of an output, complete but for the values.

        Args:
            directory: an empty one.
            shards: the tensors of each file; one file has no index.

        Returns:
            the place of each tensor by its name in the format.
        """
        places: dict[str, Place] = {}
        for file_name, shard in zip(self.file_names(len(shards)), shards, strict=True):
            offsets = self.lay_out_file(directory / file_name, shard, len(shards) == 1)
            places |= {name: Place(file_name, offset) for name, offset in offsets.items()}
        if len(shards) > 1:
            total_size = sum(output.nbytes for shard in shards for output in shard)
            write_index(directory / self.directory_files[1], self.weight_map(shards, places), total_size)
        return places

    @abstractmethod
    def lay_out_file(self, path: Path, outputs: Sequence[Output], is_whole: bool) -> dict[str, int]:
        """Write a whole checkpoint's file or a shard, complete but for the values.

        Returns:
            the offset of each tensor in it by its name.
        """

    def weight_map(self, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> dict[str, object]:
        """The entries of the index of an output: for each the name of its file, or a list of several."""
        return {name: place.file for name, place in places.items()}

    def finish(  # noqa: B027 - for most formats nothing is left to do
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        """Write what depends on the values, once all are written: `checksums` is their CRC-32 by name."""


class CanonicalFormat(Format):
    """A format with canonical names and PyTorch's layout, whose index of shards is that of transformers."""

    stored_name = staticmethod(canonical_name)

    def layout(self, parameter: Parameter) -> Layout:
        return IDENTITY

    def open(self, path: Path) -> Checkpoint:
        return open_checkpoint(path)
