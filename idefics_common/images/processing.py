"""`IdeficsImageProcessor`: images to normalised pixel values, with Pillow and numpy alone.

It sits on transformers' `PilBackend` for files, defaults and checks of arguments, and does the work itself, in fewer
passes: Pillow resizes the image where it is (no array in between), and since a resized pixel has only 256 values,
rescaling and normalising are one table per channel. The result is bit-identical to transformers'
`IdeficsImageProcessorPil`; differences are deliberate and few: a per-call `image_size` is honoured, EXIF orientation is
applied, 16-bit images are scaled (`idefics_common.images.conversion`), and URLs go through `ImageFetcher`.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from idefics_common.fetching.fetcher import ImageFetcher
from idefics_common.images.conversion import to_rgb
from idefics_common.images.loading import load_images, map_in_threads
from idefics_common.images.settings import plain_settings
from idefics_common.tensors import resolve_framework, to_framework, to_numpy
from idefics_common.torch_later import torch_left_for_later

with torch_left_for_later():
    from transformers.image_processing_backends import PilBackend
    from transformers.image_processing_utils import get_size_dict
    from transformers.image_utils import SizeDict
    from transformers.processing_utils import ImagesKwargs

IDEFICS_STANDARD_MEAN = [0.48145466, 0.4578275, 0.40821073]
IDEFICS_STANDARD_STD = [0.26862954, 0.26130258, 0.27577711]
_UNSUPPORTED = ("do_center_crop", "do_pad")


class IdeficsImageProcessorKwargs(ImagesKwargs, total=False):
    """What a call accepts beyond transformers' `ImagesKwargs`; see `IdeficsImageProcessor.preprocess`."""

    transform: Callable | None
    image_size: int | None
    image_num_channels: int | None


