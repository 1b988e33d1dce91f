"""A checkpoint as a person has it: a directory or one file, whole or in shards, behind one source of tensors.

In a directory the first of these wins, in the order of transformers:

    model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json

A file of any name with one of these endings can be given itself: `.safetensors`, `.bin`, `.safetensors.index.json`,
`.bin.index.json`.

Everything is checked on opening: each file by its reader, the index against the shards both ways (every tensor in
the shard that the index names, no shard with a tensor that the index does not know), and that no file of a
directory lies outside it. The one exception is a snapshot in the hub cache, whose files are links to the blobs
beside it. An index whose `total_size` is wrong is not refused, since converters are known to copy it from
another format and every tensor is accounted for without it: that gives a warning.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.index import compare_with_index, read_index, refuse_outside, shard_paths
from idefics_common.checkpoint.safetensors_file import SafetensorsFile
from idefics_common.checkpoint.source import TensorInfo
from idefics_common.checkpoint.tensor_file import TensorFile
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


class Checkpoint:
    """An open checkpoint: a `TensorSource` over one or more files.

    Attributes:
        format: "safetensors" or "bin".
        path: the file, or for shards the index, that was opened.
        files: the files that hold tensors, in reading order.
        notes: what is odd about the checkpoint and yet no obstacle, a sentence each.
    """

    def __init__(self, path: Path, shards: list[TensorFile], notes: tuple[str, ...] = ()):
        self.path = path
        self.format = shards[0].format
        self.files = tuple(shard.path for shard in shards)
        self.notes = notes
        self._shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, file by file and in the order of their place in each."""
        return tuple(self._shard_of)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor's description by its name."""
        return {name: shard.info(name) for name, shard in self._shard_of.items()}

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor; see `TensorSource` for this and the methods below."""
        return self._find(name).info(name)

    def read(self, name: str) -> np.ndarray:
        return self._find(name).read(name)

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        return self._find(name).read_rows(name, start, stop, out)

    def map(self, name: str) -> np.ndarray:
        return self._find(name).map(name)

    def release(self, name: str) -> None:
        self._find(name).release(name)

    def close(self) -> None:
        """Close all files; arrays from `map` stay valid."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def _find(self, name: str) -> TensorFile:
        try:
            return self._shard_of[name]
        except KeyError:
            raise CheckpointError(self.path, f"not in this checkpoint of {len(self)} tensors", name) from None


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open and check a checkpoint; its tensors are read later, one at a time.

    Args:
        path: a directory or a file, see the module's docstring.

    Raises CheckpointError, naming the file and where there is one the tensor, for a checkpoint that is not there,
    damaged, contradicts itself or leads outside its directory.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_directory(path)
    elif not path.exists():
        raise CheckpointError(path, "no such file or directory")
    if path.name.endswith(_INDEX_ENDING):
        return _open_sharded(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(path, f"the file name ends in none of {', '.join(_endings())}")
    return Checkpoint(path, [reader(path)])


def _find_in_directory(directory: Path) -> Path:
    for name in DIRECTORY_FILES:
        # A broken link is found too: it is better named than passed over for another format.
        if os.path.lexists(directory / name):
            return refuse_outside(directory, name)
    raise CheckpointError(directory, f"holds no checkpoint: looked for {', '.join(DIRECTORY_FILES)}")


def _open_sharded(index_path: Path) -> Checkpoint:
    ending = Path(index_path.name.removesuffix(_INDEX_ENDING)).suffix
    reader = _READERS.get(ending)
    if reader is None:
        raise CheckpointError(index_path, f"the file name ends in none of {', '.join(_endings())}")
    weight_map, total_size = read_index(index_path)
    with ExitStack() as stack:
        paths = shard_paths(index_path, list(weight_map.values()), ending)
        shards = [stack.enter_context(reader(path)) for path in paths]
        compare_with_index(index_path, weight_map, shards)
        opened = Checkpoint(index_path, shards, _check_total_size(index_path, total_size, shards))
        stack.pop_all()
    return opened


def _check_total_size(index_path: Path, total_size: object, shards: list[TensorFile]) -> tuple[str, ...]:
    """Sentences about an index's total size; writers count tied tensors of a `.bin` once, or each."""
    every = sum(shard.nbytes for shard in shards)
    places = {(info.file, info.offset, info.nbytes) for shard in shards for info in map(shard.info, shard)}
    once = sum(nbytes for _, _, nbytes in places)
    if total_size is None or total_size in (every, once):
        return ()
    note = f"{index_path}: total_size is {quote(total_size)}, but its tensors take {every} bytes"
    warnings.warn(note, stacklevel=4)
    return (note,)


def _endings() -> list[str]:
    return [*_READERS, *(ending + _INDEX_ENDING for ending in _READERS)]
