"""Where in an image does a token look? `idefics_common.attention_maps` on a PyTorch model.

Mirrors `idefics_tf/attention_maps.py`.
"""

import torch

from idefics_common import attention_maps


@torch.no_grad()
def cross_attention_map(model, inputs, position: int = -1, block: int | None = None) -> torch.Tensor:
    """See `idefics_common.attention_maps.cross_attention_map`; the result is on the CPU.

    Raises:
        ValueError: as there, or if the model's attention is not eager.
    """
    attention = model.config._attn_implementation or "eager"
    if attention != "eager":
        raise ValueError(
            f"cross_attention_map needs attention weights, and {attention!r} gives none: switch by "
            'model.set_attn_implementation("eager").'
        )
    return torch.from_numpy(attention_maps.cross_attention_map(model, inputs, position, block))


def latent_reach(perceiver_attentions, num_tokens: int) -> torch.Tensor:
    """See `idefics_common.attention_maps.latent_reach`; the result is on the CPU."""
    return torch.from_numpy(attention_maps.latent_reach(perceiver_attentions, num_tokens))
