"""What a conversion will write: tensors, dtypes, shards, bytes. Made from headers alone, before a byte is written."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion.errors import ConversionError
from conversion.formats import Format, format_of
from conversion.formats.base import Output
from conversion.opening import OpenModel
from idefics_common.checkpoint.sharding import split_into_shards

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that ``--dtype`` can ask for, besides "keep"."""

# bytes per tensor that names, headers and an index take at most in any format, with room to spare
_OVERHEAD_PER_TENSOR = 2048


@dataclass(frozen=True)
class Plan:
    """An output: its format, and the tensors of each of its files."""

    format: Format
    shards: list[list[Output]]

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


def make_plan(model: OpenModel, to: str, dtype: str, max_shard_size: int) -> Plan:
    """Plan a conversion.

    Args:
        to: name of the format to write. dtype: a key of `DTYPES`, or "keep".
        max_shard_size: bytes of tensors per file; a larger tensor has a file to itself.
    """
    format = format_of(to)
    outputs = [
        Output(
            parameter,
            format.stored_name(parameter, model.has_head),
            format.layout(parameter),
            model.info(model.original(parameter)).dtype if dtype == "keep" else DTYPES[dtype],
        )
        for parameter in model.parameters
        if parameter.tied_to is None or format.stores_tied
    ]
    return Plan(format, split_into_shards(outputs, max_shard_size))


def check_space(directory: Path, needed: int) -> None:
    """Raise ConversionError if the file system on which a directory is, or will be made, has too few bytes left."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConversionError(f"{directory}: the output takes {needed:,} bytes, and {free:,} are free")
