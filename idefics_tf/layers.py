"""Small layers that several parts share: linear layers, norms, gated MLP, and the two decoupled vocabulary layers.

Unusual: the vocabulary is decoupled. Ids below `vocab_size` live in the base matrix, which fine-tuning may freeze;
ids from `vocab_size` on (the image tokens) live in a small matrix of their own, which always trains. Both are Keras
layers, `base` and an additional one, so that adapters and quantization find what they expect. A head tied to the
embedding has no variables.

Mirrors `idefics_pt/layers.py`. Axes: see `idefics_common`.
"""

from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from idefics_common.calls.text import check_id_range
from idefics_tf.adaptable import Adaptable, Dense, Embedding, Flagged
from idefics_tf.initialization import Normal


def _gelu(x):
    return keras.activations.gelu(x, approximate=False)


def _approximate_gelu(x):
    return keras.activations.gelu(x, approximate=True)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_10": lambda x: ops.clip(_gelu(x), -10.0, 10.0),
    "gelu_accurate": _approximate_gelu,
    "gelu_fast": _approximate_gelu,
    "gelu_new": _approximate_gelu,
    "gelu_python": _gelu,
    "gelu_python_tanh": _approximate_gelu,
    "gelu_pytorch_tanh": _approximate_gelu,
    "hardswish": keras.activations.hard_silu,
    "laplace": lambda x: 0.5 * (1.0 + ops.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": lambda x: keras.activations.leaky_relu(x, negative_slope=0.01),
    "linear": lambda x: x,
    "mish": keras.activations.mish,
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),
    "relu": keras.activations.relu,
    "relu2": lambda x: ops.square(keras.activations.relu(x)),
    "relu6": keras.activations.relu6,
    "sigmoid": ops.sigmoid,
    "silu": keras.activations.silu,
    "sqrtsoftplus": lambda x: ops.sqrt(ops.softplus(x)),
    "swish": keras.activations.silu,
    "tanh": keras.activations.tanh,
}
"""Functions of `hidden_act`, by the names that configurations may have."""


def linear(input_width: int, width: int, initializer_range: float, name: str, bias=False) -> Dense:
    """A linear layer; `Composite.build` makes its variables."""
    layer = Dense(width, use_bias=bias, kernel_initializer=Normal(initializer_range), name=name)
    layer.input_width = input_width
    return layer


def project(layer, x):
    """Apply a linear layer to the last axis of `x`, with less overhead than calling it.

    A step of one token is short and has more than a hundred products. Keras spends a dozen operations per product on
    sizes that a graph leaves open; here the axes before the last are merged, which needs no sizes. In eager execution
    the call of a layer takes longer than the product, so a layer that does nothing else is not called.
    """
    flat = tf.reshape(x, np.array((-1, x.shape[-1]), np.int32))
    if _only_multiplies(layer, flat.dtype):
        flat = tf.matmul(flat, layer.kernel)
        if layer.use_bias:
            flat += layer.bias
    else:
        flat = layer(flat)
    return reshape(flat, (*sizes(x)[:-1], flat.shape[-1]))


def _only_multiplies(layer, dtype) -> bool:
    """Whether a call of the layer on a tensor of `dtype` would multiply, add a bias, and do nothing else."""
    return (
        type(layer).call is keras.layers.Dense.call
        and layer.built
        and layer.quantization_mode is None
        and not layer.lora_enabled
        and layer.activation is keras.activations.linear
        and layer.activity_regularizer is None
        and layer.compute_dtype == layer.kernel.dtype == dtype.name  # as the caller's precision has the kernel cast
    )


def sizes(x) -> tuple:
    """`ops.shape` of a tensor, but without an operation where all sizes are known."""
    return tuple(x.shape) if x.shape.is_fully_defined() else ops.shape(x)


