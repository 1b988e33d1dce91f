"""Put our classes behind transformers' `Auto...` classes and under its names, and take them away again.

Unusual: never done on import. transformers knows `model_type` "idefics" already, so this replaces its entries, and
`unregister` gives them back.
"""

import sys

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, PROCESSOR_MAPPING_NAMES

from idefics_common.configuration.config import IdeficsConfig
from idefics_common.images.processing import IdeficsImageProcessor
from idefics_common.prompts.processor import IdeficsProcessor
from idefics_pt.model import IdeficsForVisionText2Text, IdeficsModel

_MODEL_TYPE = IdeficsConfig.model_type
_MODELS = (IdeficsForVisionText2Text, IdeficsModel)
_removed_names: dict[str, str] = {}


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`, `AutoImageProcessor` and `AutoProcessor` return
    our classes for IDEFICS checkpoints, in this process, until `unregister`; and let the names of our models in the
    package `transformers` be ours: TRL and pipelines look up there the class that a config.json names.
    """
    AutoConfig.register(_MODEL_TYPE, IdeficsConfig, exist_ok=True)
    AutoModel.register(IdeficsConfig, IdeficsModel, exist_ok=True)
    AutoModelForImageTextToText.register(IdeficsConfig, IdeficsForVisionText2Text, exist_ok=True)
    AutoImageProcessor.register(IdeficsConfig, image_processor_classes={"pil": IdeficsImageProcessor}, exist_ok=True)
    AutoProcessor.register(IdeficsConfig, IdeficsProcessor, exist_ok=True)
    for module in _packages():
        vars(module).update({model_class.__name__: model_class for model_class in _MODELS})
    # AutoProcessor goes by the class name that the files hold, where transformers' class of that name comes first
    if _MODEL_TYPE in PROCESSOR_MAPPING_NAMES:
        _removed_names[_MODEL_TYPE] = PROCESSOR_MAPPING_NAMES.pop(_MODEL_TYPE)


def unregister() -> None:
    """Undo `register`; without it, do nothing."""
    CONFIG_MAPPING._extra_content.pop(_MODEL_TYPE, None)
    PROCESSOR_MAPPING_NAMES.update(_removed_names)
    for module in _packages():
        for model_class in _MODELS:
            if vars(module).get(model_class.__name__) is model_class:
                delattr(module, model_class.__name__)  # transformers looks its own up again
    for mapping in (MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING):
        mapping._extra_content.pop(IdeficsConfig, None)


def _packages() -> list:
    """The package `transformers`, as everyone has it: its __init__ runs twice, and those who imported it before that
    have another module than those who came later."""
    found = [vars(module).get("transformers") for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    found = [one for one in [sys.modules["transformers"], *found] if getattr(one, "__name__", None) == "transformers"]
    return list({id(one): one for one in found}.values())
