"""The formats that can be read and written. HDF5 is imported only when one of its formats is asked for."""

import importlib
from functools import cache

from conversion.formats.base import Format

_CLASSES = {
    "safetensors": "safetensors_format.SafetensorsFormat",
    "bin": "bin_format.BinFormat",
    "keras": "keras_format.KerasFormat",
    "tf-h5": "legacy_format.LegacyFormat",
}

FORMAT_NAMES = tuple(_CLASSES)
"""As ``--to`` spells them, and in the order in which a directory is searched: that of transformers, then Keras's."""


@cache
def format_of(name: str) -> Format:
    """The format of a name. Raises KeyError for any other."""
    module, _, class_name = _CLASSES[name].partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)()


__all__ = ["FORMAT_NAMES", "Format", "format_of"]
