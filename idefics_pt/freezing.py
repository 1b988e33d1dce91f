"""Which parameters train: freezing as the configuration asks for it.

Unusual: the base vocabulary is frozen with the text layers, the additional one never; gated blocks and the resampler
always train. Loading makes every parameter trainable, so this runs again after `from_pretrained`.

Mirrors `idefics_tf/freezing.py`.
"""

from torch import nn

from idefics_common.configuration.fields import check_module_exceptions
from idefics_pt.layers import RMSNorm

EXCEPTIONS = {
    "LayerNorm": (nn.LayerNorm, RMSNorm),
    "RMSNorm": (RMSNorm,),
    "Linear": (nn.Linear,),
    "Embedding": (nn.Embedding,),
}
"""What each name of `idefics_common.configuration.fields.MODULE_EXCEPTIONS` stands for."""


def freeze(module: nn.Module, exceptions=()) -> None:
    """Freeze all parameters of `module` but those of the kinds of module named in `exceptions`.

    Raises:
        ValueError: if a name is not one of `EXCEPTIONS`.
    """
    check_module_exceptions(exceptions, "exceptions")
    kept = tuple(kind for name in exceptions for kind in EXCEPTIONS[name])
    module.requires_grad_(False)
    for child in module.modules():
        if isinstance(child, kept):
            child.requires_grad_(True)


def freeze_as_configured(model) -> None:
    """Freeze what the configuration of an `IdeficsModel` wants frozen; the rest is untouched."""
    config = model.config
    if config.freeze_text_layers:
        model.embed_tokens.weight.requires_grad_(False)
        for module in (model.layers, model.norm):
            freeze(module, config.freeze_text_module_exceptions)
    if config.freeze_vision_layers:
        freeze(model.vision_model, config.freeze_vision_module_exceptions)
