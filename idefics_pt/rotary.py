"""Rotary position embeddings (Su et al., "RoFormer", 2021), computed once per forward and shared by all layers.

Unusual: the frequencies are a buffer that no checkpoint holds. Scaled variants (linear, dynamic, YaRN, LLaMA 3) come
from transformers, by `config.rope_parameters`; the attributes have the names that transformers' scaling works on.

Mirrors `idefics_tf/rotary.py`. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class RotaryEmbedding(nn.Module):
    """The table of angles: position ids (B, T) to factors of `rotate`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        frequencies_of = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        frequencies, self.attention_scaling = frequencies_of(config)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)
        self.original_inv_freq = nn.Buffer(frequencies.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        # a model turned to half precision must not round its frequencies: the error would grow with the position
        exact = {"inv_freq": self.inv_freq, "original_inv_freq": self.original_inv_freq}
        super()._apply(fn, recurse)
        for name, frequencies in exact.items():
            moved = getattr(self, name)
            if moved.dtype != frequencies.dtype:
                setattr(self, name, frequencies.to(moved.device))
        return self

    @staticmethod
    def compute_default_rope_parameters(config, device=None):
        """Frequencies of unscaled rotary embeddings, (K / 2,) float32 in radians per position, and a factor of 1."""
        width = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        """Factors of `rotate` for `position_ids` (B, T), in the dtype and on the device of `x`.

        Returns:
            cosines (B, 1, T, K), and sines (B, 1, T, K) that are negative in the first half of K.
        """
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(x.device, torch.float32)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        if self.config.hidden_size == self.config.num_attention_heads:
            # a head of one feature has no pair; transformers lets it be both halves of one, and negative in the second
            return (2**0.5 * cos).to(x.dtype), (-(2**0.5) * sin).to(x.dtype)
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def rotate(x_BHTK, cos_B1TK, sin_B1TK):
    """Turn each pair of features (k, k + K/2) by its angle, given the result of `RotaryEmbedding`."""
    swapped_BHTK = x_BHTK.roll(x_BHTK.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BHTK * cos_B1TK, swapped_BHTK, sin_B1TK)
