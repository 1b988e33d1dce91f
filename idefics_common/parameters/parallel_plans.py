"""How a model is split over several devices: plans by name, for transformers' tensor parallelism and for FSDP2.

A tensor-parallel plan follows the parameter table: the first linear layers of an attention or an MLP are split by
output, the last one by input, so that one sum per attention and per MLP is all that travels. Attention heads stay
whole; norms inside heads are the same on every device, but each sees the gradient of its own heads only.

Plans are plain names and words, and nothing here imports a framework. ``*`` in a name stands for the number of a layer.
"""

from idefics_common.parameters.rows import Kind, Part
from idefics_common.parameters.table import MODEL, TABLE

_SPLIT_PARTS = (Part.VISION, Part.RESAMPLER, Part.DECODER, Part.CROSS_ATTENTION)
_STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc", "fc1"), "colwise"),
    **dict.fromkeys(("o_proj", "out_proj", "output_proj", "down_proj", "c_proj", "fc2"), "rowwise"),
    **dict.fromkeys(("q_layer_norm", "k_layer_norm"), "replicated_with_grad_allreduce"),
}
"""Styles of transformers by the last name of a module. Norms that are not of heads need none."""


def tensor_parallel_plan(config) -> dict[str, str]:
    """Styles of all modules that are split, by their names in `IdeficsModel`.

    Args:
        config: an `IdeficsConfig` or plain `IdeficsFields`.
    """
    plan = {"embed_tokens": "decoupled_embedding"}
    for section in TABLE:
        for row in section.rows:
            module = row.template.rpartition(".")[0]
            leaf = module.rpartition(".")[2]
            if row.part in _SPLIT_PARTS and row.exists(config) and (row.kind is Kind.LINEAR or leaf in _STYLES):
                plan[module.removeprefix(f"{MODEL.name}.").format(i="*")] = _STYLES[leaf]
    return plan


def fully_sharded_plan(config) -> dict[str, str]:
    """What FSDP2 gathers as one unit, and whether it frees it after use, by names in `IdeficsModel`."""
    units = ["embed_tokens", "layers.*", "gated_cross_attn_layers.*", "vision_model.encoder.layers.*"]
    if config.use_resampler:
        units.append("perceiver_resampler")
    return {**dict.fromkeys(units, "free_full_weight"), "norm": "keep_full_weight"}
