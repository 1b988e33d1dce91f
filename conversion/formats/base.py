"""What a checkpoint format is to the converter: names, layouts, a reader, and files with holes to write into.

Unusual: a format writes no tensor. It lays out its files, at full length and with everything in place but the values,
and says at which byte each tensor starts. One engine (`conversion.streaming`) then fills the holes of all formats, in
any order and from where an interrupted run stopped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from idefics_common.checkpoint import TensorSource
from idefics_common.layouts import Layout
from idefics_common.parameters import Parameter


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


class Format(Protocol):
    """One on-disk format.

    Attributes:
        name: as ``--to`` spells it.
        directory_files: names under which a checkpoint of this format is found in a directory, best first.
        stores_tied: whether a tensor that is tied to another is written all the same.
    """

    name: str
    directory_files: tuple[str, ...]
    stores_tied: bool

    def stored_name(self, parameter: Parameter) -> str:
        """The name of a parameter in this format."""

    def layout(self, parameter: Parameter) -> Layout:
        """How this format orders the axes of a parameter."""

    def recognises(self, file_name: str) -> bool:
        """Whether a file of this name is one of this format, or the index of its shards."""

    def open(self, path: Path) -> TensorSource:
        """Open and check the file, or the shards of the index, at `path`. Raises CheckpointError."""

    def file_names(self, count: int) -> list[str]:
        """Names of the files that hold tensors, for so many of them."""

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        """What is good to know about an output of this format, a sentence each."""

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        """Write the files of an output, complete but for the values.

        Args:
            directory: an empty one.
            shards: the tensors of each file; one file has no index.

        Returns:
            the place of each tensor by its name in the format.
        """

    def finish(
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        """Write what depends on the values, once all are written: `checksums` is their CRC-32 by name."""


def shard_names(stem: str, ending: str, count: int) -> list[str]:
    """Names of the files of a checkpoint, as transformers numbers them: from 1, with the total."""
    if count == 1:
        return [f"{stem}{ending}"]
    return [f"{stem}-{number:05d}-of-{count:05d}{ending}" for number in range(1, count + 1)]
