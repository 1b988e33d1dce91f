"""The error of all readers of checkpoints: it names the file, and the tensor where there is one."""

import os

_LONGEST_QUOTE = 200


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used as it is.

    Attributes:
        file: the file (or directory) at fault, as a string.
        problem: what was expected and what came.
        tensor: name of the tensor at fault, or None where the whole file is.
    """

    def __init__(self, file: str | os.PathLike, problem: str, tensor: str | None = None):
        # All three go to args, so that the error survives the pickling between worker processes.
        super().__init__(os.fspath(file), problem, tensor)
        self.file, self.problem, self.tensor = self.args

    def __str__(self) -> str:
        place = self.file if self.tensor is None else f"{self.file}: tensor {quote(self.tensor)}"
        return f"{place}: {self.problem}"


def quote(name: object) -> str:
    """`name` for an error message: escaped, because it comes from an untrusted file, and cut if very long."""
    try:
        text = repr(name)
    except RecursionError:
        text = f"a deeply nested {type(name).__name__}"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}... ({len(text)} characters)"
