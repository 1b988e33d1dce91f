"""Small layers of the Keras room: what they refuse, and how they start."""

import numpy as np
import pytest
import tensorflow as tf

from idefics_common import config_fields
from idefics_tf import IdeficsConfig, freezing, layers
from idefics_tf.initialization import Normal
from idefics_tf.rotary import RotaryEmbedding
from tests.models import small_config


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
    with pytest.raises(ValueError, match=r"hidden_act must be one of gelu, .*; got 'mish'"):
        layers.activation("mish")
    config = IdeficsConfig(**small_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(ValueError, match="rope_type must be one of default, linear, llama3 in Keras; got 'yarn'"):
        RotaryEmbedding(config)


def test_initial_values():
    values = np.array(Normal(0.5, zero_row=3)((200, 50)))
    assert not values[3].any()
    assert values[4:].std() == pytest.approx(0.5, rel=0.05)
    assert abs(values.mean()) < 0.02
