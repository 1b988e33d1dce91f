"""One `.bin` file: a zip archive of `torch.save` whose values stand uncompressed between the zip records.

torch unpickles only the list of tensors (`weights_only=True`, values left in the file by `mmap=True`), and the
values are then read like those of any other tensor file. Where a tensor lies is found without torch internals:
torch maps the file once, so each storage's address less the place of its zip record is the same number for
all. That proves at the same time that the pickle and the records agree, which torch does not check.

Only zip archives reach `torch.load`: before torch 2.6 its reader of the older tar format could be made to run
code even with `weights_only=True` (CVE-2025-32434).
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.safetensors_file import DTYPES
from idefics_common.checkpoint.tensor_file import TensorFile
from idefics_common.checkpoint.tensor_source import TensorInfo

_DTYPES = {f"torch.{dtype.name}": dtype for dtype in DTYPES.values()}

# Local file header of the zip format: its own copy of the name and extra field precede the record.
_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER_SIGNATURE = b"PK\x03\x04"


class TorchBinFile(TensorFile):
    """An open `.bin` file holding one dict of tensors.

    Tied tensors share their bytes, and so their `offset`. Raises CheckpointError for anything but plain dense
    tensors under string names, for a damaged archive, and where torch is not installed.
    """

    format = "bin"

    def _read_layout(self) -> list[TensorInfo]:
        # First, because it is what the person must mend whatever the file holds.
        torch = import_torch(self.path)
        records = self._storage_records()
        state = self._unpickle(torch)
        tensors = {name: self._check_tensor(torch, name, value) for name, value in state.items()}
        map_address = self._address_of_map(tensors, records)
        return [self._describe(name, tensor, map_address) for name, tensor in tensors.items()]

    def _storage_records(self) -> list[tuple[int, int]]:
        """(offset in the file, bytes) of every non-empty storage, in file order."""
        try:
            with zipfile.ZipFile(self._file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, struct.error) as error:
            raise CheckpointError(
                self.path,
                f"is not a whole zip archive ({error}): truncated, or saved by torch before 1.6, whose format "
                "is not read; load it with torch and save it again",
            ) from error
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise CheckpointError(self.path, "has two zip records of the same name")
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(self.path, "is a TorchScript program, not a dict of tensors")
        storages = []
        for entry in entries:
            offset = self._check_record(entry)
            if entry.filename.endswith("/byteorder") and self._read_bytes(offset, entry.file_size) != b"little":
                raise CheckpointError(self.path, "was saved on a big-endian machine, which is not read")
            if re.fullmatch(r"[^/]+/data/[^/]+", entry.filename) and entry.file_size:
                storages.append((offset, entry.file_size))
        return sorted(storages)

    def _check_record(self, entry: zipfile.ZipInfo) -> int:
        """Place of the record's content in the file, which must lie there whole and uncompressed."""
        record = quote(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise CheckpointError(self.path, f"zip record {record} is compressed or encrypted, as torch never does")
        local = b""
        if 0 <= entry.header_offset <= self.size - _LOCAL_HEADER_BYTES:
            local = self._read_bytes(entry.header_offset, _LOCAL_HEADER_BYTES)
        if not local.startswith(_LOCAL_HEADER_SIGNATURE):
            raise CheckpointError(self.path, f"zip record {record} does not start where the directory says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", local, 26)
        offset = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if entry.file_size != entry.compress_size or offset + entry.file_size > self.size:
            raise CheckpointError(self.path, f"zip record {record} does not fit in the file")
        return offset

    def _unpickle(self, torch: ModuleType) -> Mapping:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            if isinstance(state, Mapping):
                # A pickle can give a tensor attributes that hide its methods; a detached one has none.
                is_tensor, detach = torch.is_tensor, torch.Tensor.detach
                state = {name: detach(value) if is_tensor(value) else value for name, value in state.items()}
        # A damaged pickle can make the unpickler raise anything at all.
        except Exception as error:
            # torch wraps the reason in advice to load with weights_only=False, which is not ours to pass on.
            reason = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
            reason = str(reason or error)
            if wanted := re.search(r"GLOBAL (\S+)", reason):
                problem = f"refused: its pickle asks for {wanted[1]}, and a pickle may run code; only tensors are read"
            else:
                first_line = reason.strip().partition("\n")[0]
                problem = f"torch.load(weights_only=True) cannot read it: {type(error).__name__}: {first_line}"
            raise CheckpointError(self.path, problem) from error
        if not isinstance(state, Mapping):
            raise CheckpointError(self.path, f"expected a dict of tensors, got {type(state).__name__}")
        return state

    def _check_tensor(self, torch: ModuleType, name: object, value: object):
        if not isinstance(name, str):
            raise CheckpointError(self.path, f"a tensor's name must be a string, got {quote(name)}")
        if type(value) is not torch.Tensor:
            raise CheckpointError(self.path, f"expected a tensor, got {type(value).__name__}", name)
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_neg():
            raise CheckpointError(self.path, f"expected a dense tensor that holds its values, got {value.type()}", name)
        if str(value.dtype) not in _DTYPES:
            known = ", ".join(dtype.removeprefix("torch.") for dtype in _DTYPES)
            raise CheckpointError(self.path, f"dtype {value.dtype} is none of {known}", name)
        return value

    def _address_of_map(self, tensors: Mapping, records: list[tuple[int, int]]) -> int:
        """Address at which torch mapped the file: the one that puts every storage on a record of its size."""
        untyped = [tensor.untyped_storage() for tensor in tensors.values()]
        storages = sorted({(storage.data_ptr(), storage.nbytes()) for storage in untyped if storage.nbytes()})
        if not storages:
            return 0
        map_address = storages[0][0] - records[0][0] if records else 0
        if [(address - map_address, nbytes) for address, nbytes in storages] != records:
            raise CheckpointError(
                self.path,
                f"the pickle describes {len(storages)} storages that are not the {len(records)} records of the "
                "archive: damaged, or not written by torch.save",
            )
        return map_address

    def _describe(self, name: str, tensor, map_address: int) -> TensorInfo:
        dtype = _DTYPES[str(tensor.dtype)]
        nbytes = tensor.numel() * dtype.itemsize
        # An empty tensor has no address.
        offset = tensor.data_ptr() - map_address if nbytes else 0
        strides = None
        if not tensor.is_contiguous():
            strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
        return TensorInfo(name, dtype, tuple(tensor.shape), nbytes, self.path, offset, strides)


def import_torch(path: Path) -> ModuleType:
    """torch. Raises CheckpointError, naming a `.bin` file that is to be read or written, where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            path,
            "a .bin file needs torch, which is not installed: pip install 'idefics[pt]', or take a safetensors file",
        ) from error
    return torch
