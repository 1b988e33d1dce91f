"""Rows E8 and E10: images as people hand them over, names of images that are no images, and lists of strings."""

import base64
import shutil
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError
from idefics_common.images.processing import IdeficsImageProcessor
from idefics_common.prompts.collator import IdeficsCollator
from idefics_common.prompts.processor import IdeficsProcessor
from tests.common.hostile_server import encoded, redirect, reply
from tests.common.processors import FIXTURE, letters_processor, picture
from tests.common.test_image_decoding import png_header

torch = pytest.importorskip("torch")  # whose tensors are among the images, and are what the processor makes by default

FILE = FIXTURE / "rgb.png"
CONTENT = FILE.read_bytes()
BASE64 = base64.b64encode(CONTENT).decode()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with images, which is the current one and the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos of mine").mkdir()
    for name in ("cat.png", "no-ending", "photos of mine/DOG.JPG"):
        shutil.copy(FILE, tmp_path / name)
    for name in ("icon", "photo.heic"):
        Image.open(FILE).save(tmp_path / name, "ICO")
    (tmp_path / "huge").write_bytes(png_header(100_000, 100_000))
    (tmp_path / "What").write_text("a file that is no image")
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


PATHS = {
    "relative": lambda here: "cat.png",
    "with spaces around": lambda here: " ./cat.png\n",
    "absolute": lambda here: str(here / "cat.png"),
    "with a space inside": lambda here: str(here / "photos of mine" / "DOG.JPG"),
    "home": lambda here: "~/cat.png",
    "known by its content": lambda here: "no-ending",
    "known by its name": lambda here: "empty.png",
    "of a format that is not read": lambda here: "icon",
    "of a format that Pillow may not know": lambda here: "photo.heic",
    "too large to be read": lambda here: "huge",
    "file URL with a host": lambda here: f"file://localhost{here / 'cat.png'}",
    "file URL": lambda here: f"file://{here / 'cat.png'}",
    "file URL with one slash": lambda here: f"file:{here / 'cat.png'}",
    "file URL of another spelling": lambda here: f"FILE://{urllib.parse.quote(str(here))}/photos of mine/DOG.JPG",
}
PLACES = {
    "a segment": lambda processor, path: processor(["User:", path, "What is this?"]),
    "a segment of a batch": lambda processor, path: processor([["a"], ["User:", path]]),
    "text=": lambda processor, path: processor(text=[["User:", path]]),
    "a text of a batch": lambda processor, path: processor(text=["a", path]),
    "a message": lambda processor, path: processor.apply_chat_template([{"role": "user", "content": path}]),
    "a part of a message": lambda processor, path: processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": path}]}], tokenize=True
    ),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_e8_the_path_of_an_image_is_never_silently_text(here, path, place):
    path = path(here)
    with pytest.raises(ValueError, match=r"PIL\.Image\.open\(path\)|is a URL, .*processor\(\[\.\.\.\]\)"):
        place(letters_processor(), path)


@pytest.mark.parametrize(
    "text", ["What", "no-file.png", "see cat.png", "cat.png?", "~nobody/cat.png", "a\0.png", "x" * 5000]
)
def test_e8_other_texts_stay_text(here, text):
    ids = letters_processor()(["User:", text], add_end_of_utterance_token=False)["input_ids"]
    assert ids.shape[1] == 1 + len("User:") + len(text)


@pytest.mark.parametrize("text", ["What is in no-file.png", "Make b.png of a.jpg"])
def test_e8_a_sentence_that_ends_in_a_name_is_a_prompt(here, text):
    assert letters_processor()(text)["input_ids"].shape[1] == 1 + len(text)


def test_e8_a_path_object_is_an_image(here):
    processor = letters_processor()
    expected = processor(["User:", picture(), "a"])["pixel_values"]
    assert torch.equal(processor(["User:", Path("cat.png"), "a"])["pixel_values"], expected)


ENCODED = {
    "bytes": CONTENT,
    "bytearray": bytearray(CONTENT),
    "memoryview": memoryview(CONTENT),
    "bytearray in a dictionary": {"bytes": bytearray(CONTENT), "path": None},
    "as datasets store it": {"bytes": CONTENT, "path": None},
    "with the name of no file": {"bytes": CONTENT, "path": "00000.png"},
    "a path alone": {"bytes": None, "path": str(FILE)},
    "data URI": f"data:image/png;base64,{BASE64}",
    "DATA URI": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
    "data URI in lines": f"data:image/png;base64,{base64.encodebytes(CONTENT).decode()}",
}


