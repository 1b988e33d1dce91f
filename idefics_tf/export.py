"""SavedModels that a process with nothing but TensorFlow loads and runs: forward, image features, generated tokens.

Unusual: Keras's own export needs a model made of symbolic inputs. Here each signature is a function of named tensors,
as the processor makes them, with the sizes of batch, text and images left open; all signatures share one set of
weights.

Mirrors `idefics_pt/export.py` in purpose. Axes: see `idefics_common`.
"""

import os

import tensorflow as tf


class ExportMixin:
    """`export` for the IDEFICS models."""

    def export(self, filepath, format="tf_saved_model", verbose=None, *, image_size=None, generation=None):
        """Write a SavedModel for inference.

        Its signatures take and give dicts. Integer inputs are int64, `pixel_values` float32, as the processor's are:

        - "serving_default": `input_ids`, `attention_mask` (B, T), `pixel_values` (B, I, C, height, width),
          `image_attention_mask` (B, T, I), to `logits` (B, T, V), or `last_hidden_state` of a model without a head;
        - "text": the same without images;
        - "encode_images": `pixel_values` to `image_hidden_states`, see `encode_images`;
        - "generate", "generate_text", if `generation` is given: the same inputs to `sequences`, int64, with prompts.

        Args:
            filepath: directory to write.
            format: "tf_saved_model"; Keras has others, which hold no loop over tokens.
            verbose: whether to print where the files are; by default, not.
            image_size: height and width of images in pixels, if it is not the model's.
            generation: settings of `generate`, such as ``{"max_new_tokens": 20, "num_beams": 3}``; they are fixed in
                the file, and {} stands for the model's own.

        Raises:
            ValueError: for another format, settings that `generate` refuses, or `generation` without a head.
        """
        if format != "tf_saved_model":
            raise ValueError(f"export writes format 'tf_saved_model', got {format!r}.")
        if generation is not None and not self.has_head:
            raise ValueError("A model without a head cannot generate: export a TFIdeficsForVisionText2Text.")
        module = tf.Module()
        # keras.Variable is no part of a SavedModel, but the TensorFlow variable inside it is
        module.weights = [variable.value for variable in self.weights]
        signatures = _signatures(self, image_size, generation)
        tf.saved_model.save(module, os.fspath(filepath), signatures=signatures)
        if verbose:
            print(f"Saved signatures {', '.join(signatures)} at {filepath}.")


def _signatures(model, image_size, generation):
    vision = model.config.vision_config
    size = image_size or vision.image_size
    interpolated = {"interpolate_pos_encoding": True} if size != vision.image_size else {}
    text = {name: tf.TensorSpec((None, None), tf.int64, name) for name in ("input_ids", "attention_mask")}
    pixels = {"pixel_values": tf.TensorSpec((None, None, vision.num_channels, size, size), tf.float32, "pixel_values")}
    mask = {"image_attention_mask": tf.TensorSpec((None, None, None), tf.int64, "image_attention_mask")}
    output = "logits" if model.has_head else "last_hidden_state"

    def forward(**inputs):
        return {output: model(inputs, use_cache=False, **interpolated)[output]}

    def encode_images(pixel_values):
        return {"image_hidden_states": model.encode_images(pixel_values, **interpolated)}

    def generate(**inputs):
        settings = {**generation, "return_dict_in_generate": False}
        return {"sequences": model.generate(inputs, **interpolated, **settings)}

    wanted = {
        "serving_default": (forward, text | pixels | mask),
        "text": (forward, text),
        "encode_images": (encode_images, pixels),
    }
    if generation is not None:
        wanted |= {"generate": (generate, text | pixels | mask), "generate_text": (generate, text)}
    return {
        name: tf.function(function, autograph=False).get_concrete_function(**specs)
        for name, (function, specs) in wanted.items()
    }
