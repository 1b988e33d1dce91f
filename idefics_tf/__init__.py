"""IDEFICS in Keras 3 on TensorFlow: `TFIdeficsForVisionText2Text`, the same model as `idefics_pt`'s, exactly.

File by file it mirrors `idefics_pt`. Nothing here executes torch, and no environment variable is changed.
"""

from idefics_common.command_line import is_run

if not is_run(__name__):
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ImportError(
            f"idefics_tf needs Keras on the TensorFlow backend, but Keras runs on {keras.backend.backend()!r}: set the "
            "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
        )

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
