"""Read images from wherever they are (URL, file, data URI, object in memory), completely and in parallel.

An image that cannot be read is reported by its place in the caller's input. Images may be resized in the thread that
read them, so that few are in memory at full size at the same time.
"""

import base64
import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from idefics_common.fetching.budget import FetchBudget
from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError, is_url
from idefics_common.images.conversion import is_encoded, is_image, to_rgb
from idefics_common.images.decoding import more, open_image

_MAX_WORKERS = 8


def load_images(
    sources: Sequence,
    names: Sequence[str],
    fetcher: ImageFetcher,
    resize: Callable[[Image.Image], Image.Image] | None = None,
) -> list:
    """Read images, several at a time.

    Args:
        sources: for each image a URL, a data URI, the path of a local file, the content of a file (bytes, or a
            dictionary of bytes and path, or base64), or an image object (`PIL.Image`, array, tensor).
        names: what errors call each of them.
        fetcher: fetches what is a URL; its `max_pixels` holds for files and data URIs too, and its limits per call
            for all URLs, and in pixels all data URIs, together.
        resize: applied to what was read; image objects are not passed to it.

    Returns:
        In the same order: image objects as they came, all others as upright RGB `PIL.Image`, resized.

    Raises:
        ImageFetchError: if a URL was refused or could not be fetched, or there are too many; then none is fetched.
        ValueError: if an image cannot be read, or a string is none of the above.
        TypeError: if a source is of another type.
    """
    # The same object may stand in several places, and Pillow's lazy reading is not safe in two threads at once.
    # Equal strings are one image too, and need one download.
    keys = [source if isinstance(source, str) else id(source) for source in sources]
    first_place = {}
    for place, key in enumerate(keys):
        first_place.setdefault(key, place)
    urls = [place for key, place in first_place.items() if isinstance(key, str) and is_fetched(key)]
    if len(urls) > fetcher.max_images_per_call:
        raise ImageFetchError(
            f"{names[urls[fetcher.max_images_per_call]]}: one call names {len(urls)} image URLs, more than "
            f"max_images_per_call={fetcher.max_images_per_call}; none was fetched{more('max_images_per_call')}"
        )
    budget = fetcher.budget()

    def load(place: int):
        return _load(sources[place], names[place], fetcher, budget, resize)

    loaded = map_in_threads(load, list(first_place.values()))
    by_key = dict(zip(first_place, loaded, strict=True))
    return [by_key[key] for key in keys]


def map_in_threads(function: Callable, items: Sequence) -> list:
    """`[function(item) for item in items]`, in threads where there are several items. Pillow releases the GIL."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1, _MAX_WORKERS)) as pool:
        return list(pool.map(function, items))


def is_fetched(source: str) -> bool:
    """Whether a source is downloaded: any URL but a data URI."""
    return is_url(source) and not _is_data_uri(source)


def _is_data_uri(source: str) -> bool:
    return source[:5].lower() == "data:"


def _load(source, name: str, fetcher: ImageFetcher, budget: FetchBudget, resize):
    if isinstance(source, Mapping) and is_encoded(source):
        content, path = source.get("bytes"), source.get("path")
        if content is None and path is None:
            raise ValueError(f"{name}: neither bytes nor path of the image are given.")
        source = Path(path) if content is None else content  # a path, so that it is never taken for a URL
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    elif isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    if isinstance(source, (str, bytes)):
        image = to_rgb(_open(source, name, fetcher, budget), name=name)
        return image if resize is None else resize(image)
    if not is_image(source):
        raise TypeError(
            f"{name}: expected an image, its URL, its path or the bytes of its file, got {type(source).__name__}. "
            "Images are PIL images, arrays or tensors."
        )
    if getattr(source, "ndim", 3) == 4:
        if len(source) != 1:
            raise ValueError(f"{name}: got an array of {len(source)} images: give each a place of its own.")
        source = source[0]
    if isinstance(source, Image.Image):
        try:
            source.load()
        except Exception as error:  # plugins let struct.error, SyntaxError and others escape from corrupt files
            file = getattr(source, "filename", "") or "an image object"
            raise ValueError(f"{name}: {file} cannot be read: {error}") from error
    return source


def _open(source: str | bytes, name: str, fetcher: ImageFetcher, budget: FetchBudget) -> Image.Image:
    try:
        if isinstance(source, bytes):
            return open_image(source, max_pixels=fetcher.max_pixels)
        shown = repr(source if len(source) <= 80 else source[:77] + "...")
        if is_fetched(source):
            return fetcher.fetch(source, budget)
        is_data_uri = _is_data_uri(source)
        if not is_data_uri and os.path.isfile(source):
            return open_image(source, max_pixels=fetcher.max_pixels)
        if not is_data_uri and os.path.isdir(source):
            raise ValueError(f"{shown} is a directory and no image file.")
        return open_image(
            _decode_base64(source.partition(",")[2] if is_data_uri else source),
            max_pixels=fetcher.max_pixels,
            source=shown if is_data_uri else f"{shown}, which is no existing file, read as base64",
            claim_pixels=budget.claim_pixels,
        )
    except ImageFetchError as error:
        raise ImageFetchError(f"{name}: {error}") from error
    except binascii.Error:
        raise ValueError(f"{name}: {shown} is no URL, no existing file and no base64 of an image.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error


def _decode_base64(text: str) -> bytes:
    """Raises binascii.Error, for no text at all too."""
    if not text or text.isspace():
        raise binascii.Error("nothing to decode")
    return base64.b64decode("".join(text.split()), validate=True)
