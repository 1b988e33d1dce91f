"""Writing a safetensors file tensor by tensor: no more than one of them is in memory at a time.

The safetensors package's own writer wants all values at once, which for a model of many gigabytes doubles its memory.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from idefics_common.checkpoint.safetensors_file import DTYPES
from idefics_common.checkpoint.tensor_source import FLOAT_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if dtype in FLOAT_DTYPES}
"""How the format calls the dtypes of parameters."""

_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor whose values are asked for when their turn comes.

    Attributes:
        dtype: one of `DTYPE_NAMES`. shape: dimensions.
        read: makes the values, an array of that dtype and shape in any order of memory.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, TensorToWrite]) -> None:
    """Write a safetensors file; it appears under its name only when it is complete.

    Args:
        path: where to; an earlier file is replaced.
        tensors: by name, in the order in which they are to lie in the file.

    Raises:
        ValueError: if a dtype has no name in the format, or values do not have the dtype and shape announced.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(safetensors_header(tensors))
            for name, tensor in tensors.items():
                values = np.ascontiguousarray(tensor.read()).reshape(tensor.shape)
                if values.dtype != tensor.dtype:
                    raise ValueError(f"{path}: tensor {name!r}: expected {tensor.dtype} values, got {values.dtype}")
                file.write(values.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def safetensors_header(tensors: Mapping[str, TensorToWrite]) -> bytes:
    """The start of a file, up to the first value; the values follow in this order with no gap between them.

    Args:
        tensors: by name; anything that has dtype, shape and nbytes.

    Raises ValueError if a dtype has no name in the format.
    """
    # transformers refuses a file that does not say for which framework it was written
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: {tensor.dtype} cannot be written to safetensors")
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
