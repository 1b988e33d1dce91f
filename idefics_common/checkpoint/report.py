"""Found tensors against expected ones: what is missing, unexpected, of another shape, or no floating point.

The expected names and shapes come from the parameter table; this module knows only mappings.
"""

import difflib
import itertools
import os
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.tensor_source import FLOAT_DTYPES, TensorInfo

_LONGEST_LIST = 20
# Similarity takes some 50 us a pair, and a hostile file may hold a hundred thousand names.
_MOST_CANDIDATES = 1000

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is there under its name but is not the one expected.

    Attributes:
        found_dtype: the stored dtype, where it is no floating-point one; None where only the shape differs.
    """

    name: str
    expected_shape: Shape
    found_shape: Shape
    found_dtype: np.dtype | None = None

    def __str__(self) -> str:
        dtype = "" if self.found_dtype is None else f" of {self.found_dtype}, expected a floating-point dtype"
        return f"{self.name} expected {self.expected_shape}, found {self.found_shape}{dtype}"


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint's names and shapes compare with the expected ones.

    Attributes:
        missing: expected and not found, with the expected shape.
        unexpected: found, neither expected nor ignorable, with the found shape.
        mismatched: found with another shape, or with a dtype that no parameter has.
        ignored: found, not expected, and known to be of no use: stale buffers.
    """

    missing: Mapping[str, Shape]
    unexpected: Mapping[str, Shape]
    mismatched: tuple[Mismatch, ...]
    ignored: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every expected tensor can be loaded and nothing else is there."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        """What is wrong, a line per tensor (`-` missing, `+` unexpected, `!` mismatched), at most 20 of a kind."""
        if self.ok:
            return "all names and shapes are as expected"
        counts = (("missing", self.missing), ("unexpected", self.unexpected), ("mismatched", self.mismatched))
        summary = ", ".join(f"{len(items)} {kind}" for kind, items in counts if items)
        return "\n".join(
            [
                f"tensors are not as expected: {summary}",
                *_list("-", self.missing, lambda name: f"{name} {self.missing[name]}{self._guess(name)}"),
                *_list("+", self.unexpected, lambda name: f"{quote(name)} {self.unexpected[name]}"),
                *_list("!", self.mismatched, str),
            ]
        )

    def raise_if_bad(self, source: str | os.PathLike) -> None:
        """Raise CheckpointError with this report if `source`, the file or directory, is not as expected."""
        if not self.ok:
            raise CheckpointError(source, str(self))

    def _guess(self, name: str) -> str:
        candidates = itertools.islice(self.unexpected, _MOST_CANDIDATES)
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
        return f"  (is it {quote(near[0])}?)" if near else ""


def compare_names_and_shapes(
    found: Mapping[str, TensorInfo | Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    *,
    ignorable: Container[str] = (),
    optional: Container[str] = (),
) -> LoadReport:
    """Compare a checkpoint's tensors with the expected ones.

    Args:
        found: name to `TensorInfo` (`Checkpoint.infos`), whose dtype is then checked too, or to a shape.
        expected: name to shape of every parameter.
        ignorable: names that may be found and are of no use; one that is also expected is expected.
        optional: expected names that may be absent, because they are tied to another.
    """
    compared = (_compare(name, found[name], tuple(shape)) for name, shape in expected.items() if name in found)
    others = [name for name in found if name not in expected]
    return LoadReport(
        missing={n: tuple(shape) for n, shape in expected.items() if n not in found and n not in optional},
        unexpected={name: _shape(found[name]) for name in others if name not in ignorable},
        mismatched=tuple(mismatch for mismatch in compared if mismatch),
        ignored=tuple(name for name in others if name in ignorable),
    )


def _compare(name: str, found: TensorInfo | Sequence[int], expected_shape: Shape) -> Mismatch | None:
    wrong_dtype = isinstance(found, TensorInfo) and found.dtype not in FLOAT_DTYPES
    if _shape(found) == expected_shape and not wrong_dtype:
        return None
    return Mismatch(name, expected_shape, _shape(found), found.dtype if wrong_dtype else None)


def _shape(found: TensorInfo | Sequence[int]) -> Shape:
    return found.shape if isinstance(found, TensorInfo) else tuple(found)


def _list(sign: str, items: Collection, describe: Callable[[Any], str]) -> Iterator[str]:
    for item in itertools.islice(items, _LONGEST_LIST):
        yield f"  {sign} {describe(item)}"
    if len(items) > _LONGEST_LIST:
        yield f"  {sign} ... and {len(items) - _LONGEST_LIST} more"
