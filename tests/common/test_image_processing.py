"""Pixels: bit-identity with transformers, the deliberate differences, and errors that name the image."""

import base64
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError
from idefics_common.images.processing import IdeficsImageProcessor
from tests.common.processors import letters_processor

FIXTURE = Path(__file__).parents[1] / "fixtures" / "processor_v4"


def photograph(mode: str = "RGB", height: int = 37, width: int = 53, seed: int = 0) -> Image.Image:
    """Smooth enough that resizing matters, with every value range used."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "RGBA" or mode == "LA":
        alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
        image.putalpha(alpha)
        return image.convert(mode)
    if mode == "P with transparency":
        image = image.convert("P")
        image.info["transparency"] = image.getpixel((width // 2, height // 2))
        return image
    return image.convert(mode)


def reference(**kwargs):
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    return IdeficsImageProcessorPil(**kwargs)


MODES = ["RGB", "L", "P", "P with transparency", "RGBA", "LA", "CMYK", "1", "YCbCr", "HSV", "LAB"]
SETTINGS = {
    "defaults": {},
    "enlarged": {"size": {"height": 64, "width": 96}},
    "bilinear": {"resample": Image.Resampling.BILINEAR},
    "not resized": {"do_resize": False},
    "not rescaled": {"do_rescale": False},
    "not normalised": {"do_normalize": False},
    "bytes": {"do_rescale": False, "do_normalize": False},
    "own values": {"rescale_factor": -1.0, "image_mean": 0.5, "image_std": [0.25, 0.5, 1.5]},
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_transformers_in_every_mode(mode):
    images = [photograph(mode), photograph(mode, height=20, width=91, seed=1)]
    ours = IdeficsImageProcessor(image_size=28)(images)
    theirs = reference(image_size=28)(images, return_tensors="np")
    assert ours.shape == (2, 3, 28, 28)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_pixels_equal_transformers_in_every_setting(settings):
    images = [photograph(seed=2), photograph(seed=3)]
    ours = IdeficsImageProcessor(image_size=28)(images, **settings)
    theirs = reference(image_size=28)(images, return_tensors="np", **settings)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 1, 12 * 16).reshape(12, 16)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("I;16", (grey_ramp() * 65535).astype(np.uint16)),
        ("I;16B", (grey_ramp() * 65535).astype(">u2")),
        ("I", (grey_ramp() * 65535).astype(np.int32)),
        ("I", (grey_ramp() * 255).astype(np.int32)),
        ("F", (grey_ramp() * 65535).astype(np.float32)),
        ("F", (grey_ramp() * 255).astype(np.float32)),
        ("F", grey_ramp().astype(np.float32)),
        ("array", (grey_ramp() * 65535).astype(np.uint16)),
    ],
    ids=["I;16", "I;16B", "I to 65535", "I to 255", "F to 65535", "F to 255", "F to 1", "uint16 array"],
)
def test_deep_images_are_scaled_and_not_saturated(mode, values):
    if mode == "array":
        image = values
    else:
        image = Image.frombytes(mode, values.shape[::-1], values.tobytes())
    pixels = IdeficsImageProcessor()(image, do_resize=False, do_rescale=False, do_normalize=False)
    assert (pixels[0] == pixels[0, 0]).all()
    np.testing.assert_allclose(pixels[0, 0], grey_ramp() * 255, atol=1)
    assert pixels.max() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    image = photograph()
    image.getexif()[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.getexif())
    tagged = Image.open(file)
    upright = ImageOps.exif_transpose(Image.open(file))
    processor = IdeficsImageProcessor(image_size=28)
    np.testing.assert_array_equal(processor(tagged), processor(np.asarray(upright)))
    as_stored = processor(np.asarray(tagged))
    assert np.array_equal(processor(tagged), as_stored) == (orientation == 1)


@pytest.mark.parametrize(("premultiplied", "mode"), [("RGBa", "RGBA"), ("La", "LA")])
def test_premultiplied_alpha_is_composited_too(premultiplied, mode):
    image = photograph(mode).convert(premultiplied)
    processor = IdeficsImageProcessor(image_size=28)
    np.testing.assert_array_equal(processor(image), processor(image.convert(mode)))


def test_exif_orientation_of_a_16_bit_image_and_a_damaged_exif_block():
    processor = IdeficsImageProcessor(image_size=28)
    values = (grey_ramp() * 65535).astype(np.uint16)
    deep = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep.info["exif"] = exif.tobytes()
    np.testing.assert_array_equal(processor(deep), processor(np.rot90(values, -1)))

    damaged = photograph()
    damaged.info["exif"] = b"Exif\x00\x00no such header"
    np.testing.assert_array_equal(processor(damaged), processor(np.asarray(damaged)))


def test_arrays_and_tensors_are_images_in_either_layout():
    processor = IdeficsImageProcessor(image_size=28)
    for mode in ("L", "RGB", "RGBA"):
        image = photograph(mode)
        array = np.asarray(image)
        expected = processor(image)
        if mode == "L":
            np.testing.assert_array_equal(processor(array), expected)
            array = array[:, :, None]
        np.testing.assert_array_equal(processor(array), expected)
        np.testing.assert_array_equal(processor(np.moveaxis(array, 2, 0)), expected)
    batch = np.stack([np.asarray(photograph(seed=seed)) for seed in (0, 1)])
    np.testing.assert_array_equal(processor(batch), processor([photograph(seed=0), photograph(seed=1)]))
    narrow = np.asarray(photograph(height=3, width=9))  # (3, 9, 3): either axis could be channels
    np.testing.assert_array_equal(
        processor(narrow, input_data_format="channels_last"), processor(photograph(height=3, width=9))
    )


def test_torch_and_tensorflow_tensors_go_in_and_come_out():
    processor = IdeficsImageProcessor(image_size=28)
    expected = processor(photograph())
    array = np.asarray(photograph())
    frameworks = {"pt": ("torch", "from_numpy"), "tf": ("tensorflow", "constant")}
    for return_tensors, (module, make) in frameworks.items():
        framework = pytest.importorskip(module)
        out = processor(getattr(framework, make)(array.copy()), return_tensors=return_tensors)
        assert type(out).__module__.split(".")[0] == module
        np.testing.assert_array_equal(np.asarray(out), expected)


def test_p7_image_size_of_a_call_is_honoured():
    processor = IdeficsImageProcessor(image_size=28)
    image = photograph()
    expected = IdeficsImageProcessor(image_size=56)(image)
    np.testing.assert_array_equal(processor(image, image_size=56), expected)
    np.testing.assert_array_equal(processor.preprocess(image, 3, 56), expected)  # documented order
    assert processor(image).shape == (1, 3, 28, 28)  # and it is not remembered
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    np.testing.assert_array_equal(
        processor.preprocess(image, 3, 56, mean, std),
        IdeficsImageProcessor(image_size=56, image_mean=mean, image_std=std)(image),
    )


NUMBERS = {
    "integers": ({"image_mean": [0, 1, 0], "image_std": 2}, {"image_mean": [0.0, 1.0, 0.0], "image_std": 2.0}),
    "numpy": ({"image_mean": np.array([0.5, 1, 2]), "image_size": np.int64(14)}, {"image_mean": [0.5, 1.0, 2.0]}),
    "sizes": ({"size": {"height": np.int64(14), "width": 14}, "image_std": np.float32(0.5)}, {"image_std": 0.5}),
    "factor": ({"rescale_factor": 1}, {"rescale_factor": 1.0}),
}


@pytest.mark.parametrize(("given", "meant"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_any_kind_are_taken(given, meant):
    given, meant = {"image_size": 14} | given, {"image_size": 14} | meant
    if "size" in given:
        del given["image_size"]
    image = photograph()
    expected = IdeficsImageProcessor(**meant)(image)
    np.testing.assert_array_equal(IdeficsImageProcessor(**given)(image), expected)
    np.testing.assert_array_equal(IdeficsImageProcessor()(image, **given), expected)
    for arguments in (given, {"images_kwargs": given}):
        batch = letters_processor()(["a", image], return_tensors="np", **arguments)
        np.testing.assert_array_equal(batch["pixel_values"][0], expected)


@pytest.mark.parametrize("make", ["numpy", "torch"])
def test_transform_replaces_everything_else(make):
    torch = pytest.importorskip("torch") if make == "torch" else None
    seen = []

    def transform(image):
        seen.append(image)
        corner = np.asarray(image, dtype=np.float32)[:4, :5].transpose(2, 0, 1)
        return torch.from_numpy(corner).to(torch.bfloat16).requires_grad_() if torch else corner

    images = [photograph(seed=0), photograph(seed=1)]
    out = IdeficsImageProcessor(image_size=28)(images, transform=transform)
    assert seen == images
    assert out.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(out[1, :, 0, 0], np.asarray(images[1])[0, 0])


def test_fetch_images_reads_files_data_uris_and_nested_lists():
    path = FIXTURE / "rgba.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    processor = IdeficsImageProcessor(image_size=28)
    image = Image.open(path)
    sources = [str(path), path, f"data:image/png;base64,{encoded}", encoded]
    fetched = processor.fetch_images([[image], sources, []])
    assert fetched[0] == [image]
    assert fetched[2] == []
    for one in fetched[1]:
        assert one.mode == "RGB"
        np.testing.assert_array_equal(processor(one), processor(image))
    assert processor.fetch_images(str(path)).size == image.size
    np.testing.assert_array_equal(processor(str(path)), processor(image))


def test_urls_are_fetched_by_the_fetcher_once_each():
    asked = []

    class Fetcher(ImageFetcher):
        def fetch(self, url, budget=None):
            asked.append(url)
            return photograph("RGBA")

    urls = ["https://example.com/a.png", "https://example.com/b.png", "https://example.com/a.png"]
    fetched = IdeficsImageProcessor().fetch_images(urls, fetcher=Fetcher())
    assert sorted(asked) == urls[:2]
    assert fetched[0] is fetched[2]
    assert fetched[0].mode == "RGB"
    with pytest.raises(ImageFetchError, match=r"image 1: .*fetching is off"):
        IdeficsImageProcessor().fetch_images([photograph(), urls[0]], fetcher=ImageFetcher(allow_fetch=False))


def truncated_png() -> Image.Image:
    data = (FIXTURE / "rgb.png").read_bytes()
    return Image.open(io.BytesIO(data[: len(data) // 2]))


BAD_INPUT = {
    "truncated": (truncated_png, {}, ValueError, "image 1: .* cannot be read"),
    "five channels": (lambda: np.zeros((5, 5, 5), np.uint8), {}, ValueError, r"image 1: .*got \(5, 5, 5\)"),
    "ambiguous": (lambda: np.zeros((3, 9, 3), np.uint8), {}, ValueError, r"image 1: .*\(3, 9, 3\).*input_data_format"),
    "negative": (
        lambda: Image.fromarray(np.full((4, 4), -1, np.int32)),
        {},
        ValueError,
        "image 1 .*0 to 65535, got -1",
    ),
    "nan": (lambda: Image.fromarray(np.full((4, 4), np.nan, np.float32)), {}, ValueError, "image 1 .*got nan"),
    "no image": (lambda: {"a": 1}, {}, TypeError, "image 1: .*got dict"),
    "no file": (lambda: "cat.png", {}, ValueError, r"image 1: 'cat\.png' is no URL, no existing file"),
    "no file, but base64": (
        lambda: "cat1",
        {},
        ValueError,
        "image 1: 'cat1', which is no existing file, read as base64",
    ),
    "no file at a path": (lambda: Path("cat1"), {}, ValueError, "image 1: 'cat1', which is no existing file"),
    "directory": (lambda: str(FIXTURE), {}, ValueError, r"image 1: '.*processor_v4' is a directory"),
    "text file": (lambda: str(FIXTURE / "expected.json"), {}, ValueError, r"image 1: .*expected\.json: not an image"),
    "not RGB": (lambda: photograph("L"), {"do_convert_rgb": False}, ValueError, "image 1: .*got mode L"),
    "other size": (lambda: photograph(height=5), {"do_resize": False}, ValueError, r"image 1 has shape \(5, 53, 3\)"),
    "channels": (photograph, {"image_num_channels": 1}, ValueError, "image_num_channels must be 3, got 1"),
    "size": (photograph, {"image_size": 0}, ValueError, "image_size must be a positive integer, got 0"),
    "shortest edge": (photograph, {"size": {"shortest_edge": 9}}, ValueError, "height and width"),
    "mean": (photograph, {"image_mean": [0.5, 0.5]}, ValueError, "image_mean must be one number or one for each of 3"),
    "crop": (photograph, {"do_center_crop": True, "crop_size": 3}, ValueError, "do_center_crop=True is not"),
    "order": (photograph, {"data_format": "channels_last"}, ValueError, "data_format must be channels_first"),
    "framework": (photograph, {"return_tensors": "jax"}, ValueError, '"np", "pt" or "tf", got \'jax\''),
    "transform": (
        photograph,
        {"transform": lambda image: [1.0]},
        ValueError,
        r"transform must return .*got shape \(1,\)",
    ),
    "channels last": (
        photograph,
        {"transform": lambda image: np.zeros((28, 28, 3))},
        ValueError,
        r"transform must return \(3 channels, height, width\), got shape \(28, 28, 3\) for image 0",
    ),
    "no pixels": (lambda: Image.new("RGB", (0, 3)), {}, ValueError, "image 1: the image has no pixels, .* 0 x 3"),
    "image size": (photograph, {"image_size": "14"}, ValueError, "image_size must be a positive integer, got '14'"),
}


@pytest.mark.parametrize(("make", "arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(make, arguments, error, message):
    with pytest.raises(error, match=message):
        IdeficsImageProcessor(image_size=28)([photograph(), make()], **arguments)


def test_no_images_give_an_empty_batch():
    assert IdeficsImageProcessor(image_size=28)([]).shape == (0, 3, 28, 28)


def test_files_are_interchangeable_with_transformers(tmp_path):
    ours = IdeficsImageProcessor(image_size=56, image_mean=[0.1, 0.2, 0.3], rescale_factor=0.5)
    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "IdeficsImageProcessor"
    assert saved["image_size"] == 56  # all that transformers 4 reads of the size

    theirs = type(reference()).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = IdeficsImageProcessor.from_pretrained(tmp_path / "theirs")
    assert back.to_dict() == ours.to_dict() == theirs.to_dict()
    np.testing.assert_array_equal(back(photograph()), theirs(photograph(), return_tensors="np"))

    version_4 = IdeficsImageProcessor.from_pretrained(FIXTURE / "processor")
    assert (version_4.image_size, version_4.size.height) == (28, 28)


@pytest.mark.parametrize("override", [{"image_size": 9}, {"size": {"height": 9, "width": 9}}])
def test_a_size_given_to_from_pretrained_beats_the_file(override, tmp_path):
    IdeficsImageProcessor(image_size=28).save_pretrained(tmp_path)
    processor = IdeficsImageProcessor.from_pretrained(tmp_path, **override)
    assert processor.image_size == 9
    assert processor(photograph()).shape == (1, 3, 9, 9)


def test_the_same_lazy_file_may_stand_in_a_batch_many_times():
    for _ in range(5):
        image = Image.open(FIXTURE / "rgb.png")
        pixels = IdeficsImageProcessor(image_size=28)([image] * 16)
        assert all(np.array_equal(one, other) for one, other in itertools.pairwise(pixels))


def test_neither_torch_nor_tensorflow_is_needed():
    code = f"""
import sys
for name in ("torch", "torchvision", "tensorflow", "keras"):
    sys.modules[name] = None  # what importlib reports as not installed
from pathlib import Path
from idefics_common import IdeficsProcessor
processor = IdeficsProcessor.from_pretrained({str(FIXTURE / "processor")!r})
image = processor.image_processor.fetch_images({str(FIXTURE / "rgb.png")!r})
batch = processor(["User:", image, "hi"], return_tensors="np", return_labels=True)
print(batch["pixel_values"].shape, batch["image_attention_mask"].sum() > 0)
try:
    processor(["User:", image, "hi"])
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, error = result.stdout.strip().splitlines()
    assert first == "(1, 1, 3, 28, 28) True"
    assert 'return_tensors="np"' in error
    assert '"tf"' in error