def reshape(x, shape):
    """`tf.reshape`, fast where at most one of the sizes is a tensor; none of them may be -1."""
    num_unknown = sum(not isinstance(size, int) for size in shape)
    if num_unknown == 1:
        shape = [size if isinstance(size, int) else -1 for size in shape]
    # eager execution takes arrays at once, and tuples by a detour; XLA takes no int64 where sizes are found as it runs
    return tf.reshape(x, np.array(shape, np.int32) if num_unknown <= 1 else shape)


def dropout(x, rate: float, seed):
    """Zero elements of `x` at random and scale up the others; `x` itself if `seed` is None.

    The seed alone decides what is dropped, so that recomputing for a gradient drops the same elements.
    """
    if seed is None or rate == 1:
        return x if seed is None else tf.zeros_like(x)
    return tf.nn.experimental.stateless_dropout(x, rate, seed=seed)


def children(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layers that `layer` has as attributes, or in lists."""
    for name, value in vars(layer).items():
        if not name.startswith("_"):  # Keras's own lists name the same layers again
            for child in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(child, keras.layers.Layer):
                    yield child


def sublayers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """`layer` and all layers inside it."""
    yield layer
    for child in children(layer):
        yield from sublayers(child)


def named_sublayers(layer: keras.layers.Layer, path: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """`layer`, whose path is "", and all layers inside it with theirs: the names from below `layer` on."""
    yield path, layer
    for child in children(layer):
        yield from named_sublayers(child, below(path, child))


def below(path: str, thing) -> str:
    """The path of a layer or variable inside the layer at `path`."""
    return f"{path}/{thing.name}" if path else thing.name


def adapted_sublayers(layer: keras.layers.Layer) -> dict[str, Adaptable]:
    """The layers inside a layer that have adapters (LoRA), by path."""
    return {path: inner for path, inner in named_sublayers(layer) if getattr(inner, "lora_enabled", False)}


class Composite(Flagged):
    """A layer made of layers. Their sizes are known when they are made, so that its `build` can build them all."""

    def build(self, input_shape=None):
        for child in children(self):
            if not child.built:
                child.build((None, getattr(child, "input_width", None)))


class RMSNorm(Flagged):
    """Root-mean-square norm over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.eps = eps

    def build(self, input_shape=None):
        self.scale = self.add_weight(name="scale", shape=(self.width,), initializer="ones")

    def call(self, x):
        # the product with the weight happens in the weight's precision, as when the checkpoints were trained
        x = tf.cast(x, "float32")
        normed = x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + self.eps)
        return tf.cast(self.scale, self.compute_dtype) * tf.cast(normed, self.compute_dtype)


class LayerNorm(Flagged, keras.layers.LayerNormalization):
    """Layer norm over the last axis with scale and bias, computed in float32; 11 operations instead of Keras's 16."""

    def __init__(self, width: int, eps: float, **kwargs):
        super().__init__(epsilon=eps, **kwargs)
        self.input_width = width

    def call(self, x):
        x = tf.cast(x, "float32")
        centred = x - tf.reduce_mean(x, -1, keepdims=True)
        normed = centred * tf.math.rsqrt(tf.reduce_mean(tf.square(centred), -1, keepdims=True) + self.epsilon)
        return tf.cast(normed * tf.cast(self.gamma, "float32") + tf.cast(self.beta, "float32"), self.compute_dtype)


class GatedMLP(Composite):
    """LLaMA's MLP: ``down(act(gate(x)) * up(x))``, no biases (Shazeer, "GLU variants improve transformer", 2020)."""

    def __init__(self, width: int, hidden_width: int, activation: str, initializer_range: float, **kwargs):
        super().__init__(**kwargs)
        self.gate_proj = linear(width, hidden_width, initializer_range, "gate_proj")
        self.down_proj = linear(hidden_width, width, initializer_range, "down_proj")
        self.up_proj = linear(width, hidden_width, initializer_range, "up_proj")
        self.act_fn = ACTIVATIONS[activation]

    def call(self, hidden_BTD):
        gate_BTF, up_BTF = project(self.gate_proj, hidden_BTD), project(self.up_proj, hidden_BTD)
        return project(self.down_proj, self.act_fn(gate_BTF) * up_BTF)