class IdeficsImageProcessor(PilBackend):
    """Resizes images to a square, scales their values to 0..1 and normalises them per channel.

    Args:
        image_size: pixels along one side of the output, default 224. The same as `size` of equal height and width,
            and stronger where both are given.
        image_mean, image_std: one number or one per channel; by default those of CLIP.
        image_num_channels: 3, the only number IDEFICS has.
        **kwargs: `size`, `resample` (bicubic), `do_resize`, `do_rescale`, `rescale_factor`, `do_normalize`,
            `do_convert_rgb`, `return_tensors`, as in transformers.

    Attributes:
        fetcher: the `ImageFetcher` for URLs. Put another one here for other limits; it is not saved.
        allow_fetch: False refuses URLs; None (at first) leaves it to `fetcher`. Only `IdeficsProcessor` saves it.

    Raises:
        ValueError: if a size is not positive, or is not given as height and width.
    """

    valid_kwargs = IdeficsImageProcessorKwargs
    resample = Image.Resampling.BICUBIC
    image_mean = IDEFICS_STANDARD_MEAN
    image_std = IDEFICS_STANDARD_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012 - defaults in the form PilBackend reads them
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_num_channels = 3

    def __init__(self, **kwargs):
        super().__init__(**plain_settings(kwargs))
        self.image_size = _height_and_width(self.size)[0]
        # last: every entry of a file becomes an attribute, and files have no say in these
        self.fetcher, self.allow_fetch = ImageFetcher(), None

    def to_dict(self):
        """What is saved: every attribute but `fetcher` and `allow_fetch`."""
        return {name: value for name, value in super().to_dict().items() if name not in ("fetcher", "allow_fetch")}

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        # A file has both fields. `size` given on top of it must not lose against the file's `image_size`.
        if kwargs.get("size") is not None and kwargs.get("image_size") is None:
            image_processor_dict = {k: v for k, v in image_processor_dict.items() if k != "image_size"}
        return super().from_dict(image_processor_dict, **kwargs)

    def preprocess(
        self,
        images,
        image_num_channels=None,
        image_size=None,
        image_mean=None,
        image_std=None,
        transform=None,
        return_tensors=None,
        **kwargs,
    ):
        """Turn images into pixel values. Arguments left out come from the processor's own attributes.

        Args:
            images: an image, a batch (B, ...) of equal ones, or a list, nested or not; flattened in order. An image is
                a `PIL.Image`, an array or tensor (uint8, uint16, floats from 0 to 1, other numbers from 0 to 255), a
                URL, a data URI, the path of a file, its bytes, or ``{"bytes": ..., "path": ...}``.
            image_num_channels, image_size, image_mean, image_std: as for the constructor.
            transform: callable for training. It gets each image as it came (URLs and files: upright RGB) and returns
                (3, H, W) values; nothing else is done to the image.
            return_tensors: "np" (also the meaning of None), "pt" or "tf".
            **kwargs: the other arguments of the constructor, and `input_data_format` for arrays.

        Returns:
            Values of shape (number of images, C, H, W): float32 unless rescaling and normalising are both off, which
            leaves uint8; with `transform`, of the dtype it returns.

        Raises:
            ValueError: naming the image that cannot be read, fetched or converted, or the argument that is wrong.
            TypeError: for something that is no image.
        """
        framework = resolve_framework(return_tensors or getattr(self, "return_tensors", None), default="np")
        given = {
            "image_num_channels": image_num_channels,
            "image_size": image_size,
            "image_mean": image_mean,
            "image_std": image_std,
            "transform": transform,
        }
        kwargs.update({name: value for name, value in given.items() if value is not None})
        return to_framework(super().preprocess(images, **plain_settings(kwargs)), framework)

    def fetch_images(self, image_url_or_urls, fetcher: ImageFetcher | None = None):
        """Read images given by URL, data URI, path or base64; image objects are handed through.

        Args:
            image_url_or_urls: one of them, or a list, nested or not.
            fetcher: the limits for URLs; by default the processor's own.

        Returns:
            In the same structure, upright RGB `PIL.Image`.

        Raises:
            ImageFetchError, ValueError, TypeError: as `idefics_common.images.loading.load_images`.
        """
        fetcher = fetcher or self.fetcher.with_allow_fetch(self.allow_fetch)
        if isinstance(image_url_or_urls, (list, tuple)):
            flat = _flatten(image_url_or_urls)
            return _unflatten(image_url_or_urls, iter(load_images(flat, _names(flat), fetcher)))
        return load_images([image_url_or_urls], ["the image"], fetcher)[0]

    def resizer(self, **settings) -> Callable[[Image.Image], Image.Image] | None:
        """The function by which `preprocess` with these arguments resizes an RGB image; None if it does not.

        Args:
            **settings: `size`, `resample`, `do_resize`, `transform` of the call; None or left out, the processor's own.
        """
        settled = {
            name: getattr(self, name) if settings.get(name) is None else settings[name]
            for name in ("size", "resample", "do_resize")
        }
        if settings.get("transform") is not None or not settled["do_resize"]:
            return None
        height, width = _height_and_width(SizeDict(**get_size_dict(settled["size"])))
        return lambda image: image.resize((width, height), resample=settled["resample"])

    def _preprocess_image_like_inputs(self, images, *args, **settings) -> np.ndarray:
        """`PilBackend` calls this with every argument settled. Returns (number of images, C, H, W)."""
        _check_settings(settings)
        height, width = _height_and_width(settings["size"])
        table = _value_table(settings)
        flat = _flatten(images)
        fetcher = self.fetcher.with_allow_fetch(self.allow_fetch)
        flat = load_images(flat, _names(flat), fetcher, self.resizer(**settings))
        if not flat:
            return np.empty((0, len(table), height, width), dtype=table.dtype)
        if settings["transform"] is not None:
            return _stack([to_numpy(settings["transform"](image)) for image in flat], channels=len(table))

        def resized(numbered: tuple[int, object]) -> np.ndarray:
            index, image = numbered
            name = f"image {index}"
            if not settings["do_convert_rgb"] and getattr(image, "mode", "RGB") != "RGB":
                raise ValueError(f"{name}: do_convert_rgb=False takes RGB images only, got mode {image.mode}.")
            if not settings["do_rescale"] and _is_fractions(image):
                raise ValueError(
                    f"{name}: do_rescale=False, and the array holds fractions of white, from 0 to 1. Leave do_rescale "
                    "as it is: arrays of floats are read by their range."
                )
            image = to_rgb(image, name=name, input_data_format=settings["input_data_format"])
            if settings["do_resize"]:
                image = image.resize((width, height), resample=settings["resample"])
            return np.asarray(image)

        pixels = map_in_threads(resized, list(enumerate(flat)))
        _check_same_shape(pixels)
        values = np.empty((len(pixels), len(table), *pixels[0].shape[:2]), dtype=table.dtype)
        for index, image in enumerate(pixels):
            for channel, channel_table in enumerate(table):
                # mode="clip" lets numpy write into `out` unbuffered; a uint8 index is never out of range
                np.take(channel_table, image[:, :, channel], out=values[index, channel], mode="clip")
        return values


