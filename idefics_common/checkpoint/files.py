"""Files of a checkpoint before they are trusted: plain files, of a bounded size, inside their directory."""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from idefics_common.checkpoint.errors import CheckpointError, quote

_PIECES = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

DISTRIBUTED = (
    "is a distributed checkpoint: {} files with pieces of its tensors. Only PyTorch puts them together: load it by "
    "`idefics_pt.IdeficsForVisionText2Text.from_pretrained`, and save that model for a checkpoint of whole tensors."
)
"""What is wrong with a distributed checkpoint where whole tensors are read; takes the number of files."""


def distributed_files(directory: Path) -> list[Path]:
    """The files in a directory that several processes wrote with pieces of the tensors, by number; usually none."""
    return sorted(path for path in directory.iterdir() if _PIECES.fullmatch(path.name))


def open_regular_file(path: Path) -> BinaryIO:
    """The file opened for reading, unbuffered. Raises CheckpointError for one that cannot be, or is no plain file."""
    try:
        # Asked before opening: opening a named pipe would wait for its writer for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(path, "is not a regular file")
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error


def find_file(directory: Path, names: Iterable[str]) -> Path:
    """The first of these files that is in a directory. Raises CheckpointError if there is none, or if it is a link
    that leads outside."""
    names = list(names)
    for name in names:
        # A broken link is found too: it is better named than passed over for another format.
        if os.path.lexists(directory / name):
            return refuse_outside(directory, name)
    if pieces := distributed_files(directory):
        raise CheckpointError(directory, DISTRIBUTED.format(len(pieces)))
    raise CheckpointError(directory, f"holds no checkpoint: looked for {', '.join(names)}")


def refuse_outside(directory: Path, name: str) -> Path:
    """`directory / name`, or CheckpointError if it is a symbolic link that leads out of the directory.

    The one exception is a snapshot in the hub cache, whose files are links to the blobs beside it.
    """
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
