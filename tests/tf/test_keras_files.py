"""C3: `from_pretrained` takes a directory with Keras's own weights, and is as strict with it as with safetensors."""

import h5py
import keras
import numpy as np
import pytest

from conversion import convert
from idefics_common.checkpoint import CheckpointError
from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
from tests.models import MATRIX, batch
from tests.tf.random_models import canonical, tf_model


def saved_by_keras(model, directory, max_shard_size=None):
    """A directory with what `save_weights` of a model that has trained writes."""
    model.config.save_pretrained(directory)
    name = "model.weights.h5" if max_shard_size is None else "model.weights.json"
    model.save_weights(directory / name, max_shard_size=max_shard_size)
    return directory


def assert_same_weights(model, expected):
    """Bit by bit, in the dtypes of `expected`."""
    found, wanted = canonical(model), canonical(expected)
    assert list(found) == list(wanted)
    assert [name for name in wanted if found[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not np.array_equal(found[name], wanted[name])] == []


@pytest.mark.parametrize(
    ("variant", "model_class", "dtype", "max_shard_size"),
    [
        ("base", TFIdeficsForVisionText2Text, "float32", None),
        ("base", TFIdeficsForVisionText2Text, "bfloat16", 5e-5),
        ("tied", TFIdeficsForVisionText2Text, "float32", 5e-5),
        ("vector_alphas", TFIdeficsModel, "float16", None),
    ],
)
def test_what_keras_saved_loads(tmp_path, variant, model_class, dtype, max_shard_size):
    model = tf_model(dtype=dtype, model_class=model_class, **MATRIX[variant])
    directory = saved_by_keras(model, tmp_path, max_shard_size)
    assert len(list(directory.glob("*.h5"))) > 1 or max_shard_size is None
    assert_same_weights(model_class.from_pretrained(directory), model)


def test_what_the_converter_wrote_loads(tmp_path):
    """With its settings of generation; and in another dtype, as the home format does."""
    model = tf_model()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "home")
    assert convert(tmp_path / "home", tmp_path / "keras", to="keras", max_shard_size="100KB").ok
    again = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "keras")
    assert_same_weights(again, model)
    assert again.generation_config.max_new_tokens == 7
    home = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "home", dtype="bfloat16")
    assert_same_weights(TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "keras", dtype="bfloat16"), home)


def test_the_state_of_training_is_left_aside(tmp_path):
    model = tf_model(num_hidden_layers=2)
    inputs = batch(model.config)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    model.fit({**inputs, "labels": inputs["input_ids"]}, batch_size=len(inputs["input_ids"]), verbose=0)
    directory = saved_by_keras(model, tmp_path)
    with h5py.File(directory / "model.weights.h5") as file:
        assert "optimizer" in file
    assert_same_weights(TFIdeficsForVisionText2Text.from_pretrained(directory), model)


def test_the_home_format_comes_first(tmp_path):
    first, second = tf_model(num_hidden_layers=2), tf_model(seed=1, num_hidden_layers=2)
    first.save_pretrained(tmp_path)
    second.save_weights(tmp_path / "model.weights.h5")
    assert_same_weights(TFIdeficsForVisionText2Text.from_pretrained(tmp_path), first)


TENSOR = "layers/tf_idefics_model/layers/perceiver_resampler/vars/0"


def _lose(file):
    del file[TENSOR]


def _add(file):
    file["layers/tf_idefics_model/other/vars/0"] = np.zeros(2, "f4")


def _reshape(file):
    del file[TENSOR]
    file[TENSOR] = np.zeros((2, 3), "f4")


@pytest.mark.parametrize(
    ("damage", "named"),
    [(_lose, f"- {TENSOR}"), (_add, "+ 'layers/tf_idefics_model/other/vars/0' (2,)"), (_reshape, f"! {TENSOR}")],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, damage, named):
    directory = saved_by_keras(tf_model(num_hidden_layers=2), tmp_path)
    with h5py.File(directory / "model.weights.h5", "r+") as file:
        assert TENSOR in file
        damage(file)
    with pytest.raises(CheckpointError, match="tensors are not as expected: 1 ") as raised:
        TFIdeficsForVisionText2Text.from_pretrained(directory)
    assert named in str(raised.value)
