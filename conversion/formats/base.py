"""What a checkpoint format is to the converter: names, layouts, a reader, and files with holes to write into.

Unusual: a format writes no tensor. It lays out its files, at full length and with everything in place but the values,
and says at which byte each tensor starts. One engine (`conversion.streaming`) then fills the holes of all formats, in
any order and from where an interrupted run stopped.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from idefics_common.checkpoint import Checkpoint, open_checkpoint
from idefics_common.parameters import MODEL, Parameter
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
        directory_files: names under which a checkpoint of this format is found in a directory, best first.
        stores_tied: whether a tensor that is tied to another is written all the same.
    """

    name: ClassVar[str]
    directory_files: ClassVar[tuple[str, ...]]
    stores_tied: ClassVar[bool] = False

    @abstractmethod
    def stored_name(self, parameter: Parameter, with_head: bool = True) -> str:
        """The name of a parameter in this format, in a file of the model with its language head or of that without."""

    @abstractmethod
    def layout(self, parameter: Parameter) -> Layout:
        """How this format orders the axes of a parameter."""

    @abstractmethod
    def recognises(self, file_name: str) -> bool:
        """Whether a file of this name is one of this format, or the index of its shards."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Open and check the file, or the shards of the index, at `path`. Raises CheckpointError."""

    @abstractmethod
    def file_names(self, count: int) -> list[str]:
        """Names of the files that hold tensors, for so many of them."""

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        """What is good to know about an output of this format, a sentence each; most have nothing to say."""
        return []

    @abstractmethod
    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        """Write the files of an output, complete but for the values.

        Args:
            directory: an empty one.
            shards: the tensors of each file; one file has no index.

        Returns:
            the place of each tensor by its name in the format.
        """

    def finish(  # noqa: B027 - for most formats nothing is left to do
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        """Write what depends on the values, once all are written: `checksums` is their CRC-32 by name."""


class CanonicalFormat(Format):
    """A format with canonical names and PyTorch's layout, whose index of shards is that of transformers.

    Attributes:
        stem, ending: of the names of its files.
    """

    stem: ClassVar[str]
    ending: ClassVar[str]

    def stored_name(self, parameter: Parameter, with_head: bool = True) -> str:
        return parameter.name if with_head else parameter.name.removeprefix(f"{MODEL.name}.")

    def layout(self, parameter: Parameter) -> Layout:
        return IDENTITY

    def recognises(self, file_name: str) -> bool:
        return file_name.endswith((self.ending, f"{self.ending}.index.json"))

    def open(self, path: Path) -> Checkpoint:
        return open_checkpoint(path)

    def file_names(self, count: int) -> list[str]:
        return shard_names(self.stem, self.ending, count)

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        places = {}
        for file_name, shard in zip(self.file_names(len(shards)), shards, strict=True):
            offsets = self.lay_out_file(directory / file_name, shard)
            places |= {name: Place(file_name, offset) for name, offset in offsets.items()}
        if len(shards) > 1:
            write_index(directory / self.directory_files[1], shards, places)
        return places

    @abstractmethod
    def lay_out_file(self, path: Path, outputs: Sequence[Output]) -> dict[str, int]:
        """Write one file, complete but for the values; returns the offset of each tensor in it by its name."""


def write_index(path: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> None:
    """Write the index that says in which file each tensor lies, as transformers writes it."""
    total = sum(output.nbytes for shard in shards for output in shard)
    weight_map = {name: place.file for name, place in places.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def shard_names(stem: str, ending: str, count: int) -> list[str]:
    """Names of the files of a checkpoint, as transformers numbers them: from 1, with the total."""
    if count == 1:
        return [f"{stem}{ending}"]
    return [f"{stem}-{number:05d}-of-{count:05d}{ending}" for number in range(1, count + 1)]
