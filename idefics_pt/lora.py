"""LoRA (Hu et al., 2021) by named presets: which linear layers get adapters, so that nobody has to spell their names.

Unusual: the names are the linear kernels of a part in the parameter table, in full. A short name would not do: the
vision tower, the decoder and the gated blocks all have a `q_proj`, and `layers.0.self_attn.q_proj` is in two of them.

Needs PEFT, which comes with the extra `train`.
"""

from collections.abc import Iterable

from peft import LoraConfig

from idefics_common.parameters import Kind, Part, iterate

PRESETS = {
    "text": Part.DECODER,
    "cross_attention": Part.CROSS_ATTENTION,
    "resampler": Part.RESAMPLER,
    "vision": Part.VISION,
}
"""Presets, each all linear layers of one part.

The vocabulary is no preset. To train it, name its modules in PEFT's `modules_to_save`: `embed_tokens` and `lm_head`, or
`additional_embedding` and `additional_fc` for the added rows alone.
"""


def lora_targets(config, presets: str | Iterable[str]) -> list[str]:
    """Names of the linear layers of an `IdeficsForVisionText2Text` that presets stand for.

    Args:
        config: the model's configuration.
        presets: one name out of `PRESETS`, or several.

    Raises:
        ValueError: if a preset is unknown, or the model has no such part.
    """
    presets = [presets] if isinstance(presets, str) else list(presets)
    unknown = [preset for preset in presets if preset not in PRESETS]
    if unknown or not presets:
        raise ValueError(f"LoRA presets are {', '.join(PRESETS)}; got {unknown or 'none'}.")
    linear = [parameter for parameter in iterate(config) if parameter.kind is Kind.LINEAR]
    for preset in presets:
        if not any(parameter.part is PRESETS[preset] for parameter in linear):
            raise ValueError(f"The LoRA preset {preset!r} needs a {PRESETS[preset]}, and this model has none.")
    parts = {PRESETS[preset] for preset in presets}
    return [parameter.name.removesuffix(".weight") for parameter in linear if parameter.part in parts]


def lora_config(model, presets: str | Iterable[str], r: int = 16, **kwargs) -> LoraConfig:
    """PEFT's configuration for LoRA on an `IdeficsForVisionText2Text`; give it to `peft.get_peft_model`.

    Args:
        model: the model, or its configuration.
        presets: see `lora_targets`.
        r: rank of the adapters.
        **kwargs: everything else that `peft.LoraConfig` takes. `lora_alpha` is twice the rank unless given.

    Raises:
        ValueError: as `lora_targets`.
    """
    targets = lora_targets(getattr(model, "config", model), presets)
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "target_modules": targets, **kwargs})
