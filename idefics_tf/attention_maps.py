"""Where in an image does a token look? `idefics_common.attention_maps` on a Keras model.

Mirrors `idefics_pt/attention_maps.py`.
"""

from keras import ops

from idefics_common import attention_maps


def cross_attention_map(model, inputs, position: int = -1, block: int | None = None):
    """See `idefics_common.attention_maps.cross_attention_map`."""
    return ops.convert_to_tensor(attention_maps.cross_attention_map(model, inputs, position, block))


def latent_reach(perceiver_attentions, num_tokens: int):
    """See `idefics_common.attention_maps.latent_reach`."""
    return ops.convert_to_tensor(attention_maps.latent_reach(perceiver_attentions, num_tokens))
