"""What a conversion will write: tensors, dtypes, shards, bytes. Made from headers alone, before a byte is written."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from conversion.errors import ConversionError
from conversion.formats import Format, format_of
from conversion.formats.base import Output
from conversion.opening import OpenModel
from idefics_common.parameters import Parameter

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that ``--dtype`` can ask for, besides "keep"."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# bytes per tensor that names, headers and an index take at most in any format, with room to spare
_OVERHEAD_PER_TENSOR = 2048


@dataclass(frozen=True)
class Plan:
    """An output, laid out.

    Attributes:
        shards: the tensors of each file.
        values_of: for the name of each tensor in the output, the parameter of the source that its values come from; for
            a tied one, the parameter that it is tied to.
    """

    format: Format
    shards: tuple[tuple[Output, ...], ...]
    values_of: dict[str, Parameter]

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(output for shard in self.shards for output in shard)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the output takes on disk, rounded up."""
        return self.nbytes + _OVERHEAD_PER_TENSOR * len(self.outputs)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors of each dtype are written."""
        return dict(Counter(output.dtype.name for output in self.outputs))


def make_plan(model: OpenModel, to: str, dtype: str, max_shard_size: int) -> Plan:
    """Plan a conversion.

    Args:
        to: name of the format to write. dtype: a key of `DTYPES`, or "keep".
        max_shard_size: bytes of tensors per file; a larger tensor has a file of its own.
    """
    format = format_of(to)
    own = {parameter.name: parameter for parameter in model.own}
    outputs, values_of = [], {}
    for parameter in model.parameters:
        if parameter.tied_to is not None and not format.stores_tied:
            continue
        values = own[parameter.tied_to or parameter.name]
        stored = model.info(values).dtype if dtype == "keep" else DTYPES[dtype]
        output = Output(parameter, format.stored_name(parameter, model.has_head), format.layout(parameter), stored)
        outputs.append(output)
        values_of[output.name] = values
    return Plan(format, split(outputs, max_shard_size), values_of)


def split(outputs: Sequence[Output], max_shard_size: int) -> tuple[tuple[Output, ...], ...]:
    """Consecutive tensors together, up to `max_shard_size` bytes."""
    shards: list[list[Output]] = [[]]
    used = 0
    for output in outputs:
        if shards[-1] and used + output.nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(output)
        used += output.nbytes
    return tuple(map(tuple, shards))


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000, "5GB" or "200MiB". Raises ConversionError for anything else."""
    if isinstance(size, int):
        number, factor = size, 1
    else:
        text = size.strip().upper()
        unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
        digits = text.removesuffix(unit).strip()
        number, factor = int(digits) if digits.isdecimal() else 0, _UNITS.get(unit, 1)
    if number < 1:
        raise ConversionError(f"a size must be a positive number of bytes or a string such as '5GB', got {size!r}")
    return number * factor


def check_space(directory: os.PathLike, needed: int) -> None:
    """Raise ConversionError if the file system of a directory has fewer bytes left than are needed."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ConversionError(f"{directory}: the output takes {needed:,} bytes, and {free:,} are free")
