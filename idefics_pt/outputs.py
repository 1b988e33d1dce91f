"""What the models return. The documented fields come first and in the documented order, so that tuples agree too.

Mirrors `idefics_tf/outputs.py`. Axes: see `idefics_common`.
"""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from idefics_pt.transformers_versions import output_dataclass


@output_dataclass
class IdeficsModelOutput(ModelOutput):
    """Output of `IdeficsModel`.

    Attributes:
        last_hidden_state: (B, T, D), after the final norm.
        cache, or past_key_values: the cache, extended by this call, with the image memory on it. The field has the name
            that the installed transformers wants, `cache` from 5.24 on; both names can be read.
        hidden_states: on request: what enters the first decoder layer (embeddings after its gated block), then
            the output of each decoder layer, the last one normed; (B, T, D).
        attentions: on request: self-attention weights of each decoder layer, (B, H, T, S).
        image_hidden_states: (B, I, L, E) after the resampler, or (B, I, P, E) without one; zero for padded images.
        cross_attentions: with `attentions`: weights of each gated block, (B, H, T, M); None without images.
        cross_attention_gates: with `attentions`: the factor on each gated block's attention, (B, T, 1) or (B, T, D).
        vision_attentions: with `attentions`, in calls that encode pixels: weights of each vision layer, one row for
            every image that is not padding, (images, H, P, P).
        perceiver_attentions: the same for the blocks of the resampler, (images, H, L, P + L).
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attention_gates: tuple[torch.Tensor, ...] | None = None
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    perceiver_attentions: tuple[torch.Tensor, ...] | None = None


@output_dataclass
class IdeficsCausalLMOutput(ModelOutput):
    """Output of `IdeficsForVisionText2Text`; fields that `IdeficsModelOutput` has too mean the same.

    Attributes:
        loss: scalar, mean cross entropy of the next token over labels that are not -100; only with labels.
        logits: (B, T, V), or the positions that `logits_to_keep` asks for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attention_gates: tuple[torch.Tensor, ...] | None = None
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    perceiver_attentions: tuple[torch.Tensor, ...] | None = None
