"""Checkpoints for the tests of the converter, written with the official safetensors library."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from idefics_common.configuration.fields import IdeficsFields, fields_from_dict
from idefics_common.parameters import expand
from tests.models import MATRIX, random_weights, small_config

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy_tf_tiny"
"""A checkpoint that transformers 4.57.6 wrote, as safetensors and as tf_model.h5."""

FORMATS = ("safetensors", "keras", "tf-h5", "bin")

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def small_fields(overrides: str = "base") -> tuple[dict, IdeficsFields]:
    """The content of a config.json, of a row of `MATRIX`, and the configuration that it is."""
    values = {**small_config(**MATRIX[overrides]), "model_type": "idefics", "torch_dtype": "float32"}
    return values, fields_from_dict(values)


def write_checkpoint(directory: Path, overrides: str = "base", dtype: str = "float32", seed: int = 0) -> dict:
    """Write a small checkpoint with random weights; returns the tensors by name, tied ones left out.

    Args:
        dtype: of all tensors; or "mixed", which is different ones in turn.
    """
    values, config = small_fields(overrides)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    weights = random_weights(config, seed)
    names = [parameter.name for parameter in expand(config) if parameter.tied_to is None]
    tensors = {name: weights[name].astype(_dtype(dtype, number)) for number, name in enumerate(names)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def read_all(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files of a directory, by the official library."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Same names, dtypes, shapes and bytes; the message names the first tensor that differs."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def _dtype(dtype: str, number: int) -> np.dtype:
    return DTYPES[dtype] if dtype != "mixed" else (*DTYPES.values(), np.dtype(np.float64))[number % 4]
