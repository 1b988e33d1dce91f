"""The one table of IDEFICS parameters: every tensor of every checkpoint, listed once.

A row of the table is a name template, a kind, a shape in terms of the configuration, the condition under which the
tensor exists, and the part of the model it belongs to. `expand(config)` turns rows into the tensors of one model.
Names are only ever made from the table, never parsed back, and a layout is never guessed from a shape: LLaMA's
query, key, value and output kernels are square, so a missing transpose would have the right shape.

The canonical name is the key in the published checkpoints, spelling mistakes included (`pre_layrnorm`), and the
canonical layout is PyTorch's: linear kernels are (out, in), convolution kernels (out, in, height, width). Keras's
layouts are in `idefics_common.layouts`.

Keras has two namespaces. `Variable.path` follows the layers' ``name=`` arguments. Paths inside a ``.weights.h5`` file
follow attribute names, class names and order of creation: the layers of a list are numbered by class, and what a Keras
`Model` holds under an attribute that sorts after ``layers`` is filed under ``layers/<class>``, because Keras walks
attributes in alphabetical order and a `Model` has that property.

A third namespace is that of ``tf_model.h5``, which transformers 4 wrote from TensorFlow (4.57.6 was the last): layouts
are Keras's but for the base matrix of the language head, which is stored as in PyTorch.

`config` is `idefics_common.config_fields.IdeficsFields` or an `IdeficsConfig`; this module needs no transformers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from idefics_common.config_fields import ALPHA_INITIALIZERS, CONSTANT_ALPHA_INITIALIZERS, RANDOM_ALPHA_INITIALIZERS


class Kind(StrEnum):
    """What a tensor is: this decides how another framework lays it out and how training treats it."""

    LINEAR = "linear kernel"
    CONV = "convolution kernel"
    BIAS = "bias"
    EMBEDDING = "embedding"
    LAYER_NORM = "layer norm"
    RMS_NORM = "RMS norm"
    RAW = "raw"


class Part(StrEnum):
    """Which part of the model a tensor belongs to; the unit in which parameters are counted and frozen."""

    EMBEDDING = "text embedding"
    VISION = "vision tower"
    RESAMPLER = "resampler"
    DECODER = "decoder"
    CROSS_ATTENTION = "gated cross-attention"
    HEAD = "language head"


@dataclass(frozen=True)
class Parameter:
    """One tensor of one model.

    Attributes:
        name: canonical name, the key in a published checkpoint.
        shape: in PyTorch's layout.
        kind, part: see `Kind` and `Part`.
        keras_path: `Variable.path` in Keras, below the name of the model.
        h5_path: path of the dataset in a Keras ``.weights.h5`` file.
        legacy_name: name in a ``tf_model.h5`` of transformers 4, below the name of the model.
        tied_to: the canonical name of the tensor that this one is the same as, or None. A tied tensor need not be in
            a file, and in Keras there is none.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    part: Part
    keras_path: str
    h5_path: str
    legacy_name: str
    tied_to: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Row:
    """One row of the table: a template of names and how it expands.

    Attributes:
        template: canonical name with ``{i}`` for the block it is repeated over.
        keras, h5: templates of `Parameter.keras_path` and `Parameter.h5_path`; in the latter ``{nth}`` stands for the
            number of the block as Keras appends it to a class: nothing, ``_1``, ``_2``, ...
        legacy: template of `Parameter.legacy_name`.
        shape: names of axes, looked up in `dimensions`, or numbers.
        exists: whether a configuration has this tensor.
        tied_to: template of the tensor it is tied to when `tie_word_embeddings` is set.
    """

    template: str
    keras: str
    h5: str
    legacy: str
    kind: Kind
    shape: tuple[str | int, ...]
    part: Part
    exists: Callable[[object], bool]
    tied_to: str | None = None


