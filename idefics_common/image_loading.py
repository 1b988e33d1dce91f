"""Images from wherever they are (URL, file, data URI, object in memory), read completely and in parallel.

Reading happens here and not later, so that an image that cannot be read is reported under the name of its place in the
caller's input, and so that several downloads and decoders run at once.
"""

import base64
import binascii
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from idefics_common.image_conversion import is_image, to_rgb
from idefics_common.image_fetching import ImageFetcher, ImageFetchError, is_url, open_image

_MAX_WORKERS = 8


def load_images(sources: Sequence, names: Sequence[str], fetcher: ImageFetcher) -> list:
    """Read images, several at a time.

    Args:
        sources: for each image a URL, a data URI, the path of a local file, base64 of an encoded image, or an image
            object (`PIL.Image`, array, tensor).
        names: what errors call each of them.
        fetcher: fetches what is a URL; its `max_pixels` holds for files and data URIs too.

    Returns:
        In the same order: image objects as they came, all others as upright RGB `PIL.Image`.

    Raises:
        ImageFetchError: if a URL was refused or could not be fetched.
        ValueError: if an image cannot be read, or a string is none of the above.
        TypeError: if a source is of another type.
    """
    # The same object may stand in several places, and Pillow's lazy reading is not safe in two threads at once.
    # Equal strings are one image too, and need one download.
    keys = [source if isinstance(source, str) else id(source) for source in sources]
    first_place = {}
    for place, key in enumerate(keys):
        first_place.setdefault(key, place)
    loaded = map_in_threads(lambda place: _load(sources[place], names[place], fetcher), list(first_place.values()))
    by_key = dict(zip(first_place, loaded, strict=True))
    return [by_key[key] for key in keys]


def map_in_threads(function: Callable, items: Sequence) -> list:
    """`[function(item) for item in items]`, in threads where there are several items. Pillow releases the GIL."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1, _MAX_WORKERS)) as pool:
        return list(pool.map(function, items))


def _load(source, name: str, fetcher: ImageFetcher):
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        return to_rgb(_open(source, name, fetcher), name=name)
    if not is_image(source):
        raise TypeError(
            f"{name}: expected an image, its URL or its path, got {type(source).__name__}. Images are PIL images, "
            "arrays or tensors."
        )
    if isinstance(source, Image.Image):
        try:
            source.load()
        except Exception as error:  # plugins let struct.error, SyntaxError and others escape from corrupt files
            file = getattr(source, "filename", "") or "an image object"
            raise ValueError(f"{name}: {file} cannot be read: {error}") from error
    return source


def _open(source: str, name: str, fetcher: ImageFetcher) -> Image.Image:
    try:
        if source.startswith("data:"):
            return open_image(_decode_base64(source.partition(",")[2]), max_pixels=fetcher.max_pixels)
        if is_url(source):
            return fetcher.fetch(source)
        if os.path.isfile(source):
            return open_image(source, max_pixels=fetcher.max_pixels)
        return open_image(_decode_base64(source), max_pixels=fetcher.max_pixels)
    except ImageFetchError as error:
        raise ImageFetchError(f"{name}: {error}") from error
    except binascii.Error:
        shown = source if len(source) <= 80 else source[:77] + "..."
        raise ValueError(f"{name}: {shown!r} is no URL, no existing file and no base64 of an image.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


def _decode_base64(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)
