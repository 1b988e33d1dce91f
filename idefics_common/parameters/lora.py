"""LoRA (Hu et al., 2021) by named presets: which linear layers get adapters, so that nobody has to spell their names.

Unusual: the names are the linear kernels of a part in the parameter table, in full. A short name would not do: the
vision tower, the decoder and the gated blocks all have a `q_proj`, and `layers.0.self_attn.q_proj` is in two of them.
"""

from collections.abc import Iterable

from idefics_common.parameters.expansion import Parameter, expand
from idefics_common.parameters.rows import Kind, Part

PRESETS = {
    "text": Part.DECODER,
    "cross_attention": Part.CROSS_ATTENTION,
    "resampler": Part.RESAMPLER,
    "vision": Part.VISION,
}
"""Presets, each all linear layers of one part."""


def lora_parameters(config, presets: str | Iterable[str]) -> list[Parameter]:
    """The kernels of the linear layers that presets stand for; see `lora_targets`."""
    presets = [presets] if isinstance(presets, str) else list(presets)
    unknown = [preset for preset in presets if preset not in PRESETS]
    if unknown or not presets:
        raise ValueError(f"LoRA presets are {', '.join(PRESETS)}; got {unknown or 'none'}.")
    linear = [parameter for parameter in expand(config) if parameter.kind is Kind.LINEAR]
    for preset in presets:
        if not any(parameter.part is PRESETS[preset] for parameter in linear):
            raise ValueError(f"The LoRA preset {preset!r} needs a {PRESETS[preset]}, and this model has none.")
    parts = {PRESETS[preset] for preset in presets}
    return [parameter for parameter in linear if parameter.part in parts]


def lora_targets(config, presets: str | Iterable[str]) -> list[str]:
    """Names of the linear layers of an `IdeficsForVisionText2Text` that presets stand for.

    Args:
        config: the model's configuration.
        presets: one name out of `PRESETS`, or several.

    Raises:
        ValueError: if a preset is unknown, or the model has no such part.
    """
    return [module_name(parameter) for parameter in lora_parameters(config, presets)]


def module_name(parameter: Parameter) -> str:
    """The name of the module that a parameter belongs to, such as the linear layer of a kernel."""
    return parameter.name.rpartition(".")[0]


def saved_parameters(config, modules: Iterable[str]) -> list[Parameter]:
    """The parameters of modules that train as they are beside adapters; see `modules_to_save` of PEFT.

    Args:
        config: the model's configuration.
        modules: names of modules, or ends of names: "lm_head", "additional_embedding".

    Raises:
        ValueError: if the model has no such module.
    """
    chosen = {}
    for module in modules:
        found = [parameter for parameter in expand(config) if f".{module}." in f".{parameter.name}"]
        if not found:
            raise ValueError(f"modules_to_save names {module!r}, and the model has no such module.")
        chosen |= {parameter.name: parameter for parameter in found}
    return list(chosen.values())
