"""What is relied on of `torch.serialization.skip_data`, for archives of any size; and what happens without torch."""

import sys
import zipfile

import numpy as np
import pytest

from conversion import convert
from conversion.formats import format_of
from conversion.formats.base import Output
from idefics_common.checkpoint import CheckpointError, TorchBinFile
from idefics_common.parameters import Kind, Parameter, Part
from idefics_common.parameters.layouts import IDENTITY
from tests.requirements import needs_torch


def output(name: str, *shape: int) -> Output:
    parameter = Parameter(name, shape, Kind.RAW, Part.DECODER, name, name, name)
    return Output(parameter, name, IDENTITY, np.dtype(np.float32))


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


def test_torch_is_asked_for_before_anything_is_written(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "torch", None)
    for options in ({}, {"verify": "none"}, {"dry_run": True}):
        with pytest.raises(
            CheckpointError,
            match=r"out/pytorch_model\.bin: .* needs torch, .* pip install 'idefics\[pt\]'",
        ):
            convert(checkpoint, tmp_path / "out", to="bin", **options)
        assert list(tmp_path.iterdir()) == []


@needs_torch
def test_finishing_twice_changes_nothing(tmp_path):
    """A run that was killed while it wrote checksums goes on from a file that has some of them."""
    outputs, format = [output("a", 5), output("b", 3, 2)], format_of("bin")
    places = format.lay_out(tmp_path, [outputs])
    path = tmp_path / "pytorch_model.bin"
    format.finish(tmp_path, [outputs], places, {"a": 1, "b": 0})
    format.finish(tmp_path, [outputs], places, {"a": 1, "b": 2})
    once = path.read_bytes()
    format.finish(tmp_path, [outputs], places, {"a": 1, "b": 2})
    assert path.read_bytes() == once
    # in the directory at the end, and after each record
    assert once.count((1).to_bytes(4, "little") + (20).to_bytes(4, "little")) == 2
    assert once.count((2).to_bytes(4, "little") + (24).to_bytes(4, "little")) == 2
