"""Sizes and shards, and archives larger than 4 GB, which are laid out without a value being written."""

import zipfile

import numpy as np
import pytest

from conversion import ConversionError
from conversion.formats import format_of
from conversion.formats.base import Output
from conversion.plan import parse_size, split
from idefics_common.checkpoint import TorchBinFile
from idefics_common.parameters import Kind, Parameter, Part
from idefics_common.parameters.layouts import IDENTITY
from tests.requirements import needs_torch


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("200 MiB", 200 * 2**20), ("1kb", 1000), ("3GiB", 3 * 2**30)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "x", "1.5GB", "-5", "0", 0, "²GB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ConversionError, match="a size must be a positive number"):
        parse_size(size)


def output(name: str, *shape: int) -> Output:
    parameter = Parameter(name, shape, Kind.RAW, Part.DECODER, name, name, name)
    return Output(parameter, name, IDENTITY, np.dtype(np.float32))


def test_shards_are_filled_in_order():
    outputs = [output(f"t{i}", size) for i, size in enumerate([3, 3, 9, 1, 1, 1, 4])]
    shards = split(outputs, 16)
    assert [[one.name for one in shard] for shard in shards] == [["t0"], ["t1"], ["t2"], ["t3", "t4", "t5"], ["t6"]]
    assert split(outputs, 10**9) == (tuple(outputs),)


@needs_torch
def test_archives_above_4_gb(tmp_path):
    """Records too long for 32 bits, and records that start behind them, as torch and zipfile read them."""
    import torch

    outputs = [output("a", 5), output("b", 2**30 + 3, 2), output("c", 2, 3)]
    format = format_of("bin")
    places = format.lay_out(tmp_path, [outputs])
    checksums = {"a": 1, "b": 2, "c": 3}
    format.finish(tmp_path, [outputs], places, checksums)
    path = tmp_path / "pytorch_model.bin"
    with open(path, "r+b") as file:
        file.seek(places["c"].offset)
        file.write(np.arange(6, dtype=np.float32).data)
    assert places["c"].offset > 2**33
    with zipfile.ZipFile(path) as archive:
        assert [entry.CRC for entry in archive.infolist() if "/data/" in entry.filename] == [1, 2, 3]
    state = torch.load(path, mmap=True, weights_only=True)
    assert state["b"].shape == (2**30 + 3, 2)
    np.testing.assert_array_equal(state["c"], [[0, 1, 2], [3, 4, 5]])
    with TorchBinFile(path) as file:
        assert {name: file.info(name).offset for name in file} == {name: place.offset for name, place in places.items()}
