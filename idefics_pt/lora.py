"""LoRA through PEFT: its configuration from the presets of `idefics_common.parameters.lora`.

Mirrors `idefics_tf/lora.py`. Needs PEFT, which comes with the extra `train`.
"""

from collections.abc import Iterable

from peft import LoraConfig

from idefics_common.parameters.lora import PRESETS, lora_targets

__all__ = ["PRESETS", "lora_config", "lora_targets"]


def lora_config(model, presets: str | Iterable[str], r: int = 16, **kwargs) -> LoraConfig:
    """PEFT's configuration for LoRA on an `IdeficsForVisionText2Text`; give it to `peft.get_peft_model`.

    The vocabulary is no preset. To train it, name its modules in PEFT's `modules_to_save`: `embed_tokens` and
    `lm_head`, or `additional_embedding` and `additional_fc` for the added rows alone.

    Args:
        model: the model, or its configuration.
        presets: see `idefics_common.parameters.lora.lora_targets`.
        r: rank of the adapters.
        **kwargs: everything else that `peft.LoraConfig` takes. `lora_alpha` is twice the rank unless given.

    Raises:
        ValueError: as `lora_targets`.
    """
    targets = lora_targets(getattr(model, "config", model), presets)
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "target_modules": targets, **kwargs})
