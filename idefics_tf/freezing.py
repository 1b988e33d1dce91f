"""Which parameters train: freezing as the configuration asks for it.

Unusual: the base vocabulary is frozen with the text layers, the additional one never; gated blocks and the resampler
always train. Variables are frozen one by one, not layers, because a frozen layer freezes all that it holds.

Mirrors `idefics_pt/freezing.py`.
"""

import keras

from idefics_common.configuration.fields import check_module_exceptions
from idefics_tf.layers import RMSNorm, sublayers

EXCEPTIONS = {
    "LayerNorm": (keras.layers.LayerNormalization, RMSNorm),
    "RMSNorm": (RMSNorm,),
    "Linear": (keras.layers.Dense,),
    "Embedding": (keras.layers.Embedding,),
}
"""What each name of `idefics_common.configuration.fields.MODULE_EXCEPTIONS` stands for."""


def freeze(layer: keras.layers.Layer, exceptions=()) -> None:
    """Freeze all variables of `layer` but those of the kinds of layer named in `exceptions`.

    Raises:
        ValueError: if a name is not one of `EXCEPTIONS`.
    """
    check_module_exceptions(exceptions, "exceptions")
    kept = tuple(kind for name in exceptions for kind in EXCEPTIONS[name])
    set_trainable(layer, False)
    for child in sublayers(layer):
        if isinstance(child, kept):
            set_trainable(child, True)


def set_trainable(layer: keras.layers.Layer, trainable: bool) -> None:
    """Let the variables of `layer` train, or not."""
    for variable in layer.weights:
        variable.trainable = trainable


def freeze_as_configured(model) -> None:
    """Freeze what the configuration of a `TFIdeficsModel` wants frozen; the rest is untouched."""
    config = model.config
    if config.freeze_text_layers:
        set_trainable(model.embed_tokens.base, False)
        model.freeze_text_layers(config.freeze_text_module_exceptions)
    if config.freeze_vision_layers:
        model.freeze_vision_layers(config.freeze_vision_module_exceptions)
