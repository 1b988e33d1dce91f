"""The vision tower: a CLIP ViT (Radford et al., 2021) on one image at a time.

Unusual: text attends to the output of the last layer as it is; the final norm only makes `pooler_output`. The
misspelt `pre_layrnorm` is its name in the published checkpoints. Position embeddings for other image sizes are
interpolated by matrices that both rooms share (`idefics_common.position_grid`). Pixels are channels-first, as
everywhere in this library, and transposed here: TensorFlow's convolution on a CPU is channels-last.

Mirrors `idefics_pt/vision.py`. Axes: see `idefics_common`; here B runs over images.
"""

from keras import ops

from idefics_common.calls.images import check_pixels
from idefics_common.position_grid import interpolation_matrix
from idefics_tf.adaptable import Conv2D, Embedding
from idefics_tf.attention import attend, split_heads
from idefics_tf.gradient_checkpointing import CheckpointedLayer
from idefics_tf.initialization import Normal
from idefics_tf.layers import ACTIVATIONS, Composite, LayerNorm, linear, project
from idefics_tf.outputs import TFVisionOutput


class VisionEmbeddings(Composite):
    """Patches and a class token, with learned positions."""

    def __init__(self, config, initializer_range, **kwargs):
        super().__init__(**kwargs)
        self.config = config
        self.width = config.embed_dim
        self.grid_size = config.image_size // config.patch_size
        self.patch_embedding = Conv2D(
            self.width,
            kernel_size=config.patch_size,
            strides=config.patch_size,
            use_bias=False,
            data_format="channels_last",
            kernel_initializer=Normal(initializer_range),
            name="patch_embedding",
        )
        self.position_embedding = Embedding(
            self.grid_size**2 + 1, self.width, Normal(initializer_range), name="position_embedding"
        )

    def build(self, input_shape=None):
        self.class_embedding = self.add_weight(name="class_embedding", shape=(self.width,), initializer=Normal(1.0))
        self.patch_embedding.build((None, None, None, self.config.num_channels))
        self.position_embedding.build()

    def call(self, pixel_values, interpolate_pos_encoding=False):
        """Embed pixels (B, C, height, width) as (B, P, E)."""
        check_pixels(pixel_values.shape, self.config, interpolate_pos_encoding)
        patches = self.patch_embedding(ops.transpose(pixel_values, (0, 2, 3, 1)))
        grid_shape = tuple(size // self.config.patch_size for size in pixel_values.shape[2:])
        rows = ops.shape(patches)[0]
        class_B1E = ops.broadcast_to(ops.cast(self.class_embedding, patches.dtype), (rows, 1, self.width))
        patches_BPE = ops.reshape(patches, (rows, grid_shape[0] * grid_shape[1], self.width))
        return ops.concatenate((class_B1E, patches_BPE), axis=1) + self._positions(grid_shape)

    def _positions(self, grid_shape):
        positions_PE = self.position_embedding.embeddings
        if grid_shape == (self.grid_size, self.grid_size):
            return ops.cast(positions_PE, self.compute_dtype)
        rows, columns = (interpolation_matrix(self.grid_size, size) for size in grid_shape)
        # in float32, whatever the model's precision: these are weights of the model, not activations
        grid = ops.reshape(ops.cast(positions_PE[1:], "float32"), (self.grid_size, self.grid_size, self.width))
        grid = ops.reshape(ops.einsum("yi,xj,ije->yxe", rows, columns, grid), (-1, self.width))
        return ops.concatenate([ops.cast(part, self.compute_dtype) for part in (positions_PE[:1], grid)])


class VisionAttention(Composite):
    """Self-attention over the tokens of one image, with biases."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.attention_dropout = config.vision_config.attention_dropout
        width = config.vision_config.embed_dim
        self.head_dim = width // config.vision_config.num_attention_heads
        self.k_proj = linear(width, width, config.initializer_range, "k_proj", bias=True)
        self.v_proj = linear(width, width, config.initializer_range, "v_proj", bias=True)
        self.q_proj = linear(width, width, config.initializer_range, "q_proj", bias=True)
        self.out_proj = linear(width, width, config.initializer_range, "out_proj", bias=True)

    def call(self, hidden_BPE, seed=None):
        """Returns (B, P, E), and the weights (B, H, P, P)."""
        query, key, value = (
            split_heads(project(layer, hidden_BPE), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BPE, weights = attend(query, key, value, None, self.attention_dropout, seed)
        return project(self.out_proj, out_BPE), weights


class VisionMLP(Composite):
    """Two linear layers with an activation between them, with biases."""

    def __init__(self, config, initializer_range, **kwargs):
        super().__init__(**kwargs)
        self.activation_fn = ACTIVATIONS[config.hidden_act]
        self.fc1 = linear(config.embed_dim, config.intermediate_size, initializer_range, "fc1", bias=True)
        self.fc2 = linear(config.intermediate_size, config.embed_dim, initializer_range, "fc2", bias=True)

    def call(self, hidden_BPE):
        return project(self.fc2, self.activation_fn(project(self.fc1, hidden_BPE)))


class VisionEncoderLayer(CheckpointedLayer):
    """Pre-norm transformer layer."""

    num_dropouts = 1

    def __init__(self, config, **kwargs):
        vision = config.vision_config
        super().__init__(vision.attention_dropout, **kwargs)
        self.self_attn = VisionAttention(config, name="self_attn")
        self.layer_norm1 = LayerNorm(vision.embed_dim, vision.layer_norm_eps, name="layer_norm1")
        self.mlp = VisionMLP(vision, config.initializer_range, name="mlp")
        self.layer_norm2 = LayerNorm(vision.embed_dim, vision.layer_norm_eps, name="layer_norm2")

    def call(self, hidden_BPE, training=False, return_weights=True):
        """Returns (B, P, E) and the attention weights, or None in their place."""
        return self.run(hidden_BPE, return_weights, training=training)

    def _forward(self, hidden_BPE, return_weights, seeds):
        attended_BPE, weights = self.self_attn(self.layer_norm1(hidden_BPE), seed=seeds[0])
        hidden_BPE = hidden_BPE + attended_BPE
        hidden_BPE = hidden_BPE + self.mlp(self.layer_norm2(hidden_BPE))
        return hidden_BPE, weights if return_weights else None


class VisionEncoder(Composite):
    """The list of layers; it exists because the published names contain "encoder"."""

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        depth = config.vision_config.num_hidden_layers
        self.layers = [VisionEncoderLayer(config, name=f"layers_{i}") for i in range(depth)]


class VisionTransformer(Composite):
    """Pixels (B, C, height, width) to vision tokens (B, P, E).

    Args:
        config: the whole `IdeficsConfig`; sizes come from its `vision_config`.
    """

    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        vision = config.vision_config
        self.embeddings = VisionEmbeddings(vision, config.initializer_range, name="embeddings")
        self.pre_layrnorm = LayerNorm(vision.embed_dim, vision.layer_norm_eps, name="pre_layrnorm")
        self.encoder = VisionEncoder(config, name="encoder")
        self.post_layernorm = LayerNorm(vision.embed_dim, vision.layer_norm_eps, name="post_layernorm")

    def call(self, pixel_values, interpolate_pos_encoding=False, output_attentions=False, output_hidden_states=False):
        """Encode images.

        Returns:
            `TFVisionOutput`: `last_hidden_state` (B, P, E), what text attends to; `pooler_output` (B, E); on request
            `hidden_states`, one more than layers, from the embeddings on, and `attentions` (B, H, P, P) per layer.

        Raises:
            ValueError: if the pixels do not have the model's channels or size.
        """
        hidden_BPE = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        hidden_states, attentions = [hidden_BPE], []
        for layer in self.encoder.layers:
            hidden_BPE, weights = layer(hidden_BPE, return_weights=output_attentions)
            if output_hidden_states:
                hidden_states.append(hidden_BPE)
            attentions.append(weights)
        return TFVisionOutput.of(
            last_hidden_state=hidden_BPE,
            pooler_output=self.post_layernorm(hidden_BPE[:, 0]),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