@dataclass(frozen=True)
class Module:
    """Where a module stands in each namespace, as templates: published checkpoints, Keras names, h5, transformers 4."""

    name: str
    keras: str
    h5: str
    legacy: str

    def child(self, name: str, keras: str | None = None, h5: str | None = None, legacy_joint: str = "/") -> "Module":
        """A module inside this one; the names of the other namespaces are the same unless given."""
        return Module(
            f"{self.name}.{name}",
            f"{self.keras}/{keras or name}",
            f"{self.h5}/{h5 or name}",
            f"{self.legacy}{legacy_joint}{name}",
        )

    def row(
        self,
        leaf: str,
        keras_leaf: str,
        h5_index: int,
        kind,
        shape,
        part,
        exists,
        keras_child="",
        tied_to=None,
        legacy_leaf=None,
    ):
        """The row of a tensor of this module.

        Args:
            leaf: its name in published checkpoints. keras_leaf: its name in Keras.
            h5_index: how many variables Keras makes before it in the layer that holds it.
            keras_child: the layer that holds it in Keras, if that is one inside this module.
            legacy_leaf: its name in transformers 4, if that is not its name in Keras.
        """
        inside = f"/{keras_child}" if keras_child else ""
        keras, h5 = f"{self.keras}{inside}/{keras_leaf}", f"{self.h5}{inside}/vars/{h5_index}"
        legacy = f"{self.legacy}/{legacy_leaf or keras_leaf}:0"
        return Row(f"{self.name}.{leaf}", keras, h5, legacy, kind, shape, part, exists, tied_to)


MODEL = Module("model", "model", "layers/tf_idefics_model", "model")
"""The model without its language head; where it stands alone, its names start below this one."""

HEAD = Module("lm_head", "lm_head", "layers/decoupled_linear", "lm_head")


@dataclass(frozen=True)
class Section:
    """Consecutive rows that repeat together, in the order of the module they describe."""

    rows: tuple[Row, ...]
    repeats: Callable[[object], int]


