"""Small layers of the Keras room: what they refuse, and that they give what Keras's own give."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from idefics_common.configuration import fields as config_fields
from idefics_tf import IdeficsConfig, TFIdeficsModel, freezing, layers
from idefics_tf.rotary import RotaryEmbedding
from tests.models import small_config
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.mark.parametrize("additional", [0, 3])
@pytest.mark.parametrize("wrong", [-1, 13])
def test_ids_of_no_vocabulary_are_refused_in_graphs_too(additional, wrong):
    layer = layers.DecoupledEmbedding(10, additional, 4, initializer_range=0.02)
    ids = np.array([[0, 9 + additional]])
    assert np.array_equal(tf.function(layer)(ids), layer(ids))
    with pytest.raises(ValueError, match=rf"must lie in \[0, {10 + additional}\).*got ids from"):
        layer(ids * 0 + wrong)
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not in"):
        tf.function(layer)(ids * 0 + wrong)


def test_names_of_a_configuration_are_known_or_refused():
    assert tuple(layers.ACTIVATIONS) == config_fields.ACTIVATIONS
    assert tuple(freezing.EXCEPTIONS) == config_fields.MODULE_EXCEPTIONS
    with pytest.raises(ValueError, match=r"hidden_act must be one of gelu, .*; got 'xielu'"):
        TFIdeficsModel(IdeficsConfig(**small_config(hidden_act="xielu")))
    config = IdeficsConfig(**small_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(ValueError, match="rope_type must be one of default, linear, llama3 in Keras; got 'yarn'"):
        RotaryEmbedding(config)


def assert_same_but_for_the_last_digit(actual, expected):
    error = relative_error(tf.cast(actual, "float32"), tf.cast(expected, "float32"))
    assert error <= max(float(ml_dtypes.finfo(expected.dtype.name).eps), FLOAT32_ACTIVATIONS)


class Shifted(keras.layers.Dense):
    """A linear layer with something of its own to do."""

    def call(self, x):
        return super().call(x) + 100


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "bias", "adapter", "int8", "activation", "subclass"])
def test_projecting_gives_what_the_layer_gives(kind, policy):
    activation = "relu" if kind == "activation" else None
    layer = (Shifted if kind == "subclass" else keras.layers.Dense)(
        5, activation, use_bias=kind == "bias", bias_initializer="random_normal", dtype=policy
    )
    layer.build((None, 4))
    if kind == "adapter":
        layer.enable_lora(2, b_initializer="random_normal")
    if kind == "int8":
        layer.quantize("int8")
    x = tf.cast(keras.random.normal((2, 3, 4), seed=0), layer.compute_dtype)
    expected = layer(x)
    projected = layers.project(layer, x)
    assert (projected.shape, projected.dtype) == (expected.shape, expected.dtype)
    assert_same_but_for_the_last_digit(projected, expected)
    open_sizes = tf.function(
        lambda x: layers.project(layer, x), input_signature=[tf.TensorSpec((None, None, 4), x.dtype)]
    )
    assert_same_but_for_the_last_digit(open_sizes(x), expected)


@pytest.mark.parametrize("own", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_projecting_keeps_a_layers_own_precision(given, own):
    layer = keras.layers.Dense(5, dtype=own)
    layer.build((None, 4))
    x = tf.cast(keras.random.normal((2, 3, 4), seed=0), given)

    class Caller(keras.layers.Layer):
        """Casts what its sublayers read, as layers in half precision do."""

        def __init__(self, multiply, **kwargs):
            super().__init__(**kwargs)
            self.multiply = multiply

        def call(self, _):
            return self.multiply(x)

    for caller in ("float32", "mixed_bfloat16"):
        expected = Caller(layer, dtype=caller)(x)
        projected = Caller(lambda x: layers.project(layer, x), dtype=caller)(x)
        assert projected.dtype == expected.dtype == layer.compute_dtype
        assert_same_but_for_the_last_digit(projected, expected)


def test_projecting_builds_a_layer():
    layer, x = keras.layers.Dense(5), tf.ones((2, 3, 4))
    projected = layers.project(layer, x)
    assert_same_but_for_the_last_digit(projected, layer(x))


def test_projecting_adds_a_layers_losses():
    layer = keras.layers.Dense(5, activity_regularizer="l2")
    layer.build((None, 4))
    layers.project(layer, tf.ones((2, 3, 4)))
    assert len(layer.losses) == 1


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "float16"])
def test_a_layer_norm_is_that_of_keras(policy):
    ours = layers.LayerNorm(16, 1e-2, dtype=policy)
    theirs = keras.layers.LayerNormalization(epsilon=1e-2, dtype=policy)
    x = tf.cast(3 + keras.random.normal((2, 3, 16), seed=0), ours.compute_dtype)
    for layer in (ours, theirs):
        layer.build((None, 16))
        layer.gamma.assign(keras.random.normal((16,), seed=1))
        layer.beta.assign(keras.random.normal((16,), seed=2))
    normed, expected = ours(x), theirs(x)
    assert normed.dtype == expected.dtype
    assert_same_but_for_the_last_digit(normed, expected)
