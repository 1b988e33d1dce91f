"""Our safetensors reader against the official one, and against files made to break it."""

import json
import math
import mmap
import os
import struct
import threading

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from idefics_common.checkpoint import CheckpointError, SafetensorsFile
from idefics_common.checkpoint import safetensors_file as module

_rng = np.random.default_rng(0)
TENSORS = {
    "double": _rng.normal(size=(3, 2)),
    "single": _rng.normal(size=(2, 3, 4, 5)).astype(np.float32),
    "half": _rng.normal(size=7).astype(np.float16),
    "brain": _rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 5), ml_dtypes.bfloat16),
    "positions": np.arange(5),
    "int32": np.arange(-3, 3, dtype=np.int32),
    "int16": np.arange(3, dtype=np.int16),
    "int8": np.arange(-2, 3, dtype=np.int8),
    "uint8": np.array([[255]], np.uint8),
    "naïve 名": np.ones((1, 1), np.float32),
}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_bytes(header: dict | str | bytes, data: bytes = bytes(8)) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header)) + header + data


def aligned(header: dict) -> str:
    """The header, padded as writers do it so that the data starts at a multiple of eight bytes."""
    text = json.dumps(header)
    return text + " " * (-len(text) % 8)


def refusal(path, content: bytes) -> str:
    """The message with which a file of this content is refused; it must name the file."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def assert_same(ours: np.ndarray, theirs: np.ndarray):
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tobytes() == theirs.tobytes()


def assert_same_as_official(ours: SafetensorsFile):
    with safetensors.safe_open(ours.path, "np") as official:
        assert set(ours) == set(official.keys())
        for name in ours:
            theirs = official.get_tensor(name)
            assert_same(ours.read(name), theirs)


HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", (2, 2), (0, 16)),
        "b": entry("BF16", (3,), (16, 22)),
        "c": entry("F16", (), (22, 24)),
        "d": entry("I64", (0, 4), (24, 24)),
    },
    separators=(",", ":"),
)
DATA = bytes(range(24))


@pytest.fixture
def official_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_reads_what_the_official_library_wrote(official_file):
    with SafetensorsFile(official_file) as ours:
        assert set(ours) == set(TENSORS)
        assert ours.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
        offsets = [ours.info(name).offset for name in ours]
        assert offsets == sorted(offsets)
        content = official_file.read_bytes()
        for name, tensor in TENSORS.items():
            info = ours.info(name)
            assert (info.name, info.dtype, info.shape, info.file) == (name, tensor.dtype, tensor.shape, official_file)
            assert content[info.offset : info.offset + info.nbytes] == tensor.tobytes()
        assert_same_as_official(ours)


def test_rows_come_in_new_memory_or_in_the_given_one(official_file):
    with SafetensorsFile(official_file) as ours:
        for name, tensor in TENSORS.items():
            for stop in range(len(tensor) + 1) if tensor.ndim else ():
                for start in range(stop + 1):
                    assert_same(ours.read_rows(name, start, stop), tensor[start:stop])
        buffer = np.empty((3, 3), ml_dtypes.bfloat16)
        assert ours.read_rows("brain", 1, 4, out=buffer) is buffer
        assert_same(buffer, TENSORS["brain"][1:4])


@pytest.mark.parametrize(
    ("name", "start", "stop", "out", "message"),
    [
        ("scalar", 0, 1, None, "'scalar' is a scalar"),
        ("brain", 0, 5, None, "'brain' has 4 rows, not 0:5"),
        ("brain", -1, 2, None, "'brain' has 4 rows, not -1:2"),
        ("brain", 3, 2, None, "'brain' has 4 rows, not 3:2"),
        ("brain", 0, 2, np.empty((2, 3), np.float32), r"'brain': out must be .* bfloat16 .*, got float32 \(2, 3\)"),
        ("half", 0, 2, np.empty(3, np.float16), r"'half': out must be .* \(2,\), got float16 \(3,\)"),
        ("half", 0, 2, np.empty(4, np.float16)[::2], "'half': out must be a C-contiguous"),
        ("absent", 0, 1, None, "'absent': not in this checkpoint of 12 tensors"),
    ],
)
def test_rows_that_do_not_fit(official_file, name, start, stop, out, message):
    with SafetensorsFile(official_file) as ours, pytest.raises(ValueError, match=message) as caught:
        ours.read_rows(name, start, stop, out)
    assert str(official_file) in str(caught.value)


def test_arrays_outlive_the_file(official_file):
    with SafetensorsFile(official_file) as ours:
        values = ours.read("single")
    assert values.flags.writeable
    assert_same(values, TENSORS["single"])
    with pytest.raises(CheckpointError, match="is closed"):
        ours.read("single")
    with pytest.raises(CheckpointError, match="is closed"):
        ours.read_block("single", 1, 0, 1)


def test_a_tensor_at_an_odd_address(tmp_path):
    path = tmp_path / "odd.safetensors"
    values = np.array([1.5, -2.0], np.float32)
    header = aligned({"byte": entry("U8", (1,), (0, 1)), "odd": entry("F32", (2,), (1, 9))})
    path.write_bytes(file_bytes(header, b"\x07" + values.tobytes()))
    with SafetensorsFile(path) as ours:
        assert ours.info("odd").offset % 4 == 1
        assert_same(ours.read("odd"), values)
        assert_same_as_official(ours)


def test_resident_pages_are_given_back(tmp_path):
    """A file of 64 MB (sparse) is read by rows and by columns; neither leaves it in the memory of the process."""

    def resident_file_megabytes() -> float:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[2]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident pages are read from Linux's /proc")
    path = tmp_path / "large.safetensors"
    size = 64 * 10**6
    path.write_bytes(file_bytes(aligned({"large": entry("F32", (1000, size // 4000), (0, size))}), b""))
    os.truncate(path, path.stat().st_size + size)
    with SafetensorsFile(path) as ours:
        before = resident_file_megabytes()
        buffer = np.empty((100, size // 4000), np.float32)
        for start in range(0, 1000, 100):
            assert not ours.read_rows("large", start, start + 100, out=buffer).any()
        assert resident_file_megabytes() - before < 5
        assert not ours.read_block("large", 1, 0, 10).any()
        assert resident_file_megabytes() - before < 5
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped.find(b"\1", ours.info("large").offset) < 0
            assert resident_file_megabytes() - before > 60, "the measure does not see mapped pages"


HOSTILE = {
    "no length": (b"\x01\0\0", "8 bytes of header length; this one has 3"),
    "length of 2^63": (struct.pack("<Q", 2**63) + b"{}", f"said to be {2**63} bytes long, but 2 follow"),
    "length of 2^64-1": (b"\xff" * 8 + b"{}", f"said to be {2**64 - 1} bytes long"),
    "length beyond the end": (struct.pack("<Q", 3) + b"{}", "3 bytes long, but 2 follow: truncated"),
    "empty header": (file_bytes(b"", b""), "starts with b'' where '{' is due"),
    "not an object": (file_bytes(b"[1]", b""), "starts with b'[1]'"),
    "leading space": (file_bytes(b" {}", b""), "starts with b' {}'"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not usable JSON: 'utf-8' codec"),
    "not JSON": (file_bytes(b'{"w":'), "not usable JSON: Expecting value"),
    "two objects": (file_bytes(b"{}{}", b""), "not usable JSON: Extra data"),
    "NaN": (file_bytes(b'{"w":NaN}'), "NaN is not JSON"),
    "deep nesting": (file_bytes(b'{"w":' + b"[" * 100_000), "nested too deeply"),
    "half a surrogate pair": (file_bytes(json.dumps({"\ud800": entry()})), "surrogate"),
    "duplicate name": (
        file_bytes(json.dumps({"v": entry(), "w": entry()}).replace("v", "w")),
        "'w' appears twice",
    ),
    "duplicate key": (
        file_bytes('{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'),
        "'shape' appears twice",
    ),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}, "w": entry()}), "__metadata__ must map strings"),
    "metadata null": (file_bytes({"__metadata__": None, "w": entry()}), "__metadata__ must map strings"),
    "entry not an object": (file_bytes({"w": [1]}), "tensor 'w': expected an object of dtype"),
    "entry without shape": (file_bytes({"w": {"dtype": "F32", "data_offsets": [0, 8]}}), "tensor 'w': expected an obj"),
    "entry with more": (file_bytes({"w": entry() | {"x": 1}}), "tensor 'w': expected an object of dtype"),
    "unknown dtype": (file_bytes({"w": entry("F8_E4M3", (8,))}), "tensor 'w': dtype 'F8_E4M3' is none of F64, F32"),
    "dtype not a string": (file_bytes({"w": entry(["F32"])}), "tensor 'w': dtype ['F32'] is none of"),
    "shape not a list": (file_bytes({"w": entry() | {"shape": 2}}), "tensor 'w': shape must be a list"),
    "negative size": (file_bytes({"w": entry(shape=(-1, -2))}), "tensor 'w': shape must be a list"),
    "size -0": (file_bytes({"w": entry(shape=("Z", 2), offsets=(0, 0))}).replace(b'"Z"', b" -0"), "'w': shape must"),
    "size true": (file_bytes({"w": entry(shape=(2, True))}), "tensor 'w': shape must be a list"),
    "size 2.0": (file_bytes({"w": entry(shape=(2.0,))}), "tensor 'w': shape must be a list"),
    "many dimensions": (file_bytes({"w": entry(shape=(2, *[1] * 70))}), "tensor 'w': shape must be a list of at most"),
    "product beyond 2^64": (file_bytes({"w": entry(shape=(2**62, 16))}), "'w': shape [4611686018427387904, 16] does"),
    "huge and empty": (file_bytes({"w": entry(shape=(0, 2**63), offsets=(0, 0))}, b""), "'w': shape [0, 92233"),
    "product that wraps to 8 bytes": (file_bytes({"w": entry(shape=(2**63 + 2,))}), "tensor 'w': shape"),
    "shape larger than range": (file_bytes({"w": entry(shape=(3,))}), "'w': F32 [3] takes 12 bytes, but"),
    "shape smaller than range": (file_bytes({"w": entry(shape=(1,))}), "'w': F32 [1] takes 4 bytes, but"),
    "one offset": (file_bytes({"w": entry(offsets=(0,))}), "tensor 'w': data_offsets must be [begin, end]"),
    "negative offset": (file_bytes({"w": entry(offsets=(-8, 0))}), "tensor 'w': data_offsets must be"),
    "backward offsets": (file_bytes({"w": entry(offsets=(8, 0))}), "tensor 'w': data_offsets must be"),
    "beyond the file": (
        file_bytes({"w": entry(offsets=(8, 16))}),
        "'w': lies at 8:16 of the data, but the file holds 8",
    ),
    "gap before the first": (
        file_bytes({"w": entry(offsets=(8, 16))}, bytes(16)),
        "'w': leaves a gap after the header",
    ),
    "gap between": (
        file_bytes({"v": entry(offsets=(0, 8)), "w": entry(offsets=(12, 20))}, bytes(20)),
        "'w': leaves a gap after tensor 'v': it starts at byte 12 of the data, where 8 is due",
    ),
    "overlap": (
        file_bytes({"w": entry(offsets=(4, 12)), "v": entry(offsets=(0, 8))}, bytes(12)),
        "'w': overlaps tensor 'v': it starts at byte 4 of the data, where 8 is due",
    ),
    "same bytes twice": (file_bytes({"v": entry(), "w": entry()}), "'w': overlaps tensor 'v'"),
    "empty tensor inside another": (
        file_bytes({"v": entry(), "w": entry(shape=(0,), offsets=(4, 4))}),
        "'w': overlaps tensor 'v'",
    ),
    "bytes left over": (file_bytes({"w": entry()}, bytes(9)), "1 bytes after tensor 'w' belong to no tensor"),
    "no tensors but data": (file_bytes({}), "8 bytes after the header belong to no tensor"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_by_name(tmp_path, case):
    content, message = HOSTILE[case]
    assert message in refusal(tmp_path / "hostile.safetensors", content)


def test_long_names_and_values_do_not_flood_the_message(tmp_path):
    name = "\x1b[2J" + "n" * 10**6
    message = refusal(tmp_path / "long.safetensors", file_bytes({name: entry("D" * 10**6)}))
    assert len(message) < 1000
    assert "\x1b" not in message


def test_header_beyond_the_limit_is_not_parsed(tmp_path, monkeypatch):
    content = file_bytes({"w": entry()})
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", len(content) - 8 - 8 - 1)
    length = len(content) - 16
    assert f"the header is {length} bytes long; at most {length - 1}" in refusal(tmp_path / "w.safetensors", content)


def test_truncation_at_every_byte_is_refused(tmp_path):
    content = file_bytes(HEADER, DATA)
    for length in range(len(content)):
        refusal(tmp_path / "short.safetensors", content[:length])


def test_file_that_shrinks_after_opening_is_an_error_not_a_crash(official_file):
    with SafetensorsFile(official_file) as ours:
        last = list(ours)[-1]
        os.truncate(official_file, ours.size - 1)
        with pytest.raises(CheckpointError, match=f"tensor '{last}': the file ends at byte {ours.size - 1}"):
            ours.read(last)


def test_only_regular_files_are_opened(tmp_path):
    missing, folder, pipe = (tmp_path / f"{name}.safetensors" for name in ("missing", "folder", "pipe"))
    folder.mkdir()
    os.mkfifo(pipe)
    messages = []

    def open_all():
        for path in (missing, folder, pipe):
            with pytest.raises(CheckpointError) as caught:
                SafetensorsFile(path)
            messages.append(str(caught.value))

    # Opening a pipe that nobody writes to would wait for ever.
    thread = threading.Thread(target=open_all, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert messages == [
        f"{missing}: cannot be opened: No such file or directory",
        f"{folder}: is not a regular file",
        f"{pipe}: is not a regular file",
    ]


@st.composite
def mutated_files(draw) -> bytes:
    """The file of HEADER and DATA with a few pieces of either replaced, removed or repeated."""
    header = HEADER
    pieces = [
        "0",
        "1",
        "2",
        "4",
        "16",
        "22",
        "-",
        "9" * 20,
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        " ",
        "null",
        "1.0",
        "e1",
    ]
    pieces += ['"a"', '"b"', "F32", "BF16", "F64", "U8", "BOOL", "\\u0061", "\\ud800", "é", "\0", '"x":1,', "[0],"]
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(header)))
        removed = draw(st.integers(0, 3))
        header = header[:place] + draw(st.sampled_from(["", *pieces])) + header[place + removed :]
    data = DATA[: draw(st.integers(0, len(DATA)))] if draw(st.integers(0, 9)) == 0 else DATA
    content = bytearray(file_bytes(header, data))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@st.composite
def generated_files(draw) -> bytes:
    """A whole file of random tensors in random order; half of them with one number of the header off by one."""
    header, position = {}, 0
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(module.DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        nbytes = math.prod(shape) * module.DTYPES[dtype].itemsize
        header[name] = entry(dtype, shape, (position, position + nbytes))
        position += nbytes
    header = dict(draw(st.permutations(list(header.items()))))
    if header and draw(st.booleans()):
        victim = header[draw(st.sampled_from(list(header)))]
        numbers = victim[draw(st.sampled_from([key for key in ("shape", "data_offsets") if victim[key]]))]
        numbers[draw(st.integers(0, len(numbers) - 1))] += draw(st.sampled_from([-1, 1]))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    return file_bytes(text + " " * draw(st.integers(0, 8)), draw(st.binary(min_size=position, max_size=position)))


@settings(max_examples=600)
@given(content=st.one_of(mutated_files(), generated_files()))
def test_mutated_file_is_refused_or_read_as_officially(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        ours = SafetensorsFile(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right
        return
    with ours:
        assert_same_as_official(ours)


def test_the_unmutated_file_is_read(tmp_path):
    """Or the property above would hold for a reader that refuses everything."""
    path = tmp_path / "plain.safetensors"
    path.write_bytes(file_bytes(HEADER, DATA))
    with SafetensorsFile(path) as ours:
        assert list(ours) == ["a", "b", "c", "d"]
        assert_same_as_official(ours)
