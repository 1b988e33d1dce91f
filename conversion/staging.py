"""The hidden directory beside the destination in which an output is written, with a lock and a journal.

The destination changes in one step, when everything is written and verified, or not at all. A killed run leaves only
the hidden directory, with a journal of the tensors that are complete, from which a later run goes on.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.errors import ConversionError

JOURNAL = "conversion-journal.jsonl"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """The directory of an output in the making; see `open_staging`.

    Attributes:
        directory: where its files are written, under their final names.
    """

    def __init__(self, destination: Path):
        self.destination = destination
        self.directory = staging_directory(destination)

    def entries(self) -> list[dict]:
        """The journal of an earlier run, oldest first; nothing if it is damaged.

        A last line that was cut short is left out, also of the file, so that the next one starts on a line of its own.
        """
        path = self.directory / JOURNAL
        if not path.is_file():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(path, sum(map(len, lines[:-1])))
            lines.pop()
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return []

    def clear(self) -> None:
        """Remove what an earlier run has left."""
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def record(self, entry: dict) -> None:
        """Append to the journal; what it says must be done already."""
        journal = os.open(self.directory / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(journal, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(journal)

    def commit(self) -> None:
        """Put the output under its final name, in one step; what was there before is removed after it."""
        for path in self.directory.iterdir():
            _synchronise(path)
        (self.directory / JOURNAL).unlink(missing_ok=True)
        _synchronise(self.directory)
        if self.destination.exists() and any(self.destination.iterdir()):
            _exchange(self.directory, self.destination)
            shutil.rmtree(self.directory)
        else:
            os.rename(self.directory, self.destination)
        _synchronise(self.destination.parent)

    def discard(self) -> None:
        """Remove the output; the destination stays as it was."""
        shutil.rmtree(self.directory)


@contextmanager
def open_staging(destination: Path) -> Iterator[Staging]:
    """The staging directory of a destination, made if need be, for this process alone.

    Raises ConversionError if another process is converting to the same destination.
    """
    directory = staging_directory(destination)
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # the system drops it with the process
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the run that held the lock may have moved the directory into place meanwhile
            is_current = directory.exists() and os.path.samestat(os.fstat(lock), os.stat(directory))
        except BlockingIOError:
            is_current = False
        if not is_current:
            raise ConversionError(f"{destination}: another process is converting to it")
        yield Staging(destination)
    finally:
        os.close(lock)


def staging_directory(destination: Path) -> Path:
    """Where an output of this destination grows."""
    return destination.parent / f".{destination.name}.converting"


def held_bytes(destination: Path) -> int:
    """Bytes on disk of what an earlier run has left: a new one goes on with them, or gives them back."""
    directory = staging_directory(destination)
    return sum(path.lstat().st_blocks * 512 for path in directory.iterdir()) if directory.is_dir() else 0


def check_destination(destination: Path, source_directory: Path, overwrite: bool) -> None:
    """Raise ConversionError if an output must not appear under this name."""
    if not destination.name:
        raise ConversionError(f"{destination}: is not a name for a directory")
    if os.path.realpath(source_directory) == os.path.realpath(destination):
        raise ConversionError(f"{destination}: is the source itself")
    if Path(os.path.realpath(source_directory)).is_relative_to(os.path.realpath(destination)):
        raise ConversionError(f"{destination}: holds the source, which replacing it would remove")
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise ConversionError(f"{destination}: is in the way; the output is a directory")
    if any(destination.iterdir()):
        if not overwrite:
            raise ConversionError(f"{destination}: exists; --overwrite replaces it")
        if not (destination / "config.json").is_file():
            raise ConversionError(f"{destination}: holds no checkpoint (no config.json) and is not replaced; remove it")


def _synchronise(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Let two directories swap their names, in one step where the file system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(b))
    aside = a.with_name(f"{a.name}.replaced")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)
