"""Small Keras models with the random weights that every room gets for the same configuration."""

from idefics_tf import IdeficsConfig, TFIdeficsForVisionText2Text
from idefics_tf.weights import weights_by_name
from tests.models import random_weights, small_config


def tf_model(seed=0, dtype=None, model_class=TFIdeficsForVisionText2Text, **overrides):
    """A small model with random weights; the arguments are those of `tests.pt.pairs.our_model`."""
    config = IdeficsConfig(**small_config(**overrides))
    model = model_class(config, dtype=dtype)
    arrays = random_weights(config, seed)
    for name, weight in weights_by_name(model).items():
        weight.variable.assign(weight.layout.apply(arrays[name]))
    return model


def canonical(model) -> dict:
    """The weights of a model as numpy arrays in canonical names and layout."""
    return {name: weight.layout.inverse(weight.variable.numpy()) for name, weight in weights_by_name(model).items()}