class DecoupledEmbedding(Composite):
    """Embedding of a base vocabulary and, after it, an additional one held in `additional_embedding`.

    Args:
        num_embeddings: size of the base vocabulary.
        num_additional_embeddings: size of the additional one; 0 makes this an ordinary embedding.
        embedding_dim: width D.
        padding_idx: row that starts at zero, or None.
    """

    def __init__(
        self, num_embeddings, num_additional_embeddings, embedding_dim, initializer_range, padding_idx=None, **kwargs
    ):
        super().__init__(**kwargs)
        self.num_embeddings = num_embeddings
        self.num_additional_embeddings = num_additional_embeddings
        self.base = Embedding(
            num_embeddings, embedding_dim, Normal(initializer_range, zero_row=padding_idx), name="base"
        )
        if num_additional_embeddings > 0:
            self.additional_embedding = Embedding(
                num_additional_embeddings, embedding_dim, Normal(initializer_range), name="additional_embedding"
            )

    def call(self, ids_BT):
        """Look up ids (B, T), any integer dtype; returns (B, T, D).

        Raises:
            ValueError: if an id lies outside both vocabularies. Checked in eager execution; a compiled function fails
                with its own index error on the CPU.
        """
        if tf.executing_eagerly():
            self.check_ids(ids_BT)
        # Keras counts negative indices from the end; out of range, they are an error like those that are too large
        ids_BT = ops.where(ids_BT < 0, self.num_embeddings + self.num_additional_embeddings, ids_BT)
        if self.num_additional_embeddings == 0:
            return self.base(ids_BT)
        base_BTD = self.base(ops.minimum(ids_BT, self.num_embeddings - 1))
        additional_BTD = self.additional_embedding(ops.maximum(ids_BT - self.num_embeddings, 0))
        return ops.where(ops.expand_dims(ids_BT >= self.num_embeddings, -1), additional_BTD, base_BTD)

    def check_ids(self, ids_BT):
        """Refuse ids that lie outside both vocabularies; see `call`."""
        ids_BT = np.asarray(ids_BT)
        if ids_BT.size:
            check_id_range(ids_BT.min(), ids_BT.max(), self.num_embeddings, self.num_additional_embeddings)


class DecoupledLinear(Composite):
    """Language head over a base vocabulary and, after it, an additional one held in `additional_fc`.

    Args:
        in_features: width D.
        out_features: size of the base vocabulary.
        out_additional_features: size of the additional one; 0 makes this an ordinary linear layer.
        tied: the matrices are those of an embedding, which is then an argument of the call.
    """

    def __init__(
        self, in_features, out_features, out_additional_features=0, initializer_range=0.02, tied=False, **kwargs
    ):
        super().__init__(**kwargs)
        self.out_additional_features = out_additional_features
        self.tied = tied
        if not tied:
            self.base = linear(in_features, out_features, initializer_range, "base")
            if out_additional_features > 0:
                self.additional_fc = linear(in_features, out_additional_features, initializer_range, "additional_fc")

    def call(self, hidden_BTD, tied_to=None):
        """Logits (B, T, V); `tied_to` is the `DecoupledEmbedding` whose matrices a tied head uses."""
        logits_BTV = self._project(hidden_BTD, "base", tied_to and tied_to.base)
        if self.out_additional_features == 0:
            return logits_BTV
        additional_BTV = self._project(hidden_BTD, "additional_fc", tied_to and tied_to.additional_embedding)
        return ops.concatenate((logits_BTV, additional_BTV), axis=-1)

    def _project(self, hidden_BTD, name, embedding):
        if not self.tied:
            return project(getattr(self, name), hidden_BTD)
        if embedding.quantization_mode is not None:
            raise ValueError(
                f"{embedding.path} is quantized, and the head that is tied to it needs its matrix as it was: quantize "
                "no embedding of a model with tie_word_embeddings."
            )
        return ops.matmul(hidden_BTD, ops.transpose(ops.cast(embedding.embeddings, self.compute_dtype)))
