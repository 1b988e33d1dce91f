"""The index of a sharded checkpoint: reading it, holding it against the shards, writing it.

An index says for each tensor (or, in Keras's, for each layer) in which file it lies. It is untrusted like any other
file: it must not lead outside its directory, by the name of a shard or by a link.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath, PureWindowsPath

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.files import open_regular_file, refuse_outside
from idefics_common.checkpoint.strict_json import parse_json_object
from idefics_common.checkpoint.tensor_source import TensorSource

MAX_INDEX_BYTES = 16 * 2**20

WeightMap = dict[str, tuple[str, ...]]
"""The files of each entry of an index. A tensor has one file; a layer may have several."""


def read_index(path: Path, of_layers: bool = False) -> tuple[WeightMap, object]:
    """The map of an index, and its total size as it says it, or None.

    Args:
        of_layers: the entries are layers, which may name several files each.

    Raises CheckpointError for a file that is no index.
    """
    with open_regular_file(path) as file:
        data = file.read(MAX_INDEX_BYTES + 1)
    if len(data) > MAX_INDEX_BYTES:
        raise CheckpointError(path, f"is {path.stat().st_size} bytes long; at most {MAX_INDEX_BYTES} are read")
    try:
        index = parse_json_object(data)
    except ValueError as error:
        raise CheckpointError(path, f"is not usable JSON: {error}") from error
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        entries = "layers" if of_layers else "tensor names"
        raise CheckpointError(path, f"weight_map must map {entries} to shard names, got {quote(weight_map)}")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return {entry: _shard_names(path, entry, names, of_layers) for entry, names in weight_map.items()}, total_size


def _shard_names(path: Path, entry: str, names: object, of_layers: bool) -> tuple[str, ...]:
    several = names if of_layers and isinstance(names, list) else [names]
    if not several or not all(isinstance(name, str) for name in several):
        raise CheckpointError(path, f"the name of its shard must be a string, got {quote(names)}", entry)
    return tuple(several)


def open_shards(
    index_path: Path,
    weight_map: WeightMap,
    ending: str,
    open_file: Callable[[Path], TensorSource],
    entry_of: Callable[[str], str] = str,
) -> list[TensorSource]:
    """Open the shards of an index in the order of their names, and hold them against it both ways.

    Args:
        ending: of the names of shards.
        open_file: opens one of them.
        entry_of: the entry of the index under which a tensor stands; its own name by default.

    Raises CheckpointError, naming the shard and where there is one the tensor.
    """
    with ExitStack() as stack:
        shards = [stack.enter_context(open_file(path)) for path in _shard_paths(index_path, weight_map, ending)]
        _compare_with_shards(index_path, weight_map, shards, entry_of)
        stack.pop_all()
    return shards


def write_index(path: Path, weight_map: Mapping[str, object], total_size: int) -> None:
    """Write the index of a checkpoint, as transformers writes it.

    Args:
        weight_map: the file, or list of files, of each entry.
        total_size: bytes of all tensors.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shard_paths(index_path: Path, weight_map: WeightMap, ending: str) -> list[Path]:
    counts = Counter(name for names in weight_map.values() for name in names)
    for name in sorted(counts):
        _check_shard_name(index_path, name, ending)
        if not os.path.lexists(index_path.parent / name):
            raise CheckpointError(
                index_path, f"shard {name} is missing, in which {counts[name]} of its {len(weight_map)} entries lie"
            )
    return [refuse_outside(index_path.parent, name) for name in sorted(counts)]


def _check_shard_name(index_path: Path, name: str, ending: str) -> None:
    """A shard is a file beside the index: a bare name on every system, of the same format."""
    is_bare = name == PurePosixPath(name).name == PureWindowsPath(name).name
    if not is_bare or not name.isprintable() or not name.endswith(ending):
        raise CheckpointError(
            index_path, f"shard {quote(name)} refused: expected the name of a {ending} file in the same directory"
        )


def _compare_with_shards(
    index_path: Path, weight_map: WeightMap, shards: list[TensorSource], entry_of: Callable[[str], str]
) -> None:
    """Every tensor lies in a shard that the index names for it and in no other, and no entry names a shard in vain."""
    shard_of: dict[str, str] = {}
    missing = {(entry, name) for entry, names in weight_map.items() for name in names}
    for shard in shards:
        for name in shard:
            entry = entry_of(name)
            if shard.path.name not in weight_map.get(entry, ()):
                named = ", ".join(weight_map.get(entry, ()))
                where = f"puts it in {named}" if named else "does not name it"
                raise CheckpointError(shard.path, f"is in this shard, but {index_path.name} {where}", name)
            if name in shard_of:
                raise CheckpointError(shard.path, f"is also in {shard_of[name]}", name)
            shard_of[name] = shard.path.name
            missing.discard((entry, shard.path.name))
    for entry, shard_name in sorted(missing):
        raise CheckpointError(
            index_path.parent / shard_name, f"is not in this shard, where {index_path.name} puts it", entry
        )
