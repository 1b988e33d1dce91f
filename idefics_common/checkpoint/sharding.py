"""How the tensors of a checkpoint are cut into files: the size of a file, which tensors go together, the names."""

import re
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TypeVar

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Item = TypeVar("Item")


def parse_size(max_shard_size: int | str) -> int:
    """Bytes of a size such as 5000000, "5GB" or "200MiB". Raises ValueError for anything else."""
    size = max_shard_size
    if isinstance(size, str):
        match = re.fullmatch(r"([0-9]+)\s*([KMG]I?B)", size.strip().upper())
        size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < 1:
        raise ValueError(
            "max_shard_size must be a positive number of bytes or a string such as '5GB' or '200MiB', "
            f"got {max_shard_size!r}"
        )
    return size


def split_into_shards(
    tensors: Iterable[Item], max_bytes: int, nbytes: Callable[[Item], int] = attrgetter("nbytes")
) -> list[list[Item]]:
    """Consecutive tensors together, up to `max_bytes`; a larger one has a file of its own.

    Args:
        nbytes: how many bytes a tensor has.
    """
    shards: list[list[Item]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + nbytes(tensor) > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += nbytes(tensor)
    return shards


def shard_names(stem: str, ending: str, count: int) -> list[str]:
    """Names of the files of a checkpoint, as transformers numbers them: from 1, with the total; one has no number."""
    if count == 1:
        return [f"{stem}{ending}"]
    return [f"{stem}-{number:05d}-of-{count:05d}{ending}" for number in range(1, count + 1)]
