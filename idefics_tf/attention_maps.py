"""Where in an image does a token look? Cross-attention weights mapped back to the patches of the image.

Unusual: with a resampler text attends to latents, not to patches. What the latents themselves looked at is followed
through the blocks of the resampler by attention rollout (Abnar and Zuidema, "Quantifying attention flow", 2020), which
counts the residual connection as half of each block.

Mirrors `idefics_pt/attention_maps.py`. Axes: see `idefics_common`; G is the number of patches along one side of an
image.
"""

import numpy as np
from keras import ops

from idefics_tf.image_inputs import mask_from_tokens


def cross_attention_map(model, inputs, position: int = -1, block: int | None = None):
    """How a token's attention to images is spread over their patches.

    Args:
        model: a `TFIdeficsForVisionText2Text` or `TFIdeficsModel`.
        inputs: what the processor made of one prompt, with `pixel_values` of the model's size. An
            `image_attention_mask` that is left out means what it means to the model.
        position: of the token whose attention is mapped; -1 is the last, which predicts the next token.
        block: number of a gated block; None for the mean over all blocks, weighted by how far each gate is open.

    Returns:
        float32 (I, G, G): shares of attention. What is missing to a sum of 1 went to class tokens; an image that the
        token may not see has zeros.

    Raises:
        ValueError: if the inputs are not one prompt with images, or the images are not of the model's size.
    """
    if len(inputs["input_ids"]) != 1 or inputs.get("pixel_values") is None:
        raise ValueError("cross_attention_map takes the inputs of one prompt with pixel_values.")
    side = model.config.vision_config.image_size
    if tuple(inputs["pixel_values"].shape[-2:]) != (side, side):
        raise ValueError(
            f"cross_attention_map takes images of the model's size, {side} x {side} pixels, got "
            f"{' x '.join(map(str, inputs['pixel_values'].shape[-2:]))}."
        )
    outputs = model(**inputs, output_attentions=True, use_cache=False)
    images = inputs["pixel_values"].shape[1]
    grid = side // model.config.vision_config.patch_size
    mask_TI = _image_mask(model.config, inputs)
    if outputs.cross_attentions is None or not ops.any(mask_TI[position]):
        return ops.zeros((images, grid, grid))

    weights_M = _text_weights(outputs, position, block)
    if outputs.perceiver_attentions is None:
        patches_IP = ops.reshape(weights_M, (images, -1))
    else:
        latents_IL = ops.reshape(weights_M, (images, -1))
        # only images that some token may see have been through the resampler
        (encoded,) = ops.nonzero(ops.any(mask_TI, axis=0))
        reach = latent_reach(outputs.perceiver_attentions, grid**2 + 1)
        seen_IP = ops.einsum("il,ilp->ip", ops.take(latents_IL, encoded, axis=0), reach)
        patches_IP = ops.scatter(ops.expand_dims(encoded, -1), seen_IP, (images, grid**2 + 1))
    return ops.reshape(patches_IP[:, 1:], (images, grid, grid))


def _image_mask(config, inputs):
    """Which images each position sees, boolean (T, I); without a mask as the model takes it."""
    if inputs.get("image_attention_mask") is not None:
        return ops.not_equal(inputs["image_attention_mask"][0], 0)
    ids_BT, images = ops.convert_to_tensor(inputs["input_ids"]), inputs["pixel_values"].shape[1]
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        return ops.ones((ids_BT.shape[1], images), "bool")
    return mask_from_tokens(ids_BT, image_token_id, config.eos_token_id, images)[0]


def _text_weights(outputs, position, block):
    """Attention (M,) of one position, the mean over heads, of one block or averaged by the openness of the gates."""
    weights = ops.stack([_mean(layer[0, :, position], axis=0) for layer in outputs.cross_attentions])
    if block is not None:
        return weights[block]
    openness = ops.stack([_mean(ops.abs(gate[0, position])) for gate in outputs.cross_attention_gates])
    return _shares(ops.matmul(openness, weights), ops.sum(openness))


def latent_reach(perceiver_attentions, num_tokens: int):
    """How much of each vision token has flowed into each latent.

    Args:
        perceiver_attentions: weights of each block of the resampler, (images, H, L, P + L).
        num_tokens: P.

    Returns:
        float32 (images, L, P); each latent's row sums to 1.
    """
    reach_ILP = None
    for weights in perceiver_attentions:
        weights_ILS = _mean(weights, axis=1)
        to_tokens, to_latents = weights_ILS[..., :num_tokens], weights_ILS[..., num_tokens:]
        if reach_ILP is None:
            reach_ILP = to_tokens
        else:
            reach_ILP = 0.5 * reach_ILP + 0.5 * (to_tokens + ops.matmul(to_latents, reach_ILP))
        # latents start without any image in them: what attends to them before then attends to nothing
        reach_ILP = _shares(reach_ILP, ops.sum(reach_ILP, axis=-1, keepdims=True))
    return reach_ILP


def _mean(values, axis=None):
    return ops.mean(ops.cast(values, "float32"), axis=axis)


def _shares(parts, whole):
    return parts / ops.maximum(whole, np.finfo(np.float32).tiny)
