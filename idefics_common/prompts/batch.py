"""`IdeficsBatch`: what `IdeficsProcessor` returns, a `BatchFeature` whose image mask follows its tokens.

Unusual: putting new `input_ids` into the batch puts a new `image_attention_mask` there, too. Collators of others, TRL's
for example, append completions to prompts and move rows to the left; the mask of the old tokens would then show images
to the wrong tokens, and nothing could tell.
"""

from collections.abc import Callable

from transformers import BatchFeature


class IdeficsBatch(BatchFeature):
    """A `BatchFeature` of the processor's arrays or tensors.

    Args:
        data: the values by name.
        image_mask: makes the image mask (B, T, I) of `input_ids` (B, T) in their framework; None for a batch that
            stays as it is. It is not copied, moved to another device or pickled along.
    """

    _image_mask: Callable | None = None

    def __init__(self, data=None, image_mask: Callable | None = None, **kwargs):
        super().__init__(data, **kwargs)
        self._image_mask = image_mask

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        if name == "input_ids" and self._image_mask is not None:
            super().__setitem__("image_attention_mask", self._image_mask(value))
