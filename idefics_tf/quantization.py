"""Linear layers in 8 bits, by Keras's own `Dense.quantize`: kernels int8, with a scale for each output.

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

import keras

from idefics_tf.layers import adapted_sublayers, sublayers


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


def quantize_linear_layers(model, mode: str, config) -> None:
    """See `TFIdeficsPreTrainedModel.quantize`."""
    if mode != "int8":
        raise ValueError(f"IDEFICS can be quantized to 'int8', got {mode!r}.")
    if quantization_config(model) is not None:
        raise ValueError("The model is quantized already.")
    if adapted_sublayers(model):
        raise ValueError("The model has LoRA adapters: call idefics_tf.lora.merge_adapters before quantizing.")
    decoder = model.model if model.has_head else model
    parts = [*decoder.decoder_layers, *decoder.gated_cross_attn_layers]
    if model.has_head and not model.lm_head.tied:
        parts.append(model.lm_head.base)
    with quick_deletion():
        for part in parts:
            for layer in linear_layers(part):
                layer.quantize(mode, config=config)


def quantization_config(model) -> keras.quantizers.QuantizationConfig | None:
    """What the linear layers of a model were quantized by; None if they were not."""
    return next((layer.quantization_config for layer in linear_layers(model) if layer.quantization_config), None)
