"""Opens a checkpoint, a directory or one file, whole or in shards, as one source of tensors.

In a directory the first of these wins, in the order of transformers:

    model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json

A file of any name with one of these endings can be given itself: `.safetensors`, `.bin`, `.safetensors.index.json`,
`.bin.index.json`.

Everything is checked on opening: each file by its reader, the index against the shards both ways (every tensor in
the shard that the index names, no shard with a tensor that the index does not know), and that no file of a
directory lies outside it. An index whose `total_size` is wrong is not refused but gives a warning: converters are known
to copy it from another format, and every tensor is accounted for without it.
"""

import os
import warnings
from pathlib import Path

import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.files import find_file
from idefics_common.checkpoint.index import open_shards, read_index
from idefics_common.checkpoint.safetensors_file import SafetensorsFile
from idefics_common.checkpoint.tensor_file import TensorFile
from idefics_common.checkpoint.tensor_source import TensorInfo, TensorSource
from idefics_common.checkpoint.torch_bin_file import TorchBinFile

DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names looked for in a directory, best first."""

_READERS: dict[str, type[TensorFile]] = {".safetensors": SafetensorsFile, ".bin": TorchBinFile}
_INDEX_ENDING = ".index.json"


class Checkpoint(TensorSource):
    """An open checkpoint: one or more files as one source of tensors.

    Attributes:
        files: the files that hold tensors, in reading order.
        notes: what is odd about the checkpoint and yet no obstacle, a sentence each.
    """

    def __init__(self, path: Path, shards: list[TensorSource], notes: tuple[str, ...] = ()):
        self.path = path
        self.format = shards[0].format
        self.files = tuple(shard.path for shard in shards)
        self.notes = notes
        self.infos = {name: info for shard in shards for name, info in shard.infos.items()}
        self._shard_at = {shard.path: shard for shard in shards}

    def close(self) -> None:
        for shard in self._shard_at.values():
            shard.close()

    def _fill(self, out: np.ndarray, info: TensorInfo, axis: int, start: int, stop: int) -> None:
        self._shard_at[info.file]._fill(out, info, axis, start, stop)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open and check a checkpoint; its tensors are read later, one at a time.

    Args:
        path: a directory or a file, see the module's docstring.

    Raises CheckpointError, naming the file and where there is one the tensor, for a checkpoint that is not there,
    damaged, contradicts itself or leads outside its directory.
    """
    path = Path(path)
    if path.is_dir():
        path = find_file(path, DIRECTORY_FILES)
    elif not path.exists():
        raise CheckpointError(path, "no such file or directory")
    ending = Path(path.name.removesuffix(_INDEX_ENDING)).suffix
    reader = _READERS.get(ending)
    if reader is None:
        endings = [*_READERS, *(ending + _INDEX_ENDING for ending in _READERS)]
        raise CheckpointError(path, f"the file name ends in none of {', '.join(endings)}")
    if not path.name.endswith(_INDEX_ENDING):
        return Checkpoint(path, [reader(path)])
    weight_map, total_size = read_index(path)
    shards = open_shards(path, weight_map, ending, reader)
    return Checkpoint(path, shards, _check_total_size(path, total_size, shards))


def _check_total_size(index_path: Path, total_size: object, shards: list[TensorSource]) -> tuple[str, ...]:
    """Sentences about an index's total size; writers count tied tensors of a `.bin` once, or each."""
    every = sum(shard.nbytes for shard in shards)
    places = {(info.file, info.offset, info.nbytes) for shard in shards for info in shard.infos.values()}
    once = sum(nbytes for _, _, nbytes in places)
    if total_size is None or total_size in (every, once):
        return ()
    note = f"{index_path}: total_size is {quote(total_size)}, but its tensors take {every} bytes"
    warnings.warn(note, stacklevel=3)
    return (note,)
