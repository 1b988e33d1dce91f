"""Decoding image bytes that may be hostile: one function, `open_image`.

Pillow allocates and decodes whatever an image's header promises, so a 60 kB file can take a gigabyte. Here
the dimensions in the header are checked before a pixel is decoded, only the formats asked for are tried, and
decoding happens at once, so that a truncated file fails here, with its name, and not in a later resize.
Pillow's global settings (`Image.MAX_IMAGE_PIXELS`, `ImageFile.LOAD_TRUNCATED_IMAGES`) are left alone.
"""

import io
import os
from collections.abc import Callable, Sequence

from PIL import Image

# 50 million pixels admit a 48-megapixel photograph; Pillow holds at most 4 bytes per pixel of it, 200 MB.
DEFAULT_MAX_PIXELS = 50_000_000

# Formats whose decoders allocate what the checked dimensions say. TIFF (tiles may be larger than the image) and
# AVIF (the codec's frame may be larger than the container says) do not, so they are for trusted files only.
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FILE_FORMATS = (*WEB_FORMATS, "TIFF", "AVIF", "PPM")


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a file begins like an image in any format that Pillow knows."""
    try:
        with Image.open(path):
            return True
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own limit of pixels
        return True
    except Exception:  # Pillow's plugins let nearly everything escape from what is no image
        return False


def more(limit: str) -> str:
    """How a processor's limit is raised, to end an error with."""
    return f"; to allow more, set processor.fetcher = ImageFetcher({limit}=...)"


def open_image(
    data: bytes | str | os.PathLike,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    source: str | None = None,
    formats: Sequence[str] = FILE_FORMATS,
    claim_pixels: Callable[[int], None] | None = None,
) -> Image.Image:
    """Decode the first frame of an image completely, within limits.

    Args:
        data: the encoded image as bytes, or the path of a file.
        max_pixels: the largest width x height decoded, in pixels.
        source: what errors call the image; by default the path, or "image bytes".
        formats: Pillow format names that are tried; anything else is not an image.
        claim_pixels: called with width x height before anything is decoded; its ValueError refuses the image.

    Returns:
        The decoded image in the mode of the file, holding no open file. EXIF orientation is not applied.

    Raises:
        OSError: the file at `data` cannot be read (FileNotFoundError, PermissionError, ...).
        ValueError: not an image of those formats, too many pixels, truncated or corrupt. Names the source.
    """
    if source is None:
        source = "image bytes" if isinstance(data, bytes) else os.fspath(data)
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        # Pillow's plugins let struct.error, IndexError, SyntaxError and others escape on corrupt input, hence
        # the broad clauses. Bomb errors come from Pillow's own global limit, which may be below max_pixels.
        try:
            image = Image.open(file, formats=tuple(formats))
        except Image.UnidentifiedImageError:
            raise ValueError(f"{source}: not an image in one of the formats {', '.join(formats)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(
                f"{source}: too many pixels for Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS: {error}"
            ) from error
        except Exception as error:
            raise ValueError(f"{source}: the image's header is corrupt: {error}") from error
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{source}: {width} x {height} pixels, more than max_pixels={max_pixels}; nothing was decoded"
                + more("max_pixels")
            )
        if claim_pixels is not None:
            try:
                claim_pixels(width * height)
            except ValueError as error:
                raise ValueError(f"{source}: {width} x {height} pixels: {error}") from None
        try:
            image.load()
        except Exception as error:
            raise ValueError(f"{source}: the image is truncated or corrupt: {error}") from error
    return image
