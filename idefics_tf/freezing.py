"""Which parameters train: by Keras's own flag `trainable`, of layers, and of variables where a layer's parts differ.

Unusual: the base vocabulary is frozen with the text layers, the additional one never; gated blocks and the resampler
always train. A frozen layer freezes all that it holds, so one that holds something that trains is trainable, and what
is frozen in it has flags of its own.

What trains is part of a model's configuration (`trainability`), whoever has set it.

Mirrors `idefics_pt/freezing.py`.
"""

from collections.abc import Iterable

import keras

from idefics_common.configuration.fields import check_module_exceptions
from idefics_tf.layers import RMSNorm, below, children, named_sublayers, sublayers

EXCEPTIONS = {
    "LayerNorm": (keras.layers.LayerNormalization, RMSNorm),
    "RMSNorm": (RMSNorm,),
    "Linear": (keras.layers.Dense,),
    "Embedding": (keras.layers.Embedding,),
}
"""What each name of `idefics_common.configuration.fields.MODULE_EXCEPTIONS` stands for."""


def freeze(layer: keras.layers.Layer, exceptions=()) -> None:
    """Freeze all variables of `layer` but those of the kinds of layer named in `exceptions`.

    Of a layer that has adapters or is quantized, what can train does: not the matrix that adapters are for.

    Raises:
        ValueError: if a name is not one of `EXCEPTIONS`.
    """
    check_module_exceptions(exceptions, "exceptions")
    kept = tuple(kind for name in exceptions for kind in EXCEPTIONS[name])
    exempt = [inner for inner in sublayers(layer) if isinstance(inner, kept)]
    for inner in exempt:
        inner.trainable = True
    train_only(layer, [weight for inner in exempt for weight in inner.trainable_weights])


def train_only(layer: keras.layers.Layer, weights: Iterable[keras.Variable]) -> None:
    """Let these variables of `layer` train, and no others."""
    _train_only(layer, {id(weight) for weight in weights})


def _train_only(layer, wanted: set[int]) -> None:
    layer.trainable = any(id(weight) in wanted for weight in layer.weights)
    if layer.trainable:
        for weight in own_weights(layer):
            weight.trainable = id(weight) in wanted
        for child in children(layer):
            _train_only(child, wanted)


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer that are of no layer inside it."""
    inside = {id(weight) for child in children(layer) for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in inside]


def freeze_as_configured(model) -> None:
    """Freeze what the configuration of a `TFIdeficsModel` wants frozen; the rest is untouched."""
    config = model.config
    if config.freeze_text_layers:
        freeze_base(model.embed_tokens)
        model.freeze_text_layers(config.freeze_text_module_exceptions)
    if config.freeze_vision_layers:
        model.freeze_vision_layers(config.freeze_vision_module_exceptions)


def freeze_base(vocabulary) -> None:
    """Freeze the base matrix of a `DecoupledEmbedding` or a `DecoupledLinear`: the layer, if there is no other."""
    layer = vocabulary if len(list(children(vocabulary))) == 1 else vocabulary.base
    layer.trainable = False


def trainability(layer: keras.layers.Layer, path: str = "", inherited: bool = True) -> dict[str, bool]:
    """Which layers and variables inside `layer` differ, in whether they train, from what holds them; by path.

    A path is made of names of layers, below `layer`, whose own is "", and of a variable.
    """
    flags = {} if layer.trainable == inherited else {path: layer.trainable}
    for weight in own_weights(layer):
        if weight.trainable != layer.trainable:
            flags[below(path, weight)] = weight.trainable
    for child in children(layer):
        flags |= trainability(child, below(path, child), layer.trainable)
    return flags


def set_trainability(layer: keras.layers.Layer, flags: dict[str, bool], path: str = "", inherited: bool = True) -> None:
    """Let train in `layer` what `trainability` has said of another layer of the same kind."""
    layer.trainable = flags.get(path, inherited)
    for weight in own_weights(layer):
        trains = flags.get(below(path, weight), layer.trainable)
        if weight.trainable != trains:
            weight.trainable = trains
    for child in children(layer):
        set_trainability(child, flags, below(path, child), layer.trainable)


def weights_by_path(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """All variables of a layer by paths as in `trainability`; Keras's own are short for what a layer got later."""
    return {below(path, weight): weight for path, inner in named_sublayers(layer) for weight in own_weights(inner)}