def _value_table(settings: dict) -> np.ndarray:
    """What each of the 256 pixel values becomes, per channel: shape (3, 256).

    The order of operations and of precisions is that of transformers, hence the equal bits.
    """
    values = np.arange(256, dtype=np.uint8)
    if settings["do_rescale"]:
        values = (values.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    if not settings["do_normalize"]:
        return np.stack([values] * 3)
    mean, std = (_per_channel(settings, name) for name in ("image_mean", "image_std"))
    return (values.astype(np.float32) - mean) / std


def _is_fractions(image) -> bool:
    """Whether it is an array of floats that `to_rgb` takes for fractions of white."""
    if isinstance(image, Image.Image):
        return False
    array = to_numpy(image)
    return array.dtype.kind == "f" and array.size > 0 and array.max() <= 1


def _per_channel(settings: dict, name: str) -> np.ndarray:
    values = np.array(settings[name], dtype=np.float32).reshape(-1, 1)
    if len(values) not in (1, 3):
        raise ValueError(f"{name} must be one number or one for each of 3 channels, got {len(values)} numbers.")
    return np.broadcast_to(values, (3, 1))


def _check_settings(settings: dict) -> None:
    if settings["image_num_channels"] != 3:
        raise ValueError(f"image_num_channels must be 3, got {settings['image_num_channels']}.")
    data_format = settings.get("data_format")
    if getattr(data_format, "value", data_format) not in (None, "channels_first"):
        raise ValueError(f"data_format must be channels_first, as the models take pixels; got {data_format!r}.")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ValueError(f"{name}=True is not supported: IDEFICS resizes the whole image.")


def _height_and_width(size) -> tuple[int, int]:
    if not size.height or not size.width:
        raise ValueError(f"size must give height and width, both positive, got {size}.")
    return size.height, size.width


def _flatten(images) -> list:
    """Lists of any depth, and batches of arrays, to one list in order."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flatten(part)]
    if getattr(images, "ndim", 3) == 4:
        return list(images)
    return [images]


def _unflatten(structure, images):
    return [_unflatten(part, images) if isinstance(part, (list, tuple)) else next(images) for part in structure]


def _names(images: list) -> list[str]:
    return [f"image {index}" for index in range(len(images))]


def _stack(arrays: list[np.ndarray], channels: int) -> np.ndarray:
    for index, array in enumerate(arrays):
        if array.ndim != 3 or len(array) != channels:
            raise ValueError(
                f"transform must return ({channels} channels, height, width), got shape {array.shape} for image "
                f"{index}."
            )
    _check_same_shape(arrays)
    return np.stack(arrays)


def _check_same_shape(arrays: list[np.ndarray]) -> None:
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"image {index} has shape {array.shape} and image 0 has {arrays[0].shape}; images of one batch must "
                "be of one size."
            )


__all__ = ["IDEFICS_STANDARD_MEAN", "IDEFICS_STANDARD_STD", "IdeficsImageProcessor"]
