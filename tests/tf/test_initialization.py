"""Initial values of the Keras room's variables, and that loading a checkpoint makes none."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from idefics_tf import IdeficsConfig, TFIdeficsForVisionText2Text
from idefics_tf.initialization import Normal, values_follow
from tests.models import small_config
from tests.tf.random_models import tf_model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory in the home format, not to be changed."""
    directory = tmp_path_factory.mktemp("home") / "model"
    tf_model().save_pretrained(directory)
    return directory


def test_initial_values():
    values = np.array(Normal(0.5, zero_row=3)((200, 50)))
    assert not values[3].any()
    assert values[4:].std() == pytest.approx(0.5, rel=0.05)
    assert abs(values.mean()) < 0.02


def test_loading_computes_no_initial_values(home, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an initial value was computed")

    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", refuse)
    TFIdeficsForVisionText2Text.from_pretrained(home)
    with pytest.raises(AssertionError, match="an initial value was computed"):
        TFIdeficsForVisionText2Text(IdeficsConfig(**small_config()))


def test_loading_makes_few_kinds_of_variables(home):
    """TensorFlow's names are short, for its sake; Keras's are those of any model."""
    model = tf_model()
    loaded = TFIdeficsForVisionText2Text.from_pretrained(home, name=model.name)
    assert [variable.path for variable in loaded.weights] == [variable.path for variable in model.weights]
    assert {variable.value.name for variable in loaded.weights} == {f"{variable.name}:0" for variable in model.weights}


def test_variables_without_a_name_can_be_made_while_loading():
    with values_follow():
        assert tf.Variable(1.0).numpy() == 1.0
