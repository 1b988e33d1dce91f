"""A to B to A gives identical bytes of every tensor: all pairs of formats, all dtypes, shards, and the whole matrix."""

import functools
import itertools
import time

import pytest

import conversion.working
from conversion import convert, verify
from conversion.streaming import Buffers
from tests.conversion.checkpoints import FORMATS, LEGACY, assert_same_tensors, read_all, write_checkpoint
from tests.models import MATRIX

PAIRS = list(itertools.product(FORMATS, FORMATS))
DTYPES = ("bfloat16", "mixed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_all_pairs_and_dtypes(tmp_path, first, second, dtype):
    """Safetensors to one format, to another, and back: bit by bit, each step verified and in shards of its own size."""
    tensors = write_checkpoint(tmp_path / "a", dtype=dtype)
    assert convert(tmp_path / "a", tmp_path / "b", to=first, workers=1).ok
    assert convert(tmp_path / "b", tmp_path / "c", to=second, max_shard_size="60KB").ok
    report = convert(tmp_path / "c", tmp_path / "d", to="safetensors", max_shard_size="90KB", workers=3)
    assert report.verdict.startswith("verified")
    assert len(report.files) > 1
    assert_same_tensors(read_all(tmp_path / "d"), tensors)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("overrides", MATRIX)
def test_the_whole_matrix(tmp_path, overrides, target):
    tensors = write_checkpoint(tmp_path / "a", overrides)
    assert convert(tmp_path / "a", tmp_path / "b", to=target, workers=1).ok
    assert convert(tmp_path / "b", tmp_path / "c", to="safetensors", workers=1).ok
    assert_same_tensors(read_all(tmp_path / "c"), tensors)
    assert verify(tmp_path / "a", tmp_path / "b").same


@pytest.mark.parametrize("block_bytes", [1, 1000])
@pytest.mark.parametrize(("first", "second"), [("keras", "tf-h5"), ("tf-h5", "keras"), ("bin", "safetensors")])
def test_blocks_smaller_than_tensors(tmp_path, monkeypatch, first, second, block_bytes):
    """Peak memory is bounded by going through tensors in blocks, down to one row; the values are the same."""
    tensors = write_checkpoint(tmp_path / "a", dtype="mixed")
    monkeypatch.setattr(conversion.working, "Buffers", functools.partial(Buffers, block_bytes))
    for source, target, name in (("a", "b", first), ("b", "c", second), ("c", "d", "safetensors")):
        assert convert(tmp_path / source, tmp_path / target, to=name, workers=1).ok
    assert_same_tensors(read_all(tmp_path / "d"), tensors)


@pytest.mark.parametrize("target", FORMATS)
def test_t1_a_legacy_file_loses_nothing(tmp_path, target):
    """transformers' own loader drops the vision tower's attention and MLP weights; all are recovered."""
    assert convert(LEGACY / "tf_model.h5", tmp_path / "b", to=target).ok
    assert verify(tmp_path / "b", LEGACY / "model.safetensors").same
    assert convert(tmp_path / "b", tmp_path / "c", to="safetensors").ok
    assert_same_tensors(read_all(tmp_path / "c"), read_all(LEGACY))


def test_the_same_output_every_time(tmp_path, checkpoint):
    """Files do not depend on the time, the run, the number of threads or the directory."""
    for name, workers in (("one", 1), ("two", 4)):
        for target in FORMATS:
            convert(checkpoint, tmp_path / target / name, to=target, max_shard_size="100KB", workers=workers)
        time.sleep(1.1)  # HDF5 can keep times, in seconds
    for target in FORMATS:
        one, two = tmp_path / target / "one", tmp_path / target / "two"
        names = {path.name for path in one.iterdir()} - {"conversion-report.json"}
        assert names == {path.name for path in two.iterdir()} - {"conversion-report.json"}
        for name in names:
            assert (one / name).read_bytes() == (two / name).read_bytes(), f"{target}: {name}"
