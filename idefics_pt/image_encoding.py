"""From images to the states that text attends to, through the vision tower and the resampler.

Unusual: an image that no position of its row may see (padding, or the zero image of a text-only row) is not encoded;
its states are zero.

Mirrors `idefics_tf/image_encoding.py`. Axes: see `idefics_common`.
"""

import torch

from idefics_common.calls.images import tokens_per_image


def encode_images(model, name: str, images, seen_BI, interpolate_pos_encoding=False):
    """Take images the rest of the way from the form in which they were given.

    Args:
        model: an `IdeficsModel`. name: of the argument by which the images came.
        images: (B, I, ...). seen_BI: boolean, which of them to encode; None for all.

    Returns:
        states (B, I, L or P, E), zero where not seen; and the attention weights of the image modules by the name of
        the output, or None if no image went through a module.
    """
    attentions = {}

    def encode(flat):
        if name == "pixel_values":
            # only `eager` makes weights, and exporters hold what is asked for here against the implementation
            is_eager = model.config._attn_implementation == "eager"
            vision = model.vision_model(flat, interpolate_pos_encoding, output_attentions=is_eager)
            flat, attentions["vision_attentions"] = vision.last_hidden_state, vision.attentions
        if name != "perceiver_embeddings" and model.config.use_resampler:
            flat, attentions["perceiver_attentions"] = model.perceiver_resampler(flat)
        return flat

    images = images.to(compute_device(model, images), model.embed_tokens.weight.dtype)
    states_BILE = _encode_seen(encode, images, seen_BI, keep_one=model.training)
    if states_BILE is None:
        tokens, width = tokens_per_image(name, images.shape, model.config), model.config.vision_config.embed_dim
        return images.new_zeros((*images.shape[:2], tokens, width)), None
    return states_BILE, attentions


def compute_device(model, images) -> torch.device:
    """Where to compute with `images`: where the model is, but parameters that are offloaded come to the images.

    It is read off a weight, since the replicas of `nn.DataParallel` have no parameters, only tensors in their places.
    """
    device = model.embed_tokens.weight.device
    return images.device if device.type == "meta" else device


def _encode_seen(encode, images, seen_BI, keep_one: bool):
    """Run `encode` on the images that are seen, and put its results in their places among zeros.

    Args:
        encode: from (images, ...) to (images, L, E).
        images: (B, I, ...).
        seen_BI: boolean, or None to encode all. Also all are encoded while a graph is being captured, where shapes may
            not depend on values.
        keep_one: encode at least one image, for training on several devices, where every rank has to run the same
            modules or the others wait for it forever.

    Returns:
        (B, I, L, E), zero where not seen, or None if nothing is seen at all.
    """
    rows, num_images = images.shape[:2]
    flat = images.flatten(0, 1)
    if seen_BI is None or torch.compiler.is_compiling() or flat.is_meta:
        states = encode(flat).unflatten(0, (rows, num_images))
        return states if seen_BI is None else states.masked_fill(~seen_BI[..., None, None].to(states.device), 0.0)
    chosen = seen_BI.flatten().nonzero().squeeze(-1).to(flat.device)
    if len(chosen) == 0 and keep_one:
        chosen = torch.zeros(1, dtype=torch.long, device=flat.device)
    if len(chosen) == 0:
        return None
    if len(chosen) == len(flat):
        return encode(flat).unflatten(0, (rows, num_images))
    encoded = encode(flat[chosen])
    states = encoded.new_zeros((len(flat), *encoded.shape[1:]))
    return states.index_copy(0, chosen.to(states.device), encoded).unflatten(0, (rows, num_images))
