"""IDEFICS in Keras 3 on TensorFlow: `TFIdeficsForVisionText2Text`, the same model as `idefics_pt`'s, exactly.

File by file it mirrors `idefics_pt`. Nothing here executes torch, and no environment variable is changed.
"""

from idefics_common.command_line import is_run

if not is_run(__name__):
    import idefics_tf.backend  # noqa: F401 - first, for its error
    from idefics_common import (
        IdeficsCollator,
        IdeficsConfig,
        IdeficsImageProcessor,
        IdeficsPerceiverConfig,
        IdeficsProcessor,
        IdeficsVisionConfig,
    )
    from idefics_tf.cache import TFIdeficsCache
    from idefics_tf.model import TFIdeficsForVisionText2Text, TFIdeficsModel
    from idefics_tf.pretrained import TFIdeficsPreTrainedModel

__all__ = [
    "IdeficsCollator",
    "IdeficsConfig",
    "IdeficsImageProcessor",
    "IdeficsPerceiverConfig",
    "IdeficsProcessor",
    "IdeficsVisionConfig",
    "TFIdeficsCache",
    "TFIdeficsForVisionText2Text",
    "TFIdeficsModel",
    "TFIdeficsPreTrainedModel",
]
