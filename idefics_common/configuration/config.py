"""`IdeficsConfig` and its two parts, on transformers' `PreTrainedConfig`.

The fields, their defaults and the rules live in `configuration.fields`, which does not need transformers; this
module adds what `PreTrainedConfig` gives: files, the hub, and a place in `PreTrainedModel`. ``config.json`` files are
interchangeable with transformers' own IDEFICS in both directions.
"""

import sys

from huggingface_hub.dataclasses import strict

from idefics_common.configuration.fields import (
    IdeficsFields,
    PerceiverFields,
    VisionFields,
    settle_fields,
    settle_vision_fields,
)
from idefics_common.configuration.vocabulary import VocabularySize
from idefics_common.parameters.parallel_plans import fully_sharded_plan, tensor_parallel_plan
from idefics_common.torch_later import torch_left_for_later

with torch_left_for_later():
    from transformers import PreTrainedConfig
    from transformers.utils import logging

logger = logging.get_logger(__name__)


class _Config(PreTrainedConfig):
    """A configuration whose `dtype` is torch's where torch is imported, and its name elsewhere.

    transformers would import torch to look it up wherever torch is installed; it takes names as well.
    """

    def __post_init__(self, **kwargs):
        if "torch" in sys.modules:
            super().__post_init__(**kwargs)
            return
        older = kwargs.pop("torch_dtype", None)
        dtype, self.dtype = older if self.dtype is None else self.dtype, None
        super().__post_init__(**kwargs)
        self.dtype = dtype


@strict
class IdeficsVisionConfig(VisionFields, _Config):
    """The vision tower: a CLIP ViT on square images. Fields: `idefics_common.configuration.fields.VisionFields`."""

    model_type = "idefics_vision"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "embed_dim"}  # noqa: RUF012 - read by PreTrainedConfig as a class attribute

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        settle_vision_fields(self)


@strict
class IdeficsPerceiverConfig(PerceiverFields, _Config):
    """The Perceiver resampler. Fields: `idefics_common.configuration.fields.PerceiverFields`."""

    model_type = "idefics_perciever"  # spelled as in the published files
    base_config_key = "perceiver_config"


@strict
class IdeficsConfig(IdeficsFields, _Config):
    """An IDEFICS model. Fields: `IdeficsFields`; `vision_config` and `perceiver_config`
    take a dict, a configuration, or nothing for the defaults.

    Whether the fields go together is asked when a model is built from them (`check_fields`). Values of a wrong type are
    refused at once, by transformers' own check of fields.
    """

    model_type = "idefics"
    # `Trainer` would gather them for a whole evaluation set
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]  # noqa: RUF012 - as in transformers
    sub_configs_defaults = {  # noqa: RUF012 - read by PreTrainedConfig as a class attribute
        "perceiver_config": IdeficsPerceiverConfig,
        "vision_config": IdeficsVisionConfig,
    }

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        settle_fields(self)

    @property
    def vocab_size(self) -> VocabularySize:
        """The size of the base vocabulary; see `VocabularySize` for what it is equal to."""
        return VocabularySize(self.base_vocab_size, self.__dict__.get("additional_vocab_size", 0))

    @property
    def base_vocab_size(self) -> int:
        """The same as a mere number, as graphs want it."""
        return self.__dict__["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, size: int):
        self.__dict__["vocab_size"] = int(size)

    def validate_token_ids(self):
        """Warn of special tokens that the vocabulary does not have.

        It replaces transformers' own check, which leaves the additional vocabulary out and warns of every image token.
        """
        size = self.vocab_size + self.additional_vocab_size
        for name in self:
            value = getattr(self, name)
            if name.endswith("_token_id") and isinstance(value, int) and not 0 <= value < size:
                logger.warning_once(f"config.json: {name} must be None or from 0 to {size - 1}, got {value}.")

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """What `tp_plan="auto"` splits; see `idefics_common.parameters.parallel_plans`."""
        return tensor_parallel_plan(self)

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What FSDP2 gathers together; see `idefics_common.parameters.parallel_plans`."""
        return fully_sharded_plan(self)


__all__ = ["IdeficsConfig", "IdeficsPerceiverConfig", "IdeficsVisionConfig"]
