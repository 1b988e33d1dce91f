"""One `.safetensors` file: 8 bytes of header length, a JSON header, the values.

Stricter than the official reader, and unlike it reads by rows. The header must describe
the rest of the file exactly: every byte in one tensor and one only, every range as long as dtype and shape say,
no key twice. A file that passes gives the same tensors as the official library.

Source: the format section of the safetensors README.
"""

import math
import struct

import ml_dtypes
import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.strict_json import parse_json_object
from idefics_common.checkpoint.tensor_file import TensorFile
from idefics_common.checkpoint.tensor_source import TensorInfo

MAX_HEADER_BYTES = 16 * 2**20
"""Longest header that is parsed. The 80B checkpoint in one file would need 0.3 MB; parsed JSON takes up to
twenty times its own size, so the official 100 MB would let a hostile file fill gigabytes."""

MAX_DIMENSIONS = 32

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
"""Dtypes that an IDEFICS checkpoint can hold: parameters, stale index buffers, int8 weights."""

_LENGTH_BYTES = 8
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}


class SafetensorsFile(TensorFile):
    """An open `.safetensors` file, checked as a whole before the first value is read.

    Attributes:
        metadata: what its writer noted, strings by name.

    Raises CheckpointError where the file is not exactly what its header says.
    """

    format = "safetensors"

    def _read_layout(self) -> list[TensorInfo]:
        header, data_start = self._read_header()
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(self.path, f"__metadata__ must map strings to strings, got {quote(metadata)}")
        self.metadata = metadata
        tensors = [self._check_tensor(name, entry, data_start) for name, entry in header.items()]
        self._check_coverage(tensors, data_start)
        return tensors

    def _read_header(self) -> tuple[dict, int]:
        """The parsed header and the place in the file where the values start."""
        if self.size < _LENGTH_BYTES:
            raise CheckpointError(
                self.path, f"a safetensors file starts with 8 bytes of header length; this one has {self.size} in all"
            )
        (length,) = struct.unpack("<Q", self._read_bytes(0, _LENGTH_BYTES))
        if length > self.size - _LENGTH_BYTES:
            raise CheckpointError(
                self.path,
                f"the header is said to be {length} bytes long, but {self.size - _LENGTH_BYTES} follow: truncated, "
                "or not a safetensors file",
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(self.path, f"the header is {length} bytes long; at most {MAX_HEADER_BYTES} are read")
        data = self._read_bytes(_LENGTH_BYTES, length)
        if not data.startswith(b"{"):
            raise CheckpointError(self.path, f"the header starts with {data[:8]!r} where '{{' is due")
        try:
            return parse_json_object(data), _LENGTH_BYTES + length
        except ValueError as error:
            raise CheckpointError(self.path, f"the header is not usable JSON: {error}") from error

    def _check_tensor(self, name: str, entry: object, data_start: int) -> TensorInfo:
        """One header entry, checked by itself and against the size of the file."""

        def refuse(problem: str):
            raise CheckpointError(self.path, problem, name)

        if not isinstance(entry, dict) or entry.keys() != _TENSOR_KEYS:
            refuse(f"expected an object of dtype, shape and data_offsets, got {quote(entry)}")
        dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        if dtype is None:
            refuse(f"dtype {quote(entry['dtype'])} is none of {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            refuse(f"shape must be a list of at most {MAX_DIMENSIONS} sizes, got {quote(shape)}")
        # numpy refuses such shapes even where another dimension is 0 and the tensor empty.
        if math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
            refuse(f"shape {quote(shape)} does not fit in an address space")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            refuse(f"data_offsets must be [begin, end] with begin <= end, got {quote(offsets)}")
        begin, end = offsets
        if end > self.size - data_start:
            refuse(
                f"lies at {begin}:{end} of the data, but the file holds {self.size - data_start} bytes of data: "
                "truncated, or a false header"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes:
            refuse(f"{entry['dtype']} {shape} takes {nbytes} bytes, but data_offsets {offsets} hold {end - begin}")
        return TensorInfo(name, dtype, tuple(shape), nbytes, self.path, data_start + begin)

    def _check_coverage(self, tensors: list[TensorInfo], data_start: int) -> None:
        """Every byte of the data belongs to one tensor and one only."""
        position, before = data_start, "the header"
        for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
            if info.offset != position:
                kind = "overlaps" if info.offset < position else "leaves a gap after"
                raise CheckpointError(
                    self.path,
                    f"{kind} {before}: it starts at byte {info.offset - data_start} of the data, "
                    f"where {position - data_start} is due",
                    info.name,
                )
            position, before = info.offset + info.nbytes, f"tensor {quote(info.name)}"
        if position != self.size:
            raise CheckpointError(
                self.path, f"{self.size - position} bytes after {before} belong to no tensor; the file is not whole"
            )


def _are_sizes(value: object) -> bool:
    """Whether `value` is a list of integers >= 0. JSON's true and 1.0 are equal to 1 and yet are none."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
