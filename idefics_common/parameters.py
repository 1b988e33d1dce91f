"""The one table of IDEFICS parameters: every tensor of every checkpoint, listed once.

A row of the table is a name template, a kind, a shape in terms of the configuration, the condition under which the
tensor exists, and the part of the model it belongs to. `expand(config)` turns rows into the tensors of one model.
Names are only ever made from the table, never parsed back, and a layout is never guessed from a shape: LLaMA's
query, key, value and output kernels are square, so a missing transpose would have the right shape.

The canonical name is the key in the published checkpoints, spelling mistakes included (`pre_layrnorm`), and the
canonical layout is PyTorch's: linear kernels are (out, in), convolution kernels (out, in, height, width).

`config` is `idefics_common.config_fields.IdeficsFields` or an `IdeficsConfig`; this module needs no transformers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum


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
        tied_to: the canonical name of the tensor that this one is the same as, or None. A tied tensor need not be in
            a file.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    part: Part
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
        shape: names of axes, looked up in `dimensions`, or numbers.
        exists: whether a configuration has this tensor.
        tied_to: template of the tensor it is tied to when `tie_word_embeddings` is set.
    """

    template: str
    kind: Kind
    shape: tuple[str | int, ...]
    part: Part
    exists: Callable[[object], bool]
    tied_to: str | None = None


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


def _linear(name, out_axis, in_axis, part, exists=_always, bias=False):
    rows = [Row(f"{name}.weight", Kind.LINEAR, (out_axis, in_axis), part, exists)]
    if bias:
        rows.append(Row(f"{name}.bias", Kind.BIAS, (out_axis,), part, exists))
    return rows


def _layer_norm(name, axis, part, exists=_always):
    return [Row(f"{name}.{leaf}", Kind.LAYER_NORM, (axis,), part, exists) for leaf in ("weight", "bias")]


def _rms_norm(name, axis, part, exists=_always):
    return [Row(f"{name}.weight", Kind.RMS_NORM, (axis,), part, exists)]


def _raw(name, shape, part, exists=_always):
    return [Row(name, Kind.RAW, shape, part, exists)]


def _gated_mlp(name, part):
    return [
        *_linear(f"{name}.gate_proj", "F", "D", part),
        *_linear(f"{name}.down_proj", "D", "F", part),
        *_linear(f"{name}.up_proj", "F", "D", part),
    ]


def _once(*rows) -> Section:
    return Section(rows, lambda config: 1)


def _embedding_section() -> Section:
    name, part = "model.embed_tokens", Part.EMBEDDING
    return _once(
        Row(f"{name}.weight", Kind.EMBEDDING, ("V", "D"), part, _always),
        Row(
            f"{name}.additional_embedding.weight",
            Kind.EMBEDDING,
            ("additional V", "D"),
            part,
            _has_additional_vocabulary,
        ),
    )


def _vision_sections() -> tuple[Section, ...]:
    name, part = "model.vision_model", Part.VISION
    layer = f"{name}.encoder.layers.{{i}}"
    embeddings = _once(
        *_raw(f"{name}.embeddings.class_embedding", ("E",), part),
        Row(
            f"{name}.embeddings.patch_embedding.weight",
            Kind.CONV,
            ("E", "C", "patch", "patch"),
            part,
            _always,
        ),
        Row(f"{name}.embeddings.position_embedding.weight", Kind.EMBEDDING, ("P", "E"), part, _always),
        *_layer_norm(f"{name}.pre_layrnorm", "E", part),
    )
    layers = Section(
        (
            *_linear(f"{layer}.self_attn.k_proj", "E", "E", part, bias=True),
            *_linear(f"{layer}.self_attn.v_proj", "E", "E", part, bias=True),
            *_linear(f"{layer}.self_attn.q_proj", "E", "E", part, bias=True),
            *_linear(f"{layer}.self_attn.out_proj", "E", "E", part, bias=True),
            *_layer_norm(f"{layer}.layer_norm1", "E", part),
            *_linear(f"{layer}.mlp.fc1", "vision F", "E", part, bias=True),
            *_linear(f"{layer}.mlp.fc2", "E", "vision F", part, bias=True),
            *_layer_norm(f"{layer}.layer_norm2", "E", part),
        ),
        lambda config: config.vision_config.num_hidden_layers,
    )
    return embeddings, layers, _once(*_layer_norm(f"{name}.post_layernorm", "E", part))


