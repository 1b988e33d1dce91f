"""`.bin` files: the tensors of torch.save, bit for bit, and nothing else."""

import os
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics_common.checkpoint import CheckpointError, TorchBinFile

torch = pytest.importorskip("torch")

REPOSITORY = Path(__file__).parents[2]


def state_dict() -> OrderedDict:
    """Every dtype, and every way in which tensors may lie in their storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    return OrderedDict(
        double=torch.randn(3, 2, generator=generator, dtype=torch.float64),
        single=base,
        tied=base,
        transposed=base.T,
        strided=base[1::2, ::3],
        rows=base[2:5],
        half=torch.randn(7, generator=generator).half(),
        brain=torch.randn(5, 3, generator=generator).bfloat16(),
        brain_transposed=torch.randn(5, 3, generator=generator).bfloat16().T,
        scalar=torch.tensor(2.5),
        broadcast=torch.tensor([3.0]).expand(4),
        empty=torch.zeros(0, 3),
        positions=torch.arange(5),
        int32=torch.arange(3, dtype=torch.int32),
        int16=torch.arange(3, dtype=torch.int16),
        int8=torch.arange(-2, 3, dtype=torch.int8),
        uint8=torch.tensor([255], dtype=torch.uint8),
        parameter=torch.nn.Parameter(torch.ones(3)),
    )


def as_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        # Exact: every bfloat16 is a float32, and rounds back to itself.
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(ours: np.ndarray, tensor):
    theirs = as_numpy(tensor)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tobytes() == theirs.tobytes()


def save(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TorchBinFile(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_every_tensor_comes_bit_for_bit(tmp_path):
    state = state_dict()
    with TorchBinFile(save(tmp_path / "pytorch_model.bin", state)) as ours:
        assert set(ours) == set(state)
        assert ours.info("tied").offset == ours.info("single").offset
        assert ours.info("rows").offset == ours.info("single").offset + 2 * 4 * 4
        for name, tensor in state.items():
            assert ours.info(name).nbytes == tensor.numel() * tensor.element_size()
            assert_same(ours.read(name), tensor)
            assert ours.read(name).flags.c_contiguous
            for start, stop in [(0, len(tensor)), (1, 2)] if tensor.dim() and len(tensor) > 1 else []:
                assert_same(ours.read_rows(name, start, stop), tensor[start:stop])


class RunsCode:
    """Unpickled without care, makes the directory that it is told to."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


