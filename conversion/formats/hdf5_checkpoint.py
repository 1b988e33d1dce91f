"""One or more HDF5 files behind one source of tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conversion.formats.hdf5_reader import H5File
from idefics_common.checkpoint import Checkpoint


class H5Checkpoint(Checkpoint):
    """An open checkpoint in HDF5: a `TensorSource` that can also be read by columns."""

    def __init__(self, path: Path, files: Sequence[H5File]):
        super().__init__(path, list(files))

    def read_block(self, name: str, axis: int, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """See `H5File.read_block`."""
        return self._find(name).read_block(name, axis, start, stop, out)


def close_all(files: Sequence[H5File]) -> None:
    """Close files of a checkpoint that turned out not to be one."""
    for file in files:
        file.close()