def _resampler_sections() -> tuple[Section, ...]:
    name, part, exists = "model.perceiver_resampler", Part.RESAMPLER, _has_resampler
    attention, mlp = f"{name}.blocks.{{i}}.0", f"{name}.blocks.{{i}}.1"
    blocks = Section(
        (
            *_layer_norm(f"{attention}.context_layer_norm", "E", part, exists),
            *_layer_norm(f"{attention}.latents_layer_norm", "E", part, exists),
            *_layer_norm(f"{attention}.q_layer_norm", "perceiver K", part, _has_resampler_norms),
            *_layer_norm(f"{attention}.k_layer_norm", "perceiver K", part, _has_resampler_norms),
            *_linear(f"{attention}.q_proj", "perceiver H*K", "E", part, exists),
            *_linear(f"{attention}.k_proj", "perceiver H*K", "E", part, exists),
            *_linear(f"{attention}.v_proj", "perceiver H*K", "E", part, exists),
            *_linear(f"{attention}.output_proj", "E", "perceiver H*K", part, exists),
            *_layer_norm(f"{mlp}.ln", "E", part, exists),
            *_linear(f"{mlp}.fc", "perceiver F", "E", part, exists),
            *_linear(f"{mlp}.c_proj", "E", "perceiver F", part, exists),
        ),
        lambda config: config.perceiver_config.resampler_depth,
    )
    return (
        _once(*_raw(f"{name}.latents", ("L", "E"), part, exists)),
        blocks,
        _once(*_layer_norm(f"{name}.layer_norm", "E", part, exists)),
    )


def _decoder_sections() -> tuple[Section, ...]:
    part = Part.DECODER
    layer = "model.layers.{i}"
    layers = Section(
        (
            *_linear(f"{layer}.self_attn.q_proj", "D", "D", part),
            *_linear(f"{layer}.self_attn.k_proj", "D", "D", part),
            *_linear(f"{layer}.self_attn.v_proj", "D", "D", part),
            *_linear(f"{layer}.self_attn.o_proj", "D", "D", part),
            *_gated_mlp(f"{layer}.mlp", part),
            *_rms_norm(f"{layer}.input_layernorm", "D", part),
            *_rms_norm(f"{layer}.post_attention_layernorm", "D", part),
        ),
        lambda config: config.num_hidden_layers,
    )
    return (layers,)


def _alpha(name, alpha_type, shape):
    return Row(name, Kind.RAW, shape, Part.CROSS_ATTENTION, lambda config: config.alpha_type == alpha_type)


def _cross_attention_sections() -> tuple[Section, ...]:
    part = Part.CROSS_ATTENTION
    block = "model.gated_cross_attn_layers.{i}"
    blocks = Section(
        (
            _alpha(f"{block}.alpha_cross_attn", "float", (1,)),
            _alpha(f"{block}.alpha_cross_attn", "vector", (1, 1, "D")),
            _alpha(f"{block}.alpha_dense", "float", (1,)),
            _alpha(f"{block}.alpha_dense", "vector", (1, 1, "D")),
            *_linear(f"{block}.cross_attn.q_proj", "D", "D", part),
            *_linear(f"{block}.cross_attn.k_proj", "D", "E", part),
            *_linear(f"{block}.cross_attn.v_proj", "D", "E", part),
            *_linear(f"{block}.cross_attn.o_proj", "D", "D", part),
            *_rms_norm(f"{block}.cross_attn.q_layer_norm", "text K", part, _has_cross_attention_norms),
            *_rms_norm(f"{block}.cross_attn.k_layer_norm", "text K", part, _has_cross_attention_norms),
            *_gated_mlp(f"{block}.mlp", part),
            *_rms_norm(f"{block}.input_layernorm", "D", part),
            *_rms_norm(f"{block}.post_attention_layernorm", "D", part),
        ),
        num_cross_layers,
    )
    return blocks, _once(*_rms_norm("model.norm", "D", Part.DECODER))


def _head_section() -> Section:
    part, embedding = Part.HEAD, "model.embed_tokens"
    return _once(
        Row("lm_head.weight", Kind.LINEAR, ("V", "D"), part, _always, tied_to=f"{embedding}.weight"),
        Row(
            "lm_head.additional_fc.weight",
            Kind.LINEAR,
            ("additional V", "D"),
            part,
            _has_additional_vocabulary,
            tied_to=f"{embedding}.additional_embedding.weight",
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
