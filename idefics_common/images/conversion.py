"""Any image a user hands over, as an upright 8-bit RGB `PIL.Image`: one function, `to_rgb`.

What is decided here, once:

* Transparency (alpha, or a transparent colour) is composited on white, as it was in IDEFICS's training. Grey, palette,
  CMYK and the other modes go through Pillow's own conversion. Both are bit-identical to transformers.
* EXIF orientation is applied, so a photograph taken upright is seen upright. (transformers applies it to images it
  fetches, and not to `PIL.Image` objects.) A pixel array has no such tag and is taken as it is.
* 16-bit images are scaled to 8 bits; Pillow's conversion would saturate them to white. Modes ``I;16*`` say how deep
  they are. Modes ``I`` and ``F`` do not, and are judged by their values: floats up to 1 are fractions of white, values
  up to 255 are 8-bit, values up to 65535 are 16-bit, and anything else is refused.
* Arrays are (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels (grey, RGB, RGBA). uint8 and uint16 say what white
  is. Other numbers are judged like modes ``I`` and ``F``, but up to 255 only; NaN and the rest are refused.
* Fractions just above 1 are refused: read as 8 bits they are black, but most likely resizing went beyond white.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from idefics_common.tensors import to_numpy

_ORIENTATION = 0x0112  # the EXIF tag; 1, or its absence, is upright
_CHANNELS = (1, 3, 4)


def is_image(value) -> bool:
    """Whether `to_rgb` may be tried on it: a `PIL.Image`, a numpy array, or a torch or TensorFlow tensor."""
    return isinstance(value, Image.Image) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def is_encoded(value) -> bool:
    """Whether it is the content of an image file: bytes, or ``{"bytes": ..., "path": ...}`` as `datasets` stores it."""
    return isinstance(value, (bytes, bytearray, memoryview)) or (
        isinstance(value, Mapping) and bool(value) and value.keys() <= {"bytes", "path"}
    )


def to_rgb(image, *, name: str = "the image", input_data_format: str | None = None) -> Image.Image:
    """Convert one image to mode RGB; see the module's docstring for the rules.

    Args:
        image: a `PIL.Image`, a numpy array, or a torch or TensorFlow tensor.
        name: what errors call it.
        input_data_format: "channels_first" or "channels_last", for arrays of three axes. Needed only where the shape
            leaves it open.

    Returns:
        The image itself where it already is upright RGB, else a new one.

    Raises:
        TypeError: for something that is no image.
        ValueError: for an image without pixels, an array of another shape, values out of range, a mode Pillow cannot
            convert, or pixels that cannot be read.
    """
    if not is_image(image):
        raise TypeError(f"{name}: expected a PIL image, an array or a tensor, got {type(image).__name__}.")
    if 0 in (size := image.size if isinstance(image, Image.Image) else tuple(image.shape)):
        raise ValueError(f"{name}: the image has no pixels, its size is {' x '.join(map(str, size))}.")
    if not isinstance(image, Image.Image):
        return _flatten(_array_to_image(to_numpy(image), name, input_data_format))
    try:
        return _flatten(_upright(_to_8_bit(image, name)))
    except OSError as error:
        raise ValueError(f"{name}: the image cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} (mode {image.mode}): {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's EXIF reader lets SyntaxError, struct.error and more escape from a damaged block
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _flatten(image: Image.Image) -> Image.Image:
    """To RGB, with transparency on white."""
    if image.mode in ("RGBa", "La"):  # premultiplied alpha: Pillow converts them only to their plain kin
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale the modes that hold more than 8 bits; they are all grey. Keeps the EXIF block."""
    if image.mode.startswith("I;16"):
        pixels = _from_16_bit(np.asarray(image))
    elif image.mode in ("I", "F"):
        pixels = _by_range(np.asarray(image))
    else:
        return image
    grey = Image.fromarray(pixels)
    if "exif" in image.info:
        grey.info["exif"] = image.info["exif"]
    return grey


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to nearest


def _by_range(values: np.ndarray, largest: int = 65535) -> np.ndarray:
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= largest:  # false for NaN as well
        raise ValueError(
            f"expected values from 0 to {largest}, got {low} to {high}; floats may also be from 0 to 1. What is "
            "normalised already is no image any more, but the model's pixel_values."
        )
    if values.dtype.kind == "f" and high <= 1:
        scale = 255.0
    elif values.dtype.kind == "f" and high < 2 and not np.array_equal(values, np.rint(values)):
        raise ValueError(
            f"expected values from 0 to 1 or from 0 to {largest}, got {low} to {high}, which may be either. Clip "
            "fractions of white to 1, or round the others."
        )
    else:
        scale = 1.0 if high <= 255 else 1 / 257
    return np.rint(values * scale).astype(np.uint8)


def _array_to_image(array: np.ndarray, name: str, input_data_format: str | None) -> Image.Image:
    if array.dtype == np.uint16:
        array = _from_16_bit(array)
    elif array.dtype.kind in "fiu" and array.dtype != np.uint8:
        try:
            array = _by_range(array, 255)
        except ValueError as error:
            raise ValueError(f"{name} ({array.dtype}): {error}") from None
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: expected an array of numbers, got dtype {array.dtype}.")
    if array.ndim == 2:
        return Image.fromarray(array)
    if array.ndim != 3 or not {array.shape[0], array.shape[2]} & set(_CHANNELS):
        raise ValueError(
            f"{name}: expected an array of shape (height, width), (height, width, channels) or "
            f"(channels, height, width) with 1, 3 or 4 channels, got {array.shape}."
        )
    if _channels_first(array.shape, name, input_data_format):
        array = np.moveaxis(array, 0, 2)
    channels = array.shape[2]
    if channels not in _CHANNELS:
        raise ValueError(f"{name}: expected 1, 3 or 4 channels in {input_data_format} order, got {channels}.")
    return Image.fromarray(np.ascontiguousarray(array if channels > 1 else array[:, :, 0]))


def _channels_first(shape: tuple[int, ...], name: str, input_data_format: str | None) -> bool:
    if input_data_format is not None:
        order = getattr(input_data_format, "value", input_data_format)
        if order not in ("channels_first", "channels_last"):
            raise ValueError(f'input_data_format must be "channels_first" or "channels_last", got {order!r}.')
        return order == "channels_first"
    if shape[0] in _CHANNELS and shape[2] in _CHANNELS:
        raise ValueError(
            f"{name}: the first and the last axis of shape {shape} could both be channels; "
            'pass input_data_format="channels_first" or "channels_last".'
        )
    return shape[0] in _CHANNELS
