"""Linear layers in 8 bits, by Keras's own `Dense.quantize`: kernels int8, with a scale for each output.

Unusual: Keras collects garbage whenever a variable is taken from a layer, so that quantizing takes as many collections
as there are linear layers, half a second each in a process that has also imported torch. Nothing needs them, since a
variable's memory is freed with its last reference; here they see new objects alone, and take no time.

What is quantized is what text runs through: decoder layers, gated blocks and the head, nine tenths of the published
models. The vision tower and the resampler are left as they are: on the shipped checkpoint they would make the error of
the logits 1.6 times as large. So are the head of the added vocabulary, a few rows that go on training, and embeddings,
whose matrices a tied head reads directly; Keras would give them out without their scales.

Mirrors `idefics_pt/cpu/int8.py`.
"""

import contextlib
import gc

import keras

from idefics_tf.layers import sublayers


@contextlib.contextmanager
def quick_deletion():
    """Within, garbage collections look at nothing that was there before.

    What had been frozen by `gc.freeze` is not any more, afterwards.
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
    if any(layer.lora_enabled for layer in linear_layers(model)):
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
