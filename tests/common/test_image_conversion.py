"""Rounding of deep images to 8 bits, for every value there is, and images without pixels."""

import numpy as np
import pytest
from PIL import Image

from idefics_common.images.conversion import to_rgb

DEEP = np.arange(65536).reshape(256, 256)


def grey(image) -> np.ndarray:
    return np.asarray(to_rgb(image))[:, :, 0]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "array"])
def test_16_bits_are_rounded_to_the_nearest_of_8(mode):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32, "array": np.uint16}[mode]
    values = DEEP.astype(dtype)
    image = values if mode == "array" else Image.frombytes(mode, values.shape, values.tobytes())
    # 257 is odd, so no value lies between two results: 128 / 257 is below a half and 129 / 257 above
    np.testing.assert_array_equal(grey(image), np.rint(DEEP / 257))


def test_fractions_of_white_are_rounded_to_the_nearest():
    boundaries = (np.arange(255) + 0.5) / 255
    for step, expected in ((-1e-5, np.arange(255)), (1e-5, np.arange(1, 256))):
        values = (boundaries + step).astype(np.float32)[None]
        np.testing.assert_array_equal(grey(Image.fromarray(values))[0], expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "F", "I;16"])
@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_images_without_pixels_are_refused(mode, size):
    with pytest.raises(ValueError, match=f"photo: the image has no pixels, its size is {size[0]} x {size[1]}"):
        to_rgb(Image.new(mode, size), name="photo")


def test_arrays_without_pixels_are_refused():
    with pytest.raises(ValueError, match="photo: the image has no pixels, its size is 0 x 5 x 3"):
        to_rgb(np.zeros((0, 5, 3), np.uint8), name="photo")
