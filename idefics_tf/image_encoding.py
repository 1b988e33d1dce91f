"""From images to the states that text attends to, through the vision tower and the resampler.

Unusual: an image that no position of its row may see (padding, or the zero image of a text-only row) is not encoded;
its states are zero. In a graph, too: there the number of encoded images is only known when it runs.

Mirrors `idefics_pt/image_encoding.py`. Axes: see `idefics_common`.
"""

import tensorflow as tf
from keras import ops

from idefics_common.calls.images import tokens_per_image
from idefics_tf.layers import sizes


def encode_images(
    model, name: str, images, seen_BI, interpolate_pos_encoding=False, output_attentions=False, training=False
):
    """Take images the rest of the way from the form in which they were given.

    Args:
        model: a `TFIdeficsModel`. name: of the argument by which the images came.
        images: (B, I, ...). seen_BI: boolean, which of them to encode; None for all.

    Returns:
        states (B, I, L or P, E), zero where not seen; and the attention weights of the image modules by the name of
        the output, empty if they are not asked for, or None if no image went through a module.
    """
    attentions = {}

    def encode(flat):
        if name == "pixel_values":
            vision = model.vision_model(
                flat, interpolate_pos_encoding=interpolate_pos_encoding, output_attentions=output_attentions
            )
            flat, attentions["vision_attentions"] = vision.last_hidden_state, vision.attentions
        if name != "perceiver_embeddings" and model.config.use_resampler:
            flat, attentions["perceiver_attentions"] = model.perceiver_resampler(flat)
        return flat

    images = ops.cast(images, model.compute_dtype)
    states_BILE = _encode_seen(encode, images, seen_BI, keep_one=training)
    if states_BILE is None:
        tokens, width = tokens_per_image(name, images.shape, model.config), model.config.vision_config.embed_dim
        return ops.zeros((*sizes(images)[:2], tokens, width), dtype=model.compute_dtype), None
    return states_BILE, attentions if output_attentions else {}


def _encode_seen(encode, images, seen_BI, keep_one: bool):
    """Run `encode` on the images that are seen, and put its results in their places among zeros.

    Args:
        encode: from (images, ...) to (images, L, E).
        images: (B, I, ...).
        seen_BI: boolean, or None to encode all.
        keep_one: return states also if nothing is seen, for training, where every variable should have a gradient.

    Returns:
        (B, I, L, E), zero where not seen, or, in eager execution, None if nothing is seen at all.
    """
    rows, num_images = sizes(images)[:2]
    flat = ops.reshape(images, (-1, *images.shape[2:]))
    chosen = None if seen_BI is None else tf.where(ops.reshape(seen_BI, (-1,)))
    if chosen is not None and tf.executing_eagerly():
        if len(chosen) == 0 and not keep_one:
            return None
        if len(chosen) == len(flat):
            chosen = None
    states = encode(flat if chosen is None else tf.gather_nd(flat, chosen))
    tokens, width = sizes(states)[1:]
    if chosen is not None:
        shape = tf.stack((sizes(flat)[0], tokens, width))
        states = tf.scatter_nd(chosen, states, tf.cast(shape, chosen.dtype))
    return ops.reshape(states, (rows, num_images, tokens, width))
