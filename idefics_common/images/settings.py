"""Settings of image processing as transformers takes them: plain Python numbers, and `size` for `image_size`.

transformers checks the types of arguments strictly: it refuses 0 as a float, and a numpy integer as an int. Numbers are
converted before that check; what is no number is left for it to refuse.
"""

import numbers
from collections.abc import Mapping

import numpy as np

_FLOATS = ("image_mean", "image_std", "rescale_factor")
_INTEGERS = ("image_size", "size")


def plain_settings(settings: Mapping) -> dict:
    """A copy of `settings` in which image settings are made of `float` and `int`, lists and dictionaries.

    Args:
        settings: arguments by name. The entries of `images_kwargs` are converted, too; other arguments stay.
            `image_size` becomes `size`, and wins over one that is given beside it.

    Raises:
        ValueError: if `image_size` is not a positive integer.
    """
    plain = dict(settings)
    for name, value in settings.items():
        if name == "images_kwargs" and isinstance(value, Mapping):
            plain[name] = plain_settings(value)
        elif name in _FLOATS:
            plain[name] = _convert(value, numbers.Real, float)
        elif name in _INTEGERS:
            plain[name] = _convert(value, numbers.Integral, int)
    if (image_size := plain.pop("image_size", None)) is not None:
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size must be a positive integer, got {image_size!r}.")
        plain["size"] = {"height": image_size, "width": image_size}
    return plain


def _convert(value, kind: type, convert):
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, kind) and not isinstance(value, bool):
        return convert(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_convert(part, kind, convert) for part in value)
    if isinstance(value, dict):
        return {name: _convert(part, kind, convert) for name, part in value.items()}
    return value
