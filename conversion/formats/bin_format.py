"""`pytorch_model.bin`, in shards or not: what `torch.save` writes for a dict of tensors, without torch.

The file is a zip archive: a short pickle that lists the tensors, and the values of each in a record of its own,
uncompressed and aligned. Both are written here byte by byte, since `torch.save` wants all values in memory. A zip
record carries the CRC-32 of its content, so the records' headers are written again once the values are known.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc (version 3 of the archive); PKWARE's APPNOTE
6.3, sections 4.3 and 4.5.3, for the zip records and their 64-bit extension.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from conversion.formats.base import CanonicalFormat, Output, Place

_STORAGES = {
    np.dtype(np.float64): b"DoubleStorage",
    np.dtype(np.float32): b"FloatStorage",
    np.dtype(np.float16): b"HalfStorage",
    np.dtype(ml_dtypes.bfloat16): b"BFloat16Storage",
}

_ALIGNMENT = 64
_MOST_32_BITS = 0xFFFFFFFF
_UTF8_NAMES = 0x0800


class BinFormat(CanonicalFormat):
    """See `conversion.formats.base.Format`."""

    name = "bin"
    directory_files = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    stem, ending = "pytorch_model", ".bin"

    def lay_out_file(self, path: Path, outputs: Sequence[Output]) -> dict[str, int]:
        records = _records(outputs, {})
        _write_around_values(path, records, "xb")
        return {record.tensor: record.start for record in records if record.tensor}

    def finish(
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        for shard in shards:
            _write_around_values(directory / places[shard[0].name].file, _records(shard, checksums), "r+b")


@dataclass(frozen=True)
class _Record:
    """One record of the archive: its local header at `offset`, its content of `nbytes` bytes at `start`.

    The content is `content`, or the values of `tensor`.
    """

    name: bytes
    offset: int
    start: int
    nbytes: int
    crc: int
    content: bytes = b""
    tensor: str = ""


def _records(shard: Sequence[Output], checksums: Mapping) -> list[_Record]:
    """All records of a file, in order; values whose CRC-32 is not known yet have 0."""
    records, offset = [], 0

    def add(name: str, nbytes: int, crc: int, **what) -> None:
        nonlocal offset
        encoded = f"archive/{name}".encode()
        header = _LOCAL.size + len(encoded)
        if nbytes >= _MOST_32_BITS:
            header += _ZIP64_SIZES.size
        # the padding is itself an extra field, of 4 bytes at least
        start = offset + header + 4
        start += -start % _ALIGNMENT
        records.append(_Record(encoded, offset, start, nbytes, crc, **what))
        offset = start + nbytes

    def add_content(name: str, content: bytes) -> None:
        add(name, len(content), zlib.crc32(content), content=content)

    add_content("data.pkl", b"".join(_pickle(shard)))
    add_content("byteorder", b"little")
    for number, output in enumerate(shard):
        add(f"data/{number}", output.nbytes, checksums.get(output.name, 0), tensor=output.name)
    add_content("version", b"3\n")
    return records


def _pickle(shard: Sequence[Output]) -> Iterator[bytes]:
    """The pickle of an ordered dict of tensors, each alone in its storage, as torch's own pickler spells it."""
    yield b"\x80\x02ccollections\nOrderedDict\n)R("
    for number, output in enumerate(shard):
        size = _integer(output.parameter.size)
        yield _string(output.name)
        yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield _string("storage") + b"ctorch\n" + _STORAGES[output.dtype] + b"\n"
        # the storage: its key, device and number of elements; then the tensor's offset in it
        yield _string(str(number)) + _string("cpu") + size + b"tQ" + _integer(0)
        yield _tuple(output.shape)
        yield _tuple(np.cumprod((1, *output.shape[:0:-1]), dtype=np.int64)[::-1].tolist())
        # requires_grad, and no hooks
        yield b"\x89ccollections\nOrderedDict\n)RtR"
    yield b"u."


def _string(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little")


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_ZIP64_SIZES = struct.Struct("<HHQQ")
_ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_VERSION, _VERSION_ZIP64 = 20, 45
_NO_TIME, _NO_DATE = 0, 33  # 1980-01-01, the earliest that a zip archive can say


def _write_around_values(path: Path, records: Sequence[_Record], mode: str) -> None:
    """Write all of an archive but the tensors' values, at its full length."""
    with open(path, mode) as file:
        for record in records:
            file.seek(record.offset)
            file.write(_local_header(record))
            file.write(record.content)
        directory_offset = records[-1].start + records[-1].nbytes
        file.seek(directory_offset)
        file.write(_central_directory(records, directory_offset))
        file.flush()
        os.ftruncate(file.fileno(), file.tell())


def _local_header(record: _Record) -> bytes:
    sizes, extra, version = _sizes(record)
    padding = record.start - record.offset - _LOCAL.size - len(record.name) - len(extra) - 4
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fields = (b"PK\x03\x04", version, _UTF8_NAMES, 0, _NO_TIME, _NO_DATE, record.crc, *sizes)
    return _LOCAL.pack(*fields, len(record.name), len(extra)) + record.name + extra


def _central_directory(records: Sequence[_Record], directory_offset: int) -> bytes:
    parts = []
    for record in records:
        sizes, extra, version = _sizes(record)
        offset = record.offset
        if offset >= _MOST_32_BITS:
            extra = struct.pack("<HH", 1, len(extra[4:]) + 8) + extra[4:] + struct.pack("<Q", offset)
            offset, version = _MOST_32_BITS, _VERSION_ZIP64
        fields = (b"PK\x01\x02", version, version, _UTF8_NAMES, 0, _NO_TIME, _NO_DATE, record.crc, *sizes)
        parts.append(_CENTRAL.pack(*fields, len(record.name), len(extra), 0, 0, 0, 0, offset) + record.name + extra)
    directory = b"".join(parts)
    count, size, end_offset = len(records), len(directory), directory_offset + len(directory)
    if directory_offset >= _MOST_32_BITS or count >= 0xFFFF:
        directory += _ZIP64_END.pack(
            b"PK\x06\x06", 44, _VERSION_ZIP64, _VERSION_ZIP64, 0, 0, count, count, size, directory_offset
        )
        directory += _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, end_offset, 1)
    count, size = min(count, 0xFFFF), min(size, _MOST_32_BITS)
    return directory + _END.pack(b"PK\x05\x06", 0, 0, count, count, size, min(directory_offset, _MOST_32_BITS), 0)


def _sizes(record: _Record) -> tuple[tuple[int, int], bytes, int]:
    """Both size fields of a record's headers, the extra field that holds them if they are too long, the version."""
    if record.nbytes >= _MOST_32_BITS:
        extra = _ZIP64_SIZES.pack(1, 16, record.nbytes, record.nbytes)
        return (_MOST_32_BITS, _MOST_32_BITS), extra, _VERSION_ZIP64
    return (record.nbytes, record.nbytes), b"", _VERSION
