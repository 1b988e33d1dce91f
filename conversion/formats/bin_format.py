"""`pytorch_model.bin`, in shards or not: what `torch.save` writes for a dict of tensors.

`torch.save` lays the file out. Under `torch.serialization.skip_data` it leaves a hole for each tensor's values, and the
reader of such files finds the holes. A zip archive carries the CRC-32 of its records; those of the values are written
into it once they are known. torch calls `skip_data` a prototype; `tests/conversion/test_bin_format.py` checks what is
relied on.

Source: PKWARE's APPNOTE 6.3, sections 4.3.9 (what follows a record) and 4.3.12 (the directory at the end).
"""

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from conversion.formats.base import CanonicalFormat, Output, Place
from idefics_common.checkpoint import TorchBinFile
from idefics_common.checkpoint.hub import CANONICAL_WEIGHTS
from idefics_common.checkpoint.torch_bin_file import import_torch

# an entry of the directory: where its CRC-32 and the lengths of its parts stand, and its length without these
_CRC_IN_ENTRY, _LENGTHS_IN_ENTRY, _ENTRY_BYTES = 16, 28, 46
_CRC_IN_DESCRIPTOR = 4


class BinFormat(CanonicalFormat):
    """See `conversion.formats.base.Format`."""

    name = "bin"
    stem, ending, index_ending = "pytorch_model", ".bin", ".bin.index.json"
    hub_patterns = CANONICAL_WEIGHTS[1]

    def check_writable(self, directory: Path) -> None:
        import_torch(directory / self.directory_files[0])

    def lay_out_file(self, path: Path, outputs: Sequence[Output], is_whole: bool) -> dict[str, int]:
        torch = import_torch(path)
        # memory that is reserved and never touched
        tensors = {
            output.name: torch.empty(output.shape, dtype=getattr(torch, output.dtype.name)) for output in outputs
        }
        with torch.serialization.skip_data():
            torch.save(tensors, path)
        with TorchBinFile(path) as file:
            return {name: info.offset for name, info in file.infos.items()}

    def finish(
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        for shard in shards:
            path = directory / places[shard[0].name].file
            # torch numbers the records of values in the order of the tensors
            written = {f"{path.stem}/data/{number}": output for number, output in enumerate(shard)}
            with open(path, "r+b") as file:
                for record, entry in _directory(file):
                    if record in written:
                        output = written[record]
                        crc = struct.pack("<I", checksums[output.name])
                        os.pwrite(file.fileno(), crc, entry + _CRC_IN_ENTRY)
                        os.pwrite(file.fileno(), crc, places[output.name].offset + output.nbytes + _CRC_IN_DESCRIPTOR)


def _directory(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """The name of each record of an archive, and where its entry in the archive's directory starts in the file."""
    with zipfile.ZipFile(file) as archive:
        entry = archive.start_dir
        for record in archive.infolist():
            yield record.filename, entry
            file.seek(entry + _LENGTHS_IN_ENTRY)
            entry += _ENTRY_BYTES + sum(struct.unpack("<HHH", file.read(6)))
