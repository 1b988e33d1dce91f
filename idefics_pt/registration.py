"""Put our classes behind transformers' `Auto...` classes, and take them away again.

Unusual: never done on import. transformers knows `model_type` "idefics" already, so this replaces its entries, and
`unregister` gives them back.
"""

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
_removed_names: dict[str, str] = {}


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`, `AutoImageProcessor` and `AutoProcessor` return
    our classes for IDEFICS checkpoints, in this process, until `unregister`.
    """
    AutoConfig.register(_MODEL_TYPE, IdeficsConfig, exist_ok=True)
    AutoModel.register(IdeficsConfig, IdeficsModel, exist_ok=True)
    AutoModelForImageTextToText.register(IdeficsConfig, IdeficsForVisionText2Text, exist_ok=True)
    AutoImageProcessor.register(IdeficsConfig, image_processor_classes={"pil": IdeficsImageProcessor}, exist_ok=True)
    AutoProcessor.register(IdeficsConfig, IdeficsProcessor, exist_ok=True)
    # AutoProcessor goes by the class name that the files hold, where transformers' class of that name comes first
    if _MODEL_TYPE in PROCESSOR_MAPPING_NAMES:
        _removed_names[_MODEL_TYPE] = PROCESSOR_MAPPING_NAMES.pop(_MODEL_TYPE)


def unregister() -> None:
    """Undo `register`; without it, do nothing."""
    CONFIG_MAPPING._extra_content.pop(_MODEL_TYPE, None)
    PROCESSOR_MAPPING_NAMES.update(_removed_names)
    for mapping in (MODEL_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING):
        mapping._extra_content.pop(IdeficsConfig, None)
