"""How tensors are cut into files: sizes, which go together, and names."""

from types import SimpleNamespace

import pytest

from idefics_common.checkpoint.sharding import parse_size, shard_names, split_into_shards


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("5GB", 5 * 10**9), ("200 MiB", 200 * 2**20), ("1kb", 1000), ("3GiB", 3 * 2**30)]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "x", "1.5GB", "-5", "0", 0, -1, "0GB", "²GB", "7", "GB", "5TBs"])
def test_sizes_that_are_none(size):
    """A number without a unit is bytes, and no string: "5" is more likely to be meant as gigabytes."""
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of bytes or a string such as '5GB'"):
        parse_size(size)


def test_shards_are_filled_in_order():
    sizes = {"t0": 12, "t1": 12, "t2": 36, "t3": 4, "t4": 4, "t5": 4, "t6": 16}
    assert split_into_shards(sizes, 16, sizes.get) == [["t0"], ["t1"], ["t2"], ["t3", "t4", "t5"], ["t6"]]
    tensors = [SimpleNamespace(nbytes=nbytes) for nbytes in sizes.values()]
    assert split_into_shards(tensors, 10**9) == [tensors]


def test_names_are_those_of_transformers():
    assert shard_names("model", ".safetensors", 1) == ["model.safetensors"]
    assert shard_names("tf_model", ".h5", 2) == ["tf_model-00001-of-00002.h5", "tf_model-00002-of-00002.h5"]
