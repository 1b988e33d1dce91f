"""Where in an image does a token look? Cross-attention weights mapped back to the patches of the image.

With a resampler text attends to latents, not to patches. What the latents themselves looked at is followed through the
blocks of the resampler by attention rollout (Abnar and Zuidema, "Quantifying attention flow", 2020), which counts the
residual connection as half of each block.

The rooms' `attention_maps` call this with a model of their own; everything here is numpy. Axes: see `idefics_common`;
G is the number of patches along one side of an image.
"""

import numpy as np

from idefics_common.prompts.image_masks import image_attention_mask
from idefics_common.tensors import to_numpy

_TINY = np.finfo(np.float32).tiny


def cross_attention_map(model, inputs, position: int = -1, block: int | None = None) -> np.ndarray:
    """How a token's attention to images is spread over their patches.

    Args:
        model: a model of either room that returns attention weights.
        inputs: what the processor made of one prompt, with `pixel_values` of the model's size. Without an
            `image_attention_mask`, the mask is the one that the model derives.
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
    vision = model.config.vision_config
    side, size = vision.image_size, tuple(inputs["pixel_values"].shape[-2:])
    if size != (side, side):
        raise ValueError(
            f"cross_attention_map takes images of the model's size, {side} x {side} pixels, got {size[0]} x {size[1]}."
        )
    outputs = model(**inputs, output_attentions=True, use_cache=False)
    images, grid = inputs["pixel_values"].shape[1], side // vision.patch_size
    patches_IP = np.zeros((images, grid**2 + 1), np.float32)
    mask_TI = _image_mask(model.config, inputs)
    if outputs.cross_attentions is not None and mask_TI[position].any():
        weights_M = _text_weights(outputs, position, block)
        if outputs.perceiver_attentions is None:
            patches_IP = weights_M.reshape(images, -1)
        else:
            # only images that some token may see have been through the resampler
            encoded = mask_TI.any(axis=0)
            latents_IL = weights_M.reshape(images, -1)[encoded]
            reach_ILP = latent_reach(outputs.perceiver_attentions, patches_IP.shape[1])
            patches_IP[encoded] = np.einsum("il,ilp->ip", latents_IL, reach_ILP)
    return patches_IP[:, 1:].reshape(images, grid, grid)


def latent_reach(perceiver_attentions, num_tokens: int) -> np.ndarray:
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
            reach_ILP = 0.5 * reach_ILP + 0.5 * (to_tokens + to_latents @ reach_ILP)
        # latents start without any image in them: what attends to them before then attends to nothing
        reach_ILP = reach_ILP / np.maximum(reach_ILP.sum(axis=-1, keepdims=True), _TINY)
    return reach_ILP


def _image_mask(config, inputs) -> np.ndarray:
    """Which images each position sees, boolean (T, I)."""
    if inputs.get("image_attention_mask") is not None:
        return to_numpy(inputs["image_attention_mask"])[0] != 0
    ids_BT, images = to_numpy(inputs["input_ids"]), inputs["pixel_values"].shape[1]
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        return np.ones((ids_BT.shape[1], images), bool)
    return image_attention_mask(ids_BT, image_token_id, config.eos_token_id, images)[0] != 0


def _text_weights(outputs, position: int, block: int | None) -> np.ndarray:
    """Attention (M,) of one position, the mean over heads, of one block or averaged by the openness of the gates."""
    weights_NM = np.stack([_mean(layer[0, :, position], axis=0) for layer in outputs.cross_attentions])
    if block is not None:
        return weights_NM[block]
    openness_N = np.stack([_mean(abs(gate[0, position])) for gate in outputs.cross_attention_gates])
    return openness_N @ weights_NM / max(openness_N.sum(), _TINY)


def _mean(values, axis: int | None = None) -> np.ndarray:
    return to_numpy(values).astype(np.float32).mean(axis=axis)
