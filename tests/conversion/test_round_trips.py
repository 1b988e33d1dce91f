"""A to B to A gives identical bytes of every tensor: all pairs of formats, all dtypes, shards, and the whole matrix."""

import functools
import importlib.util
import itertools
import time

import pytest
from safetensors.numpy import save_file

import conversion.threads
from conversion import convert, inspect, verify
from conversion.streaming import Buffers
from idefics_common.checkpoint import CheckpointError
from tests.conversion.checkpoints import FORMATS, LEGACY, assert_same_tensors, read_all, write_checkpoint
from tests.models import MATRIX

PAIRS = list(itertools.product(FORMATS, FORMATS))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_all_pairs_and_dtypes(tmp_path, first, second):
    """Safetensors to one format, to another, and back: bit by bit, each step verified and in shards of its own size.

    The tensors of a checkpoint have all dtypes in turn.
    """
    tensors = write_checkpoint(tmp_path / "a", dtype="mixed")
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
    monkeypatch.setattr(conversion.threads, "Buffers", functools.partial(Buffers, block_bytes))
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


def write_base_model(directory, overrides):
    """What `IdeficsModel.save_pretrained` writes: no head, and names without "model."."""
    tensors = write_checkpoint(directory, overrides)
    tensors = {name.removeprefix("model."): array for name, array in tensors.items() if not name.startswith("lm_head.")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_model_without_its_language_head(tmp_path, target, shard_size):
    tensors = write_base_model(tmp_path / "a", "base")
    assert convert(tmp_path / "a", tmp_path / "b", to=target, max_shard_size=shard_size, workers=1).ok
    assert any("without its language head" in note for note in inspect(tmp_path / "b").notes)
    assert convert(tmp_path / "b", tmp_path / "c", to="safetensors", workers=1).ok
    assert_same_tensors(read_all(tmp_path / "c"), tensors)


def test_a_head_that_is_gone_is_missed(tmp_path):
    """Names that start with "model." are those of a model with a head."""
    tensors = write_checkpoint(tmp_path / "a")
    del tensors["lm_head.weight"], tensors["lm_head.additional_fc.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"- lm_head\.weight"):
        convert(tmp_path / "a", tmp_path / "b", to="keras")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, checkpoint):
    """A checkpoint in each format, written at least a second ago: HDF5 can keep times, in seconds."""
    directory = tmp_path_factory.mktemp("earlier")
    for target in FORMATS:
        if target != "bin" or importlib.util.find_spec("torch"):
            convert(checkpoint, directory / target, to=target, max_shard_size="100KB", workers=1)
    time.sleep(1.1)
    return directory


@pytest.mark.parametrize("target", FORMATS)
def test_the_same_output_every_time(tmp_path, checkpoint, earlier, target):
    """Files do not depend on the time, the run, the number of threads or the directory."""
    one, two = earlier / target, tmp_path / "two"
    convert(checkpoint, two, to=target, max_shard_size="100KB", workers=4)
    names = {path.name for path in one.iterdir()} - {"conversion-report.json"}
    assert names == {path.name for path in two.iterdir()} - {"conversion-report.json"}
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
