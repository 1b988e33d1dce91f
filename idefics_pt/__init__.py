"""IDEFICS in PyTorch: `IdeficsForVisionText2Text`, a drop-in for transformers' own, on the shared core.

File by file it mirrors `idefics_tf`. Nothing here imports TensorFlow or Keras.
"""

from idefics_common.command_line import is_run

if not is_run(__name__):
    import torch  # noqa: F401 - the core would leave it for later

    from idefics_common import (
        IdeficsCollator,
        IdeficsConfig,
        IdeficsImageProcessor,
        IdeficsPerceiverConfig,
        IdeficsProcessor,
        IdeficsVisionConfig,
    )
    from idefics_pt.model import IdeficsForVisionText2Text, IdeficsModel
    from idefics_pt.pretrained import IdeficsPreTrainedModel
    from idefics_pt.registration import register, unregister

__all__ = [
    "IdeficsCollator",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsImageProcessor",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsPreTrainedModel",
    "IdeficsProcessor",
    "IdeficsVisionConfig",
    "register",
    "unregister",
]
