"""The index of a sharded checkpoint: reading it, and holding it against the shards.

An index is untrusted like any other file: it must not lead outside its directory, by the name of a shard or by a link.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.strict_json import parse_json_object

MAX_INDEX_BYTES = 16 * 2**20


class Shard(Protocol):
    """A file of tensors, as far as an index knows it."""

    path: Path

    def __iter__(self): ...

    def __contains__(self, name: object) -> bool: ...


def read_index_object(path: Path) -> dict:
    """The JSON object in an index file. Raises CheckpointError for a file that is not one, or too large."""
    try:
        if not path.is_file():
            raise CheckpointError(path, "is not a regular file")
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(path, f"is {path.stat().st_size} bytes long; at most {MAX_INDEX_BYTES} are read")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    try:
        return parse_json_object(data)
    except ValueError as error:
        raise CheckpointError(path, f"is not usable JSON: {error}") from error


def read_index(path: Path) -> tuple[dict[str, str], object]:
    """The index's map of tensor names to shard names, and its total size or None."""
    index = read_index_object(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(path, f"weight_map must map tensor names to shard names, got {quote(weight_map)}")
    for name, shard_name in weight_map.items():
        if not isinstance(shard_name, str):
            raise CheckpointError(path, f"the name of its shard must be a string, got {quote(shard_name)}", name)
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def check_shard_name(index_path: Path, name: str, ending: str) -> None:
    """A shard is a file beside the index: a bare name on every system, of the same format."""
    is_bare = name == PurePosixPath(name).name == PureWindowsPath(name).name
    if not is_bare or not name.isprintable() or not name.endswith(ending):
        raise CheckpointError(
            index_path, f"shard {quote(name)} refused: expected the name of a {ending} file in the same directory"
        )


def shard_paths(index_path: Path, names: Sequence[str], ending: str, noun: str = "tensors") -> list[Path]:
    """The shards of an index, each once and in the order of their names, or CheckpointError.

    Args:
        names: the shard of each entry of the index.
        ending: of the names of shards.
        noun: what the entries are, for the message.
    """
    counts = Counter(names)
    for name in sorted(counts):
        check_shard_name(index_path, name, ending)
        if not os.path.lexists(index_path.parent / name):
            raise CheckpointError(
                index_path, f"shard {name} is missing, in which {counts[name]} of {len(names)} {noun} lie"
            )
    return [refuse_outside(index_path.parent, name) for name in sorted(counts)]


def refuse_outside(directory: Path, name: str) -> Path:
    """`directory / name`, once it is known that no symbolic link leads out of the directory."""
    target = Path(os.path.realpath(directory / name))
    inside = Path(os.path.realpath(directory))
    if not any(target.is_relative_to(root) for root in (inside, *_hub_blobs(inside))):
        raise CheckpointError(directory / name, f"refused: it is a link to {quote(str(target))}, outside its directory")
    return directory / name


def _hub_blobs(directory: Path) -> list[Path]:
    """The folder that a hub cache snapshot (models--ORG--NAME/snapshots/REVISION[/SUBFOLDER]) links into."""
    return [
        snapshots.parent / "blobs"
        for snapshots in directory.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]


def compare_with_index(index_path: Path, weight_map: Mapping[str, str], shards: Sequence[Shard]) -> None:
    """Every tensor lies in the shard that the index names, and the index names every tensor, or CheckpointError."""
    for shard in shards:
        for name in shard:
            named = weight_map.get(name)
            if named != shard.path.name:
                where = "does not name it" if named is None else f"puts it in {named}"
                raise CheckpointError(shard.path, f"is in this shard, but {index_path.name} {where}", name)
    by_name = {shard.path.name: shard for shard in shards}
    for name, shard_name in weight_map.items():
        if name not in by_name[shard_name]:
            raise CheckpointError(
                by_name[shard_name].path, f"is not in this shard, where {index_path.name} puts it", name
            )
