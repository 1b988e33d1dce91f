"""Linear layers in 8 or 4 bits, by Keras's own `Dense.quantize`: integer kernels, with scales.

Quantized are the layers that text runs through: decoder layers, gated blocks and the head, nine tenths of the published
models. The vision tower and the resampler are not: on the shipped checkpoint they would make the error of the logits
1.6 times as large. Nor are the head of the added vocabulary, a few rows that go on training, and embeddings, whose
matrices a tied head would read without their scales.

Keras collects garbage for every variable that is taken from a layer, half a second each in a process that has also
imported torch. Nothing needs that, so collections are made cheap meanwhile (`quick_deletion`).

Mirrors `idefics_pt/cpu/int8.py`.
"""

import contextlib
import gc
import re

import keras

from idefics_tf.layers import adapted_sublayers, named_sublayers, sublayers


@contextlib.contextmanager
def quick_deletion():
    """Make garbage collections cheap: within, they search only objects that are made there.

    Objects that were frozen by `gc.freeze` before are not any more afterwards.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def linear_layers(layer) -> list[keras.layers.Dense]:
    """All linear layers inside a layer or model, or the layer itself."""
    return [inner for inner in sublayers(layer) if isinstance(inner, keras.layers.Dense)]


MODES = ("int8", "int4", "float8")
"""What of Keras's modes there is here. The others, gptq and awq, quantize a layer for the data that it gets."""


def quantizable_layers(model) -> dict[str, keras.layers.Dense]:
    """The linear layers that can be quantized, by their path inside the model."""
    decoder = model.model if model.has_head else model
    parts = [*decoder.decoder_layers, *decoder.gated_cross_attn_layers]
    if model.has_head and not model.lm_head.tied:
        parts.append(model.lm_head.base)
    inside = {id(layer) for part in parts for layer in linear_layers(part)}
    return {path: layer for path, layer in named_sublayers(model) if id(layer) in inside}


def quantize_linear_layers(model, mode: str, config, filters, type_check: bool) -> None:
    """See `TFIdeficsPreTrainedModel.quantize`."""
    if mode not in MODES:
        raise ValueError(f"IDEFICS can be quantized to {', '.join(MODES)}; got mode {mode!r}.")
    if quantized_layers(model):
        raise ValueError("The model is quantized already.")
    if adapted_sublayers(model):
        raise ValueError("The model has LoRA adapters: call idefics_tf.lora.merge_adapters before quantizing.")
    layers = [layer for layer in quantizable_layers(model).values() if _passes(layer, filters)]
    if not layers:
        names = sorted({layer.name for layer in quantizable_layers(model).values()})
        raise ValueError(f"filters={filters!r} lets no layer pass; names are {', '.join(names)}.")
    with quick_deletion():
        for layer in layers:
            layer.quantize(mode, config=config, type_check=type_check)


def _passes(layer, filters) -> bool:
    if filters is None:
        return True
    if callable(filters):
        return bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"filters must be a regular expression, a list of them, or a callable; got {filters!r}.")
    return any(re.search(pattern, layer.name) for pattern in patterns)


def quantized_layers(model) -> dict[str, keras.layers.Layer]:
    """The layers that are quantized, by their path inside the model; embeddings too, where users have done that."""
    return {path: layer for path, layer in named_sublayers(model) if getattr(layer, "quantization_config", None)}