@pytest.mark.parametrize("image", ENCODED.values(), ids=ENCODED)
def test_e10_encoded_images_are_taken_wherever_images_are(image):
    processor = letters_processor()
    expected = processor(["a", picture(), "b"])
    part = {"type": "image", "image": image}
    ways = {
        "segment": processor(["a", image, "b"]),
        "batch": processor([["a", image, "b"]]),
        "apart": processor(images=image, text="a<image>b"),
        "lists": processor(images=[[image]], text=["a<image>b"]),
        "message": processor.apply_chat_template(
            [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, return_tensors="pt"
        ),
    }
    for way, batch in ways.items():
        assert torch.equal(batch["pixel_values"], expected["pixel_values"]), way
        if way != "message":
            assert torch.equal(batch["input_ids"], expected["input_ids"]), way
    alone = processor.image_processor(images=[image])
    assert np.array_equal(alone, expected["pixel_values"][0].numpy())


def test_e10_encoded_images_are_named_where_they_cannot_be_read():
    processor = letters_processor()
    for image, message in [
        (b"no image", "segment 1: image bytes: not an image"),
        ({"bytes": None, "path": None}, "segment 1: neither bytes nor path"),
        ({"bytes": None, "path": "http://127.0.0.1/a.png"}, "segment 1: .*no existing file"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(["a", image])
    with pytest.raises(TypeError, match=r"segment 1: .*got dict"):
        processor(["a", {"role": "user", "bytes": CONTENT}])


RAMP = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
ARRAYS = {
    "float32, fractions": (RAMP / 255).astype(np.float32),
    "float64, fractions": RAMP / 255,
    "float16, fractions": (RAMP / 255).astype(np.float16),
    "float32, to 255": RAMP.astype(np.float32),
    "int64": RAMP.astype(np.int64),
    "torch, as ToTensor makes it": torch.from_numpy(RAMP).permute(2, 0, 1).float() / 255,
    "torch, int32": torch.from_numpy(RAMP).int(),
    "uint8": RAMP,
    "a batch of one": RAMP[np.newaxis],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_are_read_by_the_range_of_their_values(array):
    processor = IdeficsImageProcessor(image_size=28)
    assert np.array_equal(processor([array]), processor([Image.fromarray(RAMP)]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP - 130.0, r"image 0 \(float64\): .*from 0 to 255, got -130\.0 to 78\.0; floats may also be from 0 to 1"),
        (np.where(RAMP == 0, np.nan, RAMP), "from 0 to 255, got nan to nan"),
        (RAMP * 2.0, r"from 0 to 255, got 0\.0 to 416\.0"),
        (RAMP.astype(np.int32) - 1, r"\(int32\): .*from 0 to 255, got -1 to 207"),
        (torch.from_numpy(RAMP / 127 - 1), r"got -1\.0 to 0\.6"),
        (RAMP > 9, "expected an array of numbers, got dtype bool"),
        (RAMP / 208 * 1.02, r"from 0 to 1 or from 0 to 255, got 0\.0 to 1\.02.*, which may be either"),
        (torch.from_numpy(RAMP / 208 * 1.9).half(), "which may be either"),
        (Image.fromarray((RAMP[..., 0] / 198).astype(np.float32) * 1.02), "from 0 to 1 or from 0 to 65535"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        IdeficsImageProcessor(image_size=28)([values])


def test_dark_arrays_of_whole_floats_are_dark():
    dark = np.minimum(RAMP, 1) + np.zeros((5, 7, 3))
    dark[0, 0] = 0
    dark[0, 1] = 1.0  # as fractions of white, the largest; as one of 255, see below
    assert IdeficsImageProcessor(image_size=28, do_normalize=False)([dark]).max() == 1
    assert IdeficsImageProcessor(image_size=28, do_normalize=False)([dark * 2]).max() < 0.02


@pytest.mark.parametrize("numbers", [(2, 0), (0, 2), (2,), (3, 1)], ids=str)
def test_an_array_of_several_images_does_not_fill_the_places_of_others(numbers):
    """Two and none would be one for each of two prompts."""
    stacks = [np.zeros((number, 5, 7, 3), np.uint8) for number in numbers]
    processor = letters_processor()
    for call in (
        lambda: processor([["a", stack] for stack in stacks]),
        lambda: processor(images=[[stack] for stack in stacks], text=["a"] * len(stacks)),
    ):
        with pytest.raises(ValueError, match=r"(segment 1|image 0): got an array of [023] images"):
            call()


def test_fractions_are_not_scaled_twice_or_left_unscaled():
    with pytest.raises(ValueError, match="image 0: do_rescale=False, and the array holds fractions of white"):
        IdeficsImageProcessor(image_size=28)([RAMP / 255], do_rescale=False)


LIMITS = {
    "max_bytes": (reply(encoded()), {"max_bytes": 60}),
    "max_pixels": (reply(png_header(100, 100)), {"max_pixels": 9999}),
    "max_redirects": (redirect("/again.png"), {"max_redirects": 1}),
    "max_images_per_call": (reply(encoded()), {"max_images_per_call": 1}),
    "max_pixels_per_call": (reply(encoded()), {"max_pixels_per_call": 30}),
}


@pytest.mark.parametrize(("limit", "case"), LIMITS.items(), ids=LIMITS)
def test_a_limit_says_how_to_raise_it(server, limit, case):
    answer, settings = case
    processor = letters_processor()
    urls = [server.url(f"/{name}.png", answer) for name in ("one", "two")]
    server.url("/again.png", answer)
    processor.fetcher = ImageFetcher(allow_hosts=[server.host], **settings)
    with pytest.raises(
        ImageFetchError, match=rf"{limit}={settings[limit]}.*processor\.fetcher = ImageFetcher\({limit}="
    ):
        processor(["a", *urls])


def test_schemes_are_read_in_any_case(server):
    processor = letters_processor()
    processor.fetcher = ImageFetcher(allow_hosts=[server.host])
    url = server.url("/a.png", reply(CONTENT)).replace("http://", "HTTP://")
    assert torch.equal(processor(["a", url])["pixel_values"], processor(["a", picture()])["pixel_values"])


def rows(batch, processor) -> list[str]:
    return [text.replace("<unk>", "").replace(" ", "") for text in processor.batch_decode(batch["input_ids"])]


def test_e6_a_list_of_strings_is_read_by_how_it_is_given():
    processor = letters_processor()
    texts = ["ab", "c"]
    assert rows(processor(texts), processor) == ["<s>ab<end_of_utterance>c"]
    assert rows(processor(text=texts), processor) == ["<s>ab", "<s>c"]
    assert rows(processor(text=texts, text_is_batch=False), processor) == ["<s>ab<end_of_utterance>c"]
    assert rows(processor(text=[["ab", "c"]]), processor) == ["<s>ab<end_of_utterance>c"]
    assert rows(processor(text=["ab", picture()]), processor)[0].startswith("<s>ab<fake_token")
    assert rows(processor(text="ab"), processor) == ["<s>ab"]


def test_e6_a_batch_of_texts_names_the_url_among_them():
    processor = letters_processor()
    for url in ("http://127.0.0.1/a.png", "DATA:image/png;base64,AA"):
        with pytest.raises(
            ValueError, match=r"prompt 1 is a URL, .*text= is a batch of texts.*processor\(\[\.\.\.\]\)"
        ):
            processor(text=["a", url])
        assert rows(processor(text=["a", url], text_is_batch=True), processor)[1] == f"<s>{url}"


def test_e6_completions_begin_without_the_beginning_of_text():
    processor = letters_processor()
    batch = processor(text=["ab", "c"], add_special_tokens=False, padding_side="right", return_tensors="np")
    assert rows(batch, processor) == ["ab", "c"]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert rows(processor(text=["ab", "c"], add_special_tokens=True), processor) == ["<s>ab", "<s>c"]


def test_rows_are_lists_where_neither_padding_nor_tensors_are_asked_for():
    """As processors of transformers do it, for those who pad themselves: GRPO, for example."""
    processor = letters_processor()
    padded = processor([["ab", picture()], ["c"]], return_tensors="np")
    batch = processor([["ab", picture()], ["c"]], padding=False)
    kept = padded["attention_mask"] == 1
    for name in ("input_ids", "attention_mask", "image_attention_mask"):
        assert batch[name] == [row[k].tolist() for row, k in zip(padded[name], kept, strict=True)], name
    assert torch.equal(batch["pixel_values"], torch.from_numpy(padded["pixel_values"]))
    conversations = [[{"role": "user", "content": text}] for text in ("ab", "c")]
    chats = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    assert [len(row) for row in chats["input_ids"]] == [len("s") + len("User: ") + 1 + n for n in (2, 1)]
    for options in ({"processor_kwargs": {"padding": "longest"}}, {"padding": True}):
        assert processor.apply_chat_template(conversations, tokenize=True, **options).shape == (2, 10)
    of_numpy = IdeficsProcessor(processor.image_processor, processor.tokenizer, return_tensors="np")
    assert isinstance(of_numpy.apply_chat_template(conversations, tokenize=True), np.ndarray)
    with pytest.raises(ValueError, match="rows have 2 to 6 tokens; a batch needs padding"):
        processor([["ab", picture()], ["c"]], padding=False, return_tensors="np")


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_e6_the_image_mask_follows_the_tokens(framework):
    """Completions are appended and rows moved to the left, as TRL's collators do it."""
    processor = letters_processor()
    ends = ["<image>bc", "<image>b"]
    batch = processor(images=[[picture()]] * 2, text=ends, padding_side="left", return_tensors=framework)
    whole = processor(images=[[picture()]] * 2, text=[end + "de" for end in ends], padding_side="right")
    batch["input_ids"] = whole["input_ids"] if framework == "pt" else whole["input_ids"].numpy()
    assert np.array_equal(batch["image_attention_mask"], whole["image_attention_mask"])
    assert type(batch["image_attention_mask"]) is type(batch["input_ids"])
    without = processor(["a", picture()], return_image_attention_mask=False)
    without["input_ids"] = whole["input_ids"]
    assert "image_attention_mask" not in without


def chat(*turns) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(turns)]


def test_e10_the_collator_takes_messages():
    """The same batch as from the prompts that the messages stand for, images beside them or inside."""
    processor = letters_processor()
    image = picture()
    prompts = [
        {"prompt": ["User:", image, "a", "\nAssistant: b<end_of_utterance>"]},
        {"prompt": ["User: cd", "\nAssistant: e<end_of_utterance>"]},
    ]
    place = {"type": "image", "text": None}  # datasets give every part the same keys
    inside = chat([{"type": "image", "image": image}, {"type": "text", "text": "a"}], "b")
    beside = chat([place, {"type": "text", "text": "a"}], "b")
    collate = IdeficsCollator(processor, return_tensors="np")
    expected = collate(prompts)
    for examples in (
        [{"messages": inside}, {"messages": chat("cd", "e")}],
        [{"messages": beside, "images": [image]}, {"messages": chat("cd", "e"), "images": None}],
    ):
        batch = collate(examples)
        assert batch.keys() == expected.keys()
        for name, values in expected.items():
            assert np.array_equal(batch[name], values), name
    for examples, message in [
        ([{"messages": inside}, prompts[1]], 'some examples of the batch have the key "messages"'),
        ([{"messages": beside, "images": [image] * 2}], "example 0 has 2 images and 1 places for them"),
        ([{"messages": beside}], "prompt 0: the number of <image> tokens"),
        ([{"messages": chat("a", "b"), "image": image}], 'example 0 has the key "image" beside "messages"'),
        ([{"messages": chat("a", "b"), "prompt": "a"}], 'example 0 has the key "prompt" beside "messages"'),
        ([prompts[1], {"prompt": "a", "images": [image]}], 'example 1 has the key "images" beside "prompt"'),
        ([{"prompt": "Assistant:", "completion": "a"}], 'example 0 has the key "completion" beside "prompt"'),
        ([{}], r'example 0 has neither the key "prompt" nor "messages".*remove_unused_columns=False'),
    ]:
        with pytest.raises(ValueError, match=message):
            collate(examples)
