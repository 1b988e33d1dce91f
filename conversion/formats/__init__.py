"""The formats that can be read and written. HDF5 is imported only when one of its formats is asked for."""

from functools import cache

from conversion.formats.base import Format
from conversion.formats.bin_format import BinFormat
from conversion.formats.safetensors_format import SafetensorsFormat

FORMAT_NAMES = ("safetensors", "bin", "keras", "tf-h5")
"""As ``--to`` spells them, and in the order in which a directory is searched: that of transformers, then Keras's."""


@cache
def format_of(name: str) -> Format:
    """The format of a name. Raises KeyError for any other."""
    match name:
        case "safetensors":
            return SafetensorsFormat()
        case "bin":
            return BinFormat()
        case "keras":
            from conversion.formats.keras_format import KerasFormat

            return KerasFormat()
        case "tf-h5":
            from conversion.formats.legacy_format import LegacyFormat

            return LegacyFormat()
    raise KeyError(name)


__all__ = ["FORMAT_NAMES", "Format", "format_of"]
