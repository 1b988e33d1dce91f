"""Where in an image does a token look? Cross-attention weights mapped back to the patches of the image.

Unusual: with a resampler text attends to latents, not to patches. What the latents themselves looked at is followed
through the blocks of the resampler by attention rollout (Abnar and Zuidema, "Quantifying attention flow", 2020), which
counts the residual connection as half of each block.

Axes: see `idefics_common`; G is the number of patches along one side of an image.
"""

import torch

from idefics_pt.image_inputs import mask_from_tokens


@torch.no_grad()
def cross_attention_map(model, inputs, position: int = -1, block: int | None = None) -> torch.Tensor:
    """How a token's attention to images is spread over their patches.

    Args:
        model: an `IdeficsForVisionText2Text` or `IdeficsModel` with eager attention.
        inputs: what the processor made of one prompt, with `pixel_values` of the model's size. An
            `image_attention_mask` that is left out means what it means to the model.
        position: of the token whose attention is mapped; -1 is the last, which predicts the next token.
        block: number of a gated block; None for the mean over all blocks, weighted by how far each gate is open.

    Returns:
        (I, G, G): shares of attention. What is missing to a sum of 1 went to class tokens; an image that the token may
        not see has zeros.

    Raises:
        ValueError: if the inputs are not one prompt with images, the images are not of the model's size, or the
            model's attention is not eager.
    """
    if len(inputs["input_ids"]) != 1 or inputs.get("pixel_values") is None:
        raise ValueError("cross_attention_map takes the inputs of one prompt with pixel_values.")
    attention = model.config._attn_implementation or "eager"
    if attention != "eager":
        raise ValueError(
            f"cross_attention_map needs attention weights, and {attention!r} gives none: switch by "
            'model.set_attn_implementation("eager").'
        )
    side = model.config.vision_config.image_size
    if tuple(inputs["pixel_values"].shape[-2:]) != (side, side):
        raise ValueError(
            f"cross_attention_map takes images of the model's size, {side} x {side} pixels, got "
            f"{' x '.join(map(str, inputs['pixel_values'].shape[-2:]))}."
        )
    outputs = model(**inputs, output_attentions=True, use_cache=False)
    images = inputs["pixel_values"].shape[1]
    grid = side // model.config.vision_config.patch_size
    if outputs.cross_attentions is None:
        return torch.zeros(images, grid, grid)
    mask_TI = _image_mask(model.config, inputs)
    if not mask_TI[position].any():
        return torch.zeros(images, grid, grid)

    weights_M = _text_weights(outputs, position, block)
    if outputs.perceiver_attentions is None:
        patches_IP = weights_M.unflatten(0, (images, -1))
    else:
        patches_IP = torch.zeros(images, grid**2 + 1)
        latents_IL = weights_M.unflatten(0, (images, -1))
        # only images that some token may see have been through the resampler
        encoded = mask_TI.any(dim=0).nonzero().squeeze(-1)
        reach = latent_reach(outputs.perceiver_attentions, patches_IP.shape[1])
        patches_IP[encoded] = torch.einsum("il,ilp->ip", latents_IL[encoded], reach)
    return patches_IP[:, 1:].unflatten(1, (grid, grid))


def _image_mask(config, inputs):
    """Which images each position sees, boolean (T, I) on the CPU; without a mask as the model takes it."""
    if inputs.get("image_attention_mask") is not None:
        return inputs["image_attention_mask"][0].cpu() != 0
    ids_BT, images = inputs["input_ids"].cpu(), inputs["pixel_values"].shape[1]
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        return torch.ones(ids_BT.shape[1], images, dtype=torch.bool)
    return mask_from_tokens(ids_BT, image_token_id, config.eos_token_id, images)[0]


def _text_weights(outputs, position, block):
    """Attention (M,) of one position, the mean over heads, of one block or averaged by the openness of the gates."""
    weights = torch.stack([layer[0, :, position].float().mean(dim=0).cpu() for layer in outputs.cross_attentions])
    if block is not None:
        return weights[block]
    openness = torch.stack([gate[0, position].abs().float().mean().cpu() for gate in outputs.cross_attention_gates])
    return openness @ weights / openness.sum().clamp(min=torch.finfo(torch.float32).tiny)


def latent_reach(perceiver_attentions, num_tokens: int) -> torch.Tensor:
    """How much of each vision token has flowed into each latent.

    Args:
        perceiver_attentions: weights of each block of the resampler, (images, H, L, P + L).
        num_tokens: P.

    Returns:
        (images, L, P); each latent's row sums to 1.
    """
    reach_ILP = None
    for weights in perceiver_attentions:
        weights_ILS = weights.float().mean(dim=1).cpu()
        to_tokens, to_latents = weights_ILS[..., :num_tokens], weights_ILS[..., num_tokens:]
        if reach_ILP is None:
            reach_ILP = to_tokens
        else:
            reach_ILP = 0.5 * reach_ILP + 0.5 * (to_tokens + to_latents @ reach_ILP)
        # latents start without any image in them: what attends to them before then attends to nothing
        reach_ILP = reach_ILP / reach_ILP.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return reach_ILP