@pytest.mark.parametrize("place", ["value", "beside tensors", "whole"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, place):
    evil = RunsCode(tmp_path / "executed")
    content = {"value": {"w": evil}, "beside tensors": {"w": torch.ones(2), "x": evil}, "whole": evil}[place]
    message = refusal(save(tmp_path / "evil.bin", content))
    assert "refused: its pickle asks for posix.mkdir, and a pickle may run code" in message
    assert "weights_only=False" not in message
    assert not evil.directory.exists()
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert evil.directory.exists(), "the file does no harm, so refusing it proves nothing"


def test_other_refusals_of_torch_come_without_its_advice(tmp_path):
    content = {"w": torch.ones(2)}
    path = save(tmp_path / "w.bin", content)
    # SETITEM for a dict becomes an opcode that torch does not know.
    damage_record(path, "w/data.pkl", lambda pickled: pickled.replace(b"s.", b"\x00."))
    message = refusal(path)
    assert "torch.load(weights_only=True) cannot read it: UnpicklingError: Unsupported operand 0" in message
    assert "False" not in message


def damage_record(path: Path, record: str, damage):
    """Rewrite the archive with one record changed; `damage` keeps its length."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read(record)
    damaged = damage(content)
    assert len(damaged) == len(content)
    assert damaged != content
    whole = path.read_bytes()
    assert whole.count(content) == 1
    path.write_bytes(whole.replace(content, damaged))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], ": expected a dict of tensors, got list"),
        (torch.ones(2), ": expected a dict of tensors, got Tensor"),
        ({1: torch.ones(2)}, ": a tensor's name must be a string, got 1"),
        ({"state_dict": {"w": torch.ones(2)}}, ": tensor 'state_dict': expected a tensor, got dict"),
        ({"step": 3}, ": tensor 'step': expected a tensor, got int"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, ": tensor 'w': dtype torch.complex64 is none of float64,"),
        ({"w": torch.ones(2, 2).to_sparse()}, ": tensor 'w': expected a dense tensor that holds its values"),
        ({"w": torch.ones(2, device="meta")}, ": tensor 'w': expected a dense tensor that holds its values"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, ": tensor 'w': expected a dense tensor that"),
    ],
)
def test_anything_but_a_dict_of_dense_tensors_is_refused(tmp_path, content, message):
    path = save(tmp_path / "odd.bin", content)
    assert refusal(path).startswith(str(path) + message)


def test_attributes_that_hide_methods_of_a_tensor_are_dropped(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.data_ptr = 5
    with TorchBinFile(save(tmp_path / "w.bin", {"w": parameter})) as ours:
        assert_same(ours.read("w"), torch.ones(3))


def rezip(path: Path, compression: int, rename=lambda name: name, content=lambda name, data: data):
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records:
            archive.writestr(rename(name), content(name, data))


def test_archives_that_torch_never_writes(tmp_path):
    path = tmp_path / "w.bin"

    def shift_directory():
        """Say that the zip directory starts 100 bytes later: the first record then starts before the file."""
        rezip(path, zipfile.ZIP_STORED)
        content = bytearray(path.read_bytes())
        (start,) = struct.unpack_from("<I", content, len(content) - 6)
        struct.pack_into("<I", content, len(content) - 6, start + 100)
        path.write_bytes(content)

    cases = {
        "zip record 'w/data.pkl' does not start where the directory says": shift_directory,
        "is compressed or encrypted": lambda: rezip(path, zipfile.ZIP_DEFLATED),
        "saved on a big-endian machine": lambda: rezip(
            path, zipfile.ZIP_STORED, content=lambda name, data: b"big" if name.endswith("byteorder") else data
        ),
        "is a TorchScript program": lambda: rezip(
            path, zipfile.ZIP_STORED, rename=lambda name: name.replace("w/version", "w/constants.pkl")
        ),
        # One byte more than the tensor takes: torch itself does not notice.
        "the pickle describes 2 storages that are not the 2 records": lambda: rezip(
            path, zipfile.ZIP_STORED, content=lambda name, data: data + b"\0" if name.endswith("data/0") else data
        ),
        "the pickle describes 2 storages that are not the 3 records": lambda: rezip(
            path, zipfile.ZIP_STORED, rename=lambda name: name.replace("w/.format_version", "w/data/7")
        ),
    }
    for message, change in cases.items():
        save(path, {"v": torch.ones(3), "w": torch.ones(4)})
        change()
        assert message in refusal(path)
    save(path, {"v": torch.ones(3), "w": torch.ones(4)})
    rezip(path, zipfile.ZIP_STORED)
    with TorchBinFile(path) as ours:
        assert_same(ours.read("w"), torch.ones(4))


def test_format_before_torch_1_6_is_refused_with_a_way_out(tmp_path):
    path = save(tmp_path / "old.bin", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert "not a whole zip archive (File is not a zip file)" in refusal(path)
    assert "saved by torch before 1.6" in refusal(path)


def test_truncation_is_refused_at_fifty_places(tmp_path):
    content = save(tmp_path / "whole.bin", state_dict()).read_bytes()
    short = tmp_path / "short.bin"
    for length in np.linspace(0, len(content) - 1, 50, dtype=int):
        short.write_bytes(content[:length])
        assert "truncated" in refusal(short)


def test_without_torch_it_says_what_to_install(tmp_path):
    path = save(tmp_path / "pytorch_model.bin", {"w": torch.ones(2)})
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from idefics_common.checkpoint import CheckpointError, open_checkpoint\n"
        "try: open_checkpoint(sys.argv[1])\n"
        "except CheckpointError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{path}: a .bin file needs torch, which is not installed: pip")


# torch warns of a pickle protocol that a mutated byte stands for.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@settings(max_examples=150)
@given(data=st.data())
def test_mutated_file_is_refused_or_read_as_torch_reads_it(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.arange(3)}, path)
    content = bytearray(path.read_bytes())
    # The pickle stands near the start, the zip directory at the end; the values between them are beside the point.
    places = st.one_of(st.integers(0, 700), st.integers(len(content) - 900, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        ours = TorchBinFile(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right
        return
    with ours:
        theirs = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        assert set(ours) == set(theirs)
        for name in ours:
            assert_same(ours.read(name), theirs[name])
