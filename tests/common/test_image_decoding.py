import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from idefics_common.images.decoding import FILE_FORMATS, open_image
from tests.common.hostile_server import encoded


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises these dimensions and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", FILE_FORMATS)
@pytest.mark.parametrize("as_path", [False, True])
def test_reads_every_format_from_bytes_and_files(format, as_path, tmp_path):
    data = encoded((32, 24), format)
    path = tmp_path / "image.dat"
    path.write_bytes(data)
    image = open_image(path if as_path else data)
    assert (image.size, image.fp) == ((32, 24), None)
    with Image.open(path) as expected:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(format):
    file = io.BytesIO()
    frames = [Image.new("RGB", (5, 3), colour) for colour in ("red", "blue")]
    frames[0].save(file, format, save_all=True, append_images=frames[1:], lossless=True)
    image = open_image(file.getvalue())
    assert image.fp is None
    assert image.convert("RGB").getpixel((2, 1)) == (255, 0, 0)


def test_keeps_exif_after_closing_the_file():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    assert open_image(file.getvalue()).getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image in one of the formats PNG, JPEG"),
        (b"<html><body>Not found</body></html>", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        (encoded((64, 64), "PNG")[:100], "truncated or corrupt"),
        (encoded((64, 64), "JPEG")[:-20], "truncated or corrupt"),
        (encoded((64, 64), "PNG")[:20], "not an image|header is corrupt"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "not an image|header is corrupt"),
        (encoded((64, 64), "WEBP")[:60], "not an image|corrupt"),
        (png_header(8000, 8000), "8000 x 8000 pixels, more than max_pixels=50000000; nothing was decoded"),
        (png_header(60_000, 60_000), "too many pixels for Pillow's own limit"),
        (png_header(100, 100), "truncated or corrupt"),
    ],
    ids=lambda value: str(value[:12]) if isinstance(value, bytes) else "",
)
def test_errors_name_the_source(data, message):
    with pytest.raises(ValueError, match=rf"^photo 3 of 7: .*({message})"):
        open_image(data, source="photo 3 of 7")


def test_a_path_names_itself(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.txt: not an image"):
        open_image(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        open_image(str(tmp_path / "missing.png"))


def test_pixel_limit_counts_pixels():
    assert open_image(encoded((10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="10 x 10 pixels, more than max_pixels=99"):
        open_image(encoded((10, 10)), max_pixels=99)


def test_only_the_formats_asked_for_are_tried():
    with pytest.raises(ValueError, match=r"formats PNG, JPEG$"):
        open_image(encoded(format="GIF"), formats=["PNG", "JPEG"])


def test_pillow_global_settings_are_neither_used_nor_changed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="60000 x 60000 pixels, more than max_pixels"):
        open_image(png_header(60_000, 60_000))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (None, False)