def dimensions(config) -> dict[str, int]:
    """The sizes of all axes that shapes are written in."""
    vision, perceiver = config.vision_config, config.perceiver_config
    return {
        "V": config.vocab_size,
        "additional V": config.additional_vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "text K": config.hidden_size // config.num_attention_heads,
        "E": vision.embed_dim,
        "vision F": vision.intermediate_size,
        "C": vision.num_channels,
        "patch": vision.patch_size,
        "P": (vision.image_size // vision.patch_size) ** 2 + 1,
        "L": perceiver.resampler_n_latents,
        "perceiver H*K": perceiver.resampler_n_heads * perceiver.resampler_head_dim,
        "perceiver K": perceiver.resampler_head_dim,
        "perceiver F": 4 * vision.embed_dim,
    }


def num_cross_layers(config) -> int:
    """How many gated cross-attention blocks a model has: one before every `cross_layer_interval`-th decoder layer."""
    return config.num_hidden_layers // config.cross_layer_interval


def _always(config) -> bool:
    return True


def _has_additional_vocabulary(config) -> bool:
    return config.additional_vocab_size > 0


def _has_resampler(config) -> bool:
    return bool(config.use_resampler)


def _has_resampler_norms(config) -> bool:
    return bool(config.use_resampler and config.perceiver_config.qk_layer_norms_perceiver)


def _has_cross_attention_norms(config) -> bool:
    return bool(config.qk_layer_norms)


def _linear(module, out_axis, in_axis, part, exists=_always, bias=False):
    rows = [module.row("weight", "kernel", 0, Kind.LINEAR, (out_axis, in_axis), part, exists)]
    if bias:
        rows.append(module.row("bias", "bias", 1, Kind.BIAS, (out_axis,), part, exists))
    return rows


def _embedding(module, axis, width, part, exists=_always, keras_child=""):
    return [module.row("weight", "embeddings", 0, Kind.EMBEDDING, (axis, width), part, exists, keras_child)]


def _layer_norm(module, axis, part, exists=_always):
    leaves = (("weight", "gamma"), ("bias", "beta"))
    return [module.row(*pair, i, Kind.LAYER_NORM, (axis,), part, exists) for i, pair in enumerate(leaves)]


def _rms_norm(module, axis, part, exists=_always):
    return [module.row("weight", "scale", 0, Kind.RMS_NORM, (axis,), part, exists, legacy_leaf="weight")]


def _gated_mlp(module, part):
    return [
        *_linear(module.child("gate_proj"), "F", "D", part),
        *_linear(module.child("down_proj"), "D", "F", part),
        *_linear(module.child("up_proj"), "F", "D", part),
    ]


def _once(*rows) -> Section:
    return Section(rows, lambda config: 1)


def _embedding_section() -> Section:
    module, part = MODEL.child("embed_tokens"), Part.EMBEDDING
    added = module.child("additional_embedding")
    return _once(
        *_embedding(module, "V", "D", part, keras_child="base"),
        *_embedding(added, "additional V", "D", part, _has_additional_vocabulary),
    )


def _vision_sections() -> tuple[Section, ...]:
    part = Part.VISION
    vision = MODEL.child("vision_model", h5="layers/vision_transformer")
    embeddings = vision.child("embeddings")
    patches = embeddings.child("patch_embedding")
    layer = vision.child("encoder").child("layers.{i}", "layers_{i}", "layers/vision_encoder_layer{nth}")
    attention, mlp = layer.child("self_attn"), layer.child("mlp")
    before = _once(
        embeddings.row("class_embedding", "class_embedding", 0, Kind.RAW, ("E",), part, _always),
        patches.row("weight", "kernel", 0, Kind.CONV, ("E", "C", "patch", "patch"), part, _always),
        *_embedding(embeddings.child("position_embedding"), "P", "E", part),
        *_layer_norm(vision.child("pre_layrnorm"), "E", part),
    )
    layers = Section(
        (
            *_linear(attention.child("k_proj"), "E", "E", part, bias=True),
            *_linear(attention.child("v_proj"), "E", "E", part, bias=True),
            *_linear(attention.child("q_proj"), "E", "E", part, bias=True),
            *_linear(attention.child("out_proj"), "E", "E", part, bias=True),
            *_layer_norm(layer.child("layer_norm1"), "E", part),
            *_linear(mlp.child("fc1"), "vision F", "E", part, bias=True),
            *_linear(mlp.child("fc2"), "E", "vision F", part, bias=True),
            *_layer_norm(layer.child("layer_norm2"), "E", part),
        ),
        lambda config: config.vision_config.num_hidden_layers,
    )
    return before, layers, _once(*_layer_norm(vision.child("post_layernorm"), "E", part))


def _resampler_sections() -> tuple[Section, ...]:
    part, exists = Part.RESAMPLER, _has_resampler
    resampler = MODEL.child("perceiver_resampler", h5="layers/perceiver_resampler")
    block = resampler.child("blocks.{i}", "blocks_{i}", "blocks/perceiver_block{nth}")
    attention = block.child("0", "attention", "attention", legacy_joint=".")
    mlp = block.child("1", "mlp", "mlp", legacy_joint=".")
    blocks = Section(
        (
            *_layer_norm(attention.child("context_layer_norm"), "E", part, exists),
            *_layer_norm(attention.child("latents_layer_norm"), "E", part, exists),
            *_layer_norm(attention.child("q_layer_norm"), "perceiver K", part, _has_resampler_norms),
            *_layer_norm(attention.child("k_layer_norm"), "perceiver K", part, _has_resampler_norms),
            *_linear(attention.child("q_proj"), "perceiver H*K", "E", part, exists),
            *_linear(attention.child("k_proj"), "perceiver H*K", "E", part, exists),
            *_linear(attention.child("v_proj"), "perceiver H*K", "E", part, exists),
            *_linear(attention.child("output_proj"), "E", "perceiver H*K", part, exists),
            *_layer_norm(mlp.child("ln"), "E", part, exists),
            *_linear(mlp.child("fc"), "perceiver F", "E", part, exists),
            *_linear(mlp.child("c_proj"), "E", "perceiver F", part, exists),
        ),
        lambda config: config.perceiver_config.resampler_depth,
    )
    return (
        _once(resampler.row("latents", "latents", 0, Kind.RAW, ("L", "E"), part, exists)),
        blocks,
        _once(*_layer_norm(resampler.child("layer_norm"), "E", part, exists)),
    )


def _decoder_sections() -> tuple[Section, ...]:
    part = Part.DECODER
    layer = MODEL.child("layers.{i}", "layers_{i}", "decoder_layers/decoder_layer{nth}")
    attention = layer.child("self_attn")
    layers = Section(
        (
            *_linear(attention.child("q_proj"), "D", "D", part),
            *_linear(attention.child("k_proj"), "D", "D", part),
            *_linear(attention.child("v_proj"), "D", "D", part),
            *_linear(attention.child("o_proj"), "D", "D", part),
            *_gated_mlp(layer.child("mlp"), part),
            *_rms_norm(layer.child("input_layernorm"), "D", part),
            *_rms_norm(layer.child("post_attention_layernorm"), "D", part),
        ),
        lambda config: config.num_hidden_layers,
    )
    return (layers,)


def _alphas(block, alpha_type, shape, legacy_leaf="alpha_cross_attn", initializers=ALPHA_INITIALIZERS):
    def exists(config) -> bool:
        return config.alpha_type == alpha_type and config.alpha_initializer in initializers

    leaves = (("alpha_cross_attn", legacy_leaf), ("alpha_dense", "alpha_dense"))
    return [
        block.row(leaf, leaf, i, Kind.RAW, shape, Part.CROSS_ATTENTION, exists, legacy_leaf=legacy_leaf)
        for i, (leaf, legacy_leaf) in enumerate(leaves)
    ]


def _cross_attention_sections() -> tuple[Section, ...]:
    part = Part.CROSS_ATTENTION
    block = MODEL.child(
        "gated_cross_attn_layers.{i}",
        "gated_cross_attn_layers_{i}",
        "gated_cross_attn_layers/gated_cross_attention_layer{nth}",
    )
    attention = block.child("cross_attn")
    blocks = Section(
        (
            *_alphas(block, "float", (1,), initializers=CONSTANT_ALPHA_INITIALIZERS),
            # transformers 4 made this scalar under a wrong name where it was to start at random
            *_alphas(block, "float", (1,), "alpha_type", RANDOM_ALPHA_INITIALIZERS),
            *_alphas(block, "vector", (1, 1, "D")),
            *_linear(attention.child("q_proj"), "D", "D", part),
            *_linear(attention.child("k_proj"), "D", "E", part),
            *_linear(attention.child("v_proj"), "D", "E", part),
            *_linear(attention.child("o_proj"), "D", "D", part),
            *_rms_norm(attention.child("q_layer_norm"), "text K", part, _has_cross_attention_norms),
            *_rms_norm(attention.child("k_layer_norm"), "text K", part, _has_cross_attention_norms),
            *_gated_mlp(block.child("mlp"), part),
            *_rms_norm(block.child("input_layernorm"), "D", part),
            *_rms_norm(block.child("post_attention_layernorm"), "D", part),
        ),
        num_cross_layers,
    )
    return blocks, _once(*_rms_norm(MODEL.child("norm", h5="layers/rms_norm"), "D", Part.DECODER))


def _head_section() -> Section:
    part, embedding, added = Part.HEAD, MODEL.child("embed_tokens"), HEAD.child("additional_fc")
    tied, tied_added = f"{embedding.name}.weight", f"{embedding.name}.additional_embedding.weight"
    return _once(
        HEAD.row("weight", "kernel", 0, Kind.LINEAR, ("V", "D"), part, _always, "base", tied, "weight"),
        added.row(
            "weight",
            "kernel",
            0,
            Kind.LINEAR,
            ("additional V", "D"),
            part,
            _has_additional_vocabulary,
            tied_to=tied_added,
        ),
    )


TABLE: tuple[Section, ...] = (
    _embedding_section(),
    *_vision_sections(),
    *_resampler_sections(),
    *_decoder_sections(),
    *_cross_attention_sections(),
    _head_section(),
)


def iterate(config) -> Iterator[Parameter]:
    """The tensors of one model in the order of its modules; see `expand`."""
    sizes = dimensions(config)
    for section in TABLE:
        rows = [row for row in section.rows if row.exists(config)]
        for i in range(section.repeats(config)):
            for row in rows:
                yield Parameter(
                    name=row.template.format(i=i),
                    shape=tuple(sizes[axis] if isinstance(axis, str) else axis for axis in row.shape),
                    kind=row.kind,
                    part=row.part,
                    keras_path=row.keras.format(i=i),
                    h5_path=row.h5.format(nth=f"_{i}" if i else ""),
                    legacy_name=row.legacy.format(i=i),
                    tied_to=row.tied_to if config.tie_word_embeddings else None,
                )


def expand(config) -> tuple[Parameter, ...]:
    """Every tensor of the model that `config` describes, tied ones included, in the order of its modules.

    Args:
        config: an `IdeficsConfig` or plain `IdeficsFields`.
    """
    return tuple(iterate(config))


def count_parameters(config) -> dict[Part, int]:
    """Number of elements per part, each tied tensor counted once, where it is defined."""
    counts = dict.fromkeys(Part, 0)
    for parameter in iterate(config):
        if parameter.tied_to is None:
            counts[parameter.part] += parameter.size
    return counts


def stale_buffer_names(config) -> frozenset[str]:
    """Names that older checkpoints carry and that are no parameters: rotary frequencies and position indices.

    They are recomputed from the configuration, so a reader drops them, by these exact names and no others.
    """
    names = {"model.vision_model.embeddings.position_ids"}
    names.update(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_hidden_layers))
    names.update(
        f"model.gated_cross_attn_layers.{i}.cross_attn.rotary_emb.inv_freq" for i in range(num_cross_layers(config))
    )
    return frozenset(names)
