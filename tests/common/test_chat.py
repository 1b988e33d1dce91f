"""What chat messages may hold. The format itself: `test_processor.py`."""

import base64

import numpy as np
import pytest
import transformers.processing_utils

from idefics_common.fetching.fetcher import ImageFetchError
from tests.common.processors import FIXTURE, letters_processor

PICTURE = FIXTURE / "rgb.png"
ASK = {"type": "text", "text": "What?"}


def pixels(processor, part, **processor_kwargs):
    batch = processor.apply_chat_template(
        [{"role": "user", "content": [part, ASK]}],
        tokenize=True,
        return_dict=True,
        return_tensors="np",
        processor_kwargs=processor_kwargs,
    )
    return batch["pixel_values"]


@pytest.mark.parametrize("kind", ["audio", "video", "file", "Image", None])
@pytest.mark.parametrize("batched", [False, True])
def test_other_content_is_refused_before_anything_is_loaded(kind, batched, monkeypatch):
    monkeypatch.setattr(transformers.processing_utils, "load_audio", lambda *_, **__: pytest.fail("loaded"))
    part = {"type": kind, "url": "http://127.0.0.1/a", "path": "a"}
    messages = [{"role": "system", "content": "Hi"}, {"role": "user", "content": [ASK, part]}]
    name = "conversation 1, message 1, part 1" if batched else "message 1, part 1"
    with pytest.raises(ValueError, match=f"^{name}: content of type {kind!r} is not supported; the types are text and"):
        letters_processor().apply_chat_template([messages[:1], messages] if batched else messages, tokenize=True)


@pytest.mark.parametrize("part", ["text", None, ["text"]])
def test_parts_and_messages_are_dictionaries(part):
    with pytest.raises(TypeError, match="message 0, part 0: expected a dictionary with a type"):
        letters_processor().apply_chat_template([{"role": "user", "content": [part]}])
    with pytest.raises(TypeError, match="message 1: expected a dictionary of role and content, got str"):
        letters_processor().apply_chat_template([{"role": "user", "content": "a"}, "text"])


def test_images_under_every_key():
    processor = letters_processor()
    expected = processor([[PICTURE]], return_tensors="np")["pixel_values"]
    encoded = base64.b64encode(PICTURE.read_bytes()).decode()
    data_uri = f"data:image/png;base64,{encoded}"
    for part in (
        {"path": str(PICTURE)},
        {"base64": encoded},
        {"base64": data_uri},
        {"url": data_uri, "path": None, "image": None},
        {"image": PICTURE},
    ):
        np.testing.assert_array_equal(pixels(processor, {"type": "image", **part}, allow_fetch=False), expected)
    for source in (data_uri, {"url": data_uri}):
        part = {"type": "image_url", "image_url": source}
        np.testing.assert_array_equal(pixels(processor, part, allow_fetch=False), expected)
    np.testing.assert_array_equal(pixels(processor, {"type": "images", "path": str(PICTURE)}), expected)
    # transformers' own tests have files under "url"
    np.testing.assert_array_equal(pixels(processor, {"type": "image", "url": str(PICTURE)}), expected)


def test_p10_with_fetching_off_a_url_opens_no_file(monkeypatch):
    processor = letters_processor()
    parts = [{"type": "image", key: str(PICTURE)} for key in ("url", "image")]
    for part in [*parts, {"type": "image_url", "image_url": {"url": str(PICTURE)}}]:
        with pytest.raises(ValueError, match=r'message 0, part 0: "(url|image)" must be an http, https or data URL'):
            pixels(processor, part, allow_fetch=False)
    with pytest.raises(ImageFetchError, match="fetching is off"):
        pixels(processor, {"type": "image", "url": "http://127.0.0.1/a.png"}, allow_fetch=False)
    processor.allow_fetch = False
    with pytest.raises(ValueError, match="must be an http, https or data URL"):
        pixels(processor, parts[0])
    processor.allow_fetch = None
    monkeypatch.setenv("IDEFICS_ALLOW_FETCH", "0")
    with pytest.raises(ValueError, match="must be an http, https or data URL"):
        pixels(processor, parts[0])


def test_base64_is_never_a_file(monkeypatch):
    monkeypatch.chdir(FIXTURE)
    for source in (str(PICTURE), "rgb.png"):
        with pytest.raises(ValueError, match=r"prompt 0, image 0: 'data:image/unknown;base64,.* is no URL"):
            pixels(letters_processor(), {"type": "image", "base64": source})
