"""The streaming writer against the safetensors package and our own reader."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from idefics_common.checkpoint import SafetensorsFile
from idefics_common.checkpoint.safetensors_writer import TensorToWrite, write_safetensors

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def tensors(dtype):
    generator = np.random.default_rng(0)
    arrays = {
        "odd.name-ü": generator.standard_normal((3, 5)).astype(dtype),
        "transposed": generator.standard_normal((4, 2)).astype(dtype).T,
        "scalar": np.array(1.5, dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    return arrays, {
        name: TensorToWrite(array.dtype, array.shape, lambda array=array: array) for name, array in arrays.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_back_by_both_readers(dtype, tmp_path):
    arrays, entries = tensors(dtype)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, entries)
    theirs = safetensors.numpy.load_file(path)
    with SafetensorsFile(path) as ours:
        assert set(ours) == set(theirs) == set(arrays)
        for name, array in arrays.items():
            assert ours.read(name).tobytes() == theirs[name].tobytes() == np.ascontiguousarray(array).tobytes()
            assert ours.info(name).shape == theirs[name].shape == array.shape
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_failure_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors(np.float32)[1])
    before = path.read_bytes()
    wrong = TensorToWrite(np.dtype(np.float32), (2,), lambda: np.zeros(2, np.float16))
    with pytest.raises(ValueError, match="tensor 'wrong': expected float32 values, got float16"):
        write_safetensors(path, {"wrong": wrong})
    with pytest.raises(ValueError, match="tensor 'wrong': int64 cannot be written"):
        write_safetensors(path, {"wrong": TensorToWrite(np.dtype(np.int64), (2,), lambda: np.zeros(2, np.int64))})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
