"""The one table of IDEFICS parameters: every tensor of every checkpoint, listed once.

A row is a name template, a kind, a shape in terms of the configuration, the condition under which the tensor exists,
and the part of the model it belongs to: see `rows`. `expansion.expand` turns rows into the tensors of one model. Names
are only ever made from the table, never parsed back, and a layout is never guessed from a shape: LLaMA's query, key,
value and output kernels are square, so a missing transpose would have the right shape.

`config` is `IdeficsFields` or an `IdeficsConfig`; this module needs no transformers.
"""

from operator import attrgetter

from idefics_common.configuration.fields import (
    ALPHA_INITIALIZERS,
    CONSTANT_ALPHA_INITIALIZERS,
    RANDOM_ALPHA_INITIALIZERS,
)
from idefics_common.parameters.rows import Kind, Module, Part, Section

MODEL = Module("model", "model", "layers/tf_idefics_model", "model")
"""The model without its language head; where it stands alone, its names start below this one."""

HEAD = Module("lm_head", "lm_head", "layers/decoupled_linear", "lm_head")

_HAS_ADDITIONAL_VOCABULARY = attrgetter("additional_vocab_size")
_HAS_CROSS_ATTENTION_NORMS = attrgetter("qk_layer_norms")


def num_cross_layers(config) -> int:
    """How many gated cross-attention blocks a model has: one before every `cross_layer_interval`-th decoder layer."""
    return config.num_hidden_layers // config.cross_layer_interval


def _always(config) -> bool:
    return True


def _has_resampler_norms(config) -> bool:
    return config.use_resampler and config.perceiver_config.qk_layer_norms_perceiver


def _linear(module, names, out_axis, in_axis, part, exists=_always, bias=False):
    """The rows of the linear layers of a module that have one shape; `names` are theirs, apart by spaces."""
    rows = []
    for layer in map(module.child, names.split()):
        rows.append(layer.row("weight", "kernel", 0, Kind.LINEAR, (out_axis, in_axis), part, exists))
        if bias:
            rows.append(layer.row("bias", "bias", 1, Kind.BIAS, (out_axis,), part, exists))
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
        *_linear(module, "gate_proj", "F", "D", part),
        *_linear(module, "down_proj", "D", "F", part),
        *_linear(module, "up_proj", "F", "D", part),
    ]


def _once(*rows) -> Section:
    return Section(rows, lambda config: 1)


def _embedding_section() -> Section:
    module, part = MODEL.child("embed_tokens"), Part.EMBEDDING
    added = module.child("additional_embedding")
    return _once(
        *_embedding(module, "V", "D", part, keras_child="base"),
        *_embedding(added, "additional V", "D", part, _HAS_ADDITIONAL_VOCABULARY),
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
            *_linear(attention, "k_proj v_proj q_proj out_proj", "E", "E", part, bias=True),
            *_layer_norm(layer.child("layer_norm1"), "E", part),
            *_linear(mlp, "fc1", "vision F", "E", part, bias=True),
            *_linear(mlp, "fc2", "E", "vision F", part, bias=True),
            *_layer_norm(layer.child("layer_norm2"), "E", part),
        ),
        attrgetter("vision_config.num_hidden_layers"),
    )
    return before, layers, _once(*_layer_norm(vision.child("post_layernorm"), "E", part))


def _resampler_sections() -> tuple[Section, ...]:
    part, exists = Part.RESAMPLER, attrgetter("use_resampler")
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
            *_linear(attention, "q_proj k_proj v_proj", "perceiver H*K", "E", part, exists),
            *_linear(attention, "output_proj", "E", "perceiver H*K", part, exists),
            *_layer_norm(mlp.child("ln"), "E", part, exists),
            *_linear(mlp, "fc", "perceiver F", "E", part, exists),
            *_linear(mlp, "c_proj", "E", "perceiver F", part, exists),
        ),
        attrgetter("perceiver_config.resampler_depth"),
    )
    return (
        _once(resampler.row("latents", "latents", 0, Kind.RAW, ("L", "E"), part, exists)),
        blocks,
        _once(*_layer_norm(resampler.child("layer_norm"), "E", part, exists)),
    )


def _decoder_section() -> Section:
    part = Part.DECODER
    layer = MODEL.child("layers.{i}", "layers_{i}", "decoder_layers/decoder_layer{nth}")
    return Section(
        (
            *_linear(layer.child("self_attn"), "q_proj k_proj v_proj o_proj", "D", "D", part),
            *_gated_mlp(layer.child("mlp"), part),
            *_rms_norm(layer.child("input_layernorm"), "D", part),
            *_rms_norm(layer.child("post_attention_layernorm"), "D", part),
        ),
        attrgetter("num_hidden_layers"),
    )


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
            *_linear(attention, "q_proj", "D", "D", part),
            *_linear(attention, "k_proj v_proj", "D", "E", part),
            *_linear(attention, "o_proj", "D", "D", part),
            *_rms_norm(attention.child("q_layer_norm"), "text K", part, _HAS_CROSS_ATTENTION_NORMS),
            *_rms_norm(attention.child("k_layer_norm"), "text K", part, _HAS_CROSS_ATTENTION_NORMS),
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
    exists, shape = _HAS_ADDITIONAL_VOCABULARY, ("additional V", "D")
    return _once(
        HEAD.row("weight", "kernel", 0, Kind.LINEAR, ("V", "D"), part, _always, "base", tied, "weight"),
        added.row("weight", "kernel", 0, Kind.LINEAR, shape, part, exists, tied_to=tied_added),
    )


TABLE: tuple[Section, ...] = (
    _embedding_section(),
    *_vision_sections(),
    *_resampler_sections(),
    _decoder_section(),
    *_cross_attention_sections(),
    _head_section(),
)
