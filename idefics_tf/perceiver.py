"""The Perceiver resampler (Jaegle et al., 2021; Alayrac et al., "Flamingo", 2022): any number of vision tokens of one
image to a few latents.

Unusual: the latents are keys and values too, appended to the vision tokens; queries and keys may have layer norms
per head; the MLP is a plain ReLU one with a norm of its own.

Mirrors `idefics_pt/perceiver.py`. Axes: see `idefics_common`; here B runs over images.
"""

from keras import ops

from idefics_tf.attention import attend, split_heads
from idefics_tf.initialization import Normal
from idefics_tf.layers import Composite, LayerNorm, linear, project

_EPSILON = 1e-5  # of all norms here; Keras's own default is 1e-3


class PerceiverAttention(Composite):
    """Latents attend to the vision tokens and to themselves."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        perceiver, width = config.perceiver_config, config.vision_config.embed_dim
        self.head_dim = perceiver.resampler_head_dim
        inner_width = perceiver.resampler_n_heads * self.head_dim
        self.context_layer_norm = LayerNorm(width, _EPSILON, name="context_layer_norm")
        self.latents_layer_norm = LayerNorm(width, _EPSILON, name="latents_layer_norm")
        self.qk_layer_norms = perceiver.qk_layer_norms_perceiver
        if self.qk_layer_norms:
            self.q_layer_norm = LayerNorm(self.head_dim, _EPSILON, name="q_layer_norm")
            self.k_layer_norm = LayerNorm(self.head_dim, _EPSILON, name="k_layer_norm")
        self.q_proj = linear(width, inner_width, config.initializer_range, "q_proj")
        self.k_proj = linear(width, inner_width, config.initializer_range, "k_proj")
        self.v_proj = linear(width, inner_width, config.initializer_range, "v_proj")
        self.output_proj = linear(inner_width, width, config.initializer_range, "output_proj")

    def call(self, context_BPE, latents_BLE):
        """Returns (B, L, E), and the weights (B, H, L, P + L)."""
        latents_BLE = self.latents_layer_norm(latents_BLE)
        sources = ops.concatenate((self.context_layer_norm(context_BPE), latents_BLE), axis=1)
        query = split_heads(project(self.q_proj, latents_BLE), self.head_dim)
        key = split_heads(project(self.k_proj, sources), self.head_dim)
        if self.qk_layer_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        value = split_heads(project(self.v_proj, sources), self.head_dim)
        out_BLD, weights = attend(query, key, value)
        return project(self.output_proj, out_BLD), weights


class PerceiverMLP(Composite):
    """Norm, linear, ReLU, linear; four times as wide inside."""

    def __init__(self, width: int, initializer_range: float, **kwargs):
        super().__init__(**kwargs)
        self.ln = LayerNorm(width, _EPSILON, name="ln")
        self.fc = linear(width, 4 * width, initializer_range, "fc")
        self.c_proj = linear(4 * width, width, initializer_range, "c_proj")

    def call(self, latents_BLE):
        return project(self.c_proj, ops.relu(project(self.fc, self.ln(latents_BLE))))


class PerceiverBlock(Composite):
    """Attention and MLP, each added to the latents; in the published names they are numbers 0 and 1 of a block."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.attention = PerceiverAttention(config, name="attention")
        self.mlp = PerceiverMLP(config.vision_config.embed_dim, config.initializer_range, name="mlp")

    def call(self, context_BPE, latents_BLE):
        """Returns (B, L, E) and the attention weights."""
        resampled_BLE, weights = self.attention(context_BPE, latents_BLE)
        latents_BLE = latents_BLE + resampled_BLE
        return latents_BLE + self.mlp(latents_BLE), weights


class PerceiverResampler(Composite):
    """Vision tokens (B, P, E) to latents (B, L, E)."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        perceiver, self.width = config.perceiver_config, config.vision_config.embed_dim
        self.num_latents = perceiver.resampler_n_latents
        self.blocks = [PerceiverBlock(config, name=f"blocks_{i}") for i in range(perceiver.resampler_depth)]
        self.layer_norm = LayerNorm(self.width, _EPSILON, name="layer_norm")

    def build(self, input_shape=None):
        self.latents = self.add_weight(name="latents", shape=(self.num_latents, self.width), initializer=Normal(1.0))
        super().build()

    def call(self, context_BPE):
        """Returns latents (B, L, E), and the attention weights of each block."""
        shape = (ops.shape(context_BPE)[0], self.num_latents, self.width)
        latents_BLE = ops.broadcast_to(ops.cast(self.latents, self.compute_dtype), shape)
        attentions = []
        for block in self.blocks:
            latents_BLE, weights = block(context_BPE, latents_BLE)
            attentions.append(weights)
        return self.layer_norm(latents_BLE), tuple(attentions)
