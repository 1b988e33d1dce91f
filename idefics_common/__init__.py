"""The backend-free core of the IDEFICS library: configuration, parameters, prompts, images, checkpoint files.

Nothing here imports torch, tensorflow or keras; where transformers would import torch, `torch_later` puts it off.
Exports are lazy (PEP 562), because transformers, on which configuration and processor build, takes a second to import:
``import idefics_common`` alone stays light, and the modules that never need transformers (`parameters`, `checkpoint`,
`prompts.image_masks`, `position_grid`) can be imported on their own.

One legend of axes for the whole project; a tensor's name ends in its axes wherever that helps the reader:

====  ==============================================================================
B     batch: rows of text
T     text queries: the positions computed in this call
S     text keys: all positions so far, cached ones included
I     images of one row
P     vision tokens of one image: the class token and the patches
L     latents of one image, when there is a resampler
M     image memory: the keys that text may attend to, I * L or I * P of them
D     width of the text decoder
E     width of the vision tower and of the resampler
H     attention heads
K     width of one head
F     width of an MLP
V     vocabulary: base vocabulary and, after it, the additional one
C     colour channels
====  ==============================================================================
"""

import importlib

_EXPORTS = {
    "IdeficsCollator": "idefics_common.prompts.collator",
    "IdeficsConfig": "idefics_common.configuration.config",
    "IdeficsImageProcessor": "idefics_common.images.processing",
    "IdeficsPerceiverConfig": "idefics_common.configuration.config",
    "IdeficsProcessor": "idefics_common.prompts.processor",
    "IdeficsVisionConfig": "idefics_common.configuration.config",
    "sample_checkpoint": "idefics_common.samples",
    "sample_photograph": "idefics_common.samples",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])
