"""The processor against the recorded calls of transformers 4.57.6, and where it deliberately differs."""

import copy
import json
import pickle
import ssl

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError
from idefics_common.images.processing import IdeficsImageProcessor
from idefics_common.prompts.processor import IdeficsProcessor
from idefics_common.prompts.prompt import SPECIAL_TOKENS
from tests.common.hostile_server import encoded, reply
from tests.common.processors import FIXTURE, letters_processor, load_processor, picture
from tests.requirements import needs_tensorflow, needs_torch

EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
OUTPUTS = ("input_ids", "attention_mask", "pixel_values", "image_attention_mask")


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def decoded(processor, batch) -> list[str]:
    return processor.batch_decode(batch["input_ids"], skip_special_tokens=False)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("source", ["version 4 files", "own files", "transformers' image processor"])
def test_recorded_calls(name, source, processor, tmp_path):
    call = EXPECTED[name]
    if source == "own files":
        processor.save_pretrained(tmp_path)
        processor = IdeficsProcessor.from_pretrained(tmp_path)
    elif source != "version 4 files":
        from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

        processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), processor.tokenizer)
    prompts = [
        [Image.open(FIXTURE / segment["image"]) if isinstance(segment, dict) else segment for segment in prompt]
        for prompt in call["prompts"]
    ]
    batch = processor(prompts, add_eos_token=call["add_eos_token"], return_tensors="np")
    for output in ("input_ids", "attention_mask", "image_attention_mask"):
        assert batch[output].tolist() == call[output], output
    pixel_values = np.load(FIXTURE / "pixel_values.npz")[name.split("|")[0]]
    np.testing.assert_array_equal(batch["pixel_values"], pixel_values)
    assert batch["pixel_values"].dtype == pixel_values.dtype
    assert processor.batch_decode(batch["input_ids"]) == call["decoded"]


@pytest.mark.parametrize(
    "call",
    [
        lambda processor, prompt, **kwargs: processor(prompt, **kwargs),
        lambda processor, prompt, **kwargs: processor([prompt], **kwargs),
        lambda processor, prompt, **kwargs: processor(text=prompt, **kwargs),
        lambda processor, prompt, **kwargs: processor(images=[prompt[1]], text="User:<image>hi", **kwargs),
        lambda processor, prompt, **kwargs: processor([prompt[1]], "User:<image>hi", **kwargs),
    ],
    ids=["first", "batch", "text=", "images= and text=", "images, text"],
)
def test_ways_to_call(call, processor):
    batch = call(processor, ["User:", picture(), "hi"], return_tensors="np")
    assert decoded(processor, batch) == [
        "<s> User:<fake_token_around_image><image><fake_token_around_image> hi",
    ]
    assert tuple(batch) == tuple(processor.model_input_names) == OUTPUTS


def test_p1_end_of_utterance_is_found_whoever_saved_the_tokenizer(processor, tmp_path):
    prompt = ["User: hi", picture(), "what?", "Assistant: a cat", "User: ok"]
    processor.tokenizer.save_pretrained(tmp_path)  # in the form of transformers 5
    processor.image_processor.save_pretrained(tmp_path)
    for one in (processor, IdeficsProcessor.from_pretrained(tmp_path), letters_processor()):
        (text,) = decoded(one, one(prompt, return_tensors="np"))
        assert text.count("<end_of_utterance>") == 2
        (text,) = decoded(one, one(prompt, return_tensors="np", add_end_of_utterance_token=False))
        assert "<end_of_utterance>" not in text
        one.add_end_of_utterance_token = False
        (text,) = decoded(one, one(prompt, return_tensors="np"))
        assert "<end_of_utterance>" not in text
        one.add_end_of_utterance_token = None


@pytest.mark.parametrize("text", ["Hi", "<image>Hi"])
def test_p2_p3_text_sees_the_image_given_apart(text):
    processor = letters_processor()
    for images in ([picture()], [[picture()]]):
        batch = processor(images=images, text=[text], return_tensors="np")
        assert decoded(processor, batch)[0].replace(" ", "").endswith("<image><fake_token_around_image>Hi")
        assert batch["image_attention_mask"][0, :, 0].tolist() == [0, 0, 1, 1, 1, 1]


def test_p3_image_marker_in_text(processor):
    batch = processor(images=[picture("rgb"), picture("grey")], text="A <image>B <image>", return_tensors="np")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2
    assert batch["image_attention_mask"][0, -1].tolist() == [0, 1]
    expected = processor(["A", picture("rgb"), "B", picture("grey")], return_tensors="np")
    for output in OUTPUTS:
        np.testing.assert_array_equal(batch[output], expected[output])


def test_p4_literal_image_token_in_user_text_is_refused_or_escaped(processor):
    prompt = [picture("rgb"), "see <image> now", picture("grey"), "tail"]
    with pytest.raises(ValueError, match=r"prompt 0, segment 1: .*'see <image> now'"):
        processor(prompt, return_tensors="np")
    prompt[1] = processor.escape("see <image> now</s>")
    assert prompt[1] == "see < image> now< /s>"
    batch = processor(prompt, return_tensors="np")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2
    assert batch["image_attention_mask"][0, -1].tolist() == [0, 1]


@pytest.mark.parametrize("argument", [{"image_size": 56}, {"size": {"height": 56, "width": 56}}])
def test_p7_image_size_of_a_call_holds_for_the_whole_batch(argument, processor):
    batch = processor([[picture(), "x"], ["no image"]], return_tensors="np", **argument)
    assert batch["pixel_values"].shape == (2, 1, 3, 56, 56)
    np.testing.assert_array_equal(batch["pixel_values"][0], IdeficsImageProcessor(image_size=56)(picture()))
    assert not batch["pixel_values"][1].any()
    assert processor("no image", return_tensors="np", **argument)["pixel_values"].shape == (1, 1, 3, 56, 56)


@pytest.mark.parametrize(("return_tensors", "module"), [("np", "numpy"), ("pt", "torch"), ("tf", "tensorflow")])
@pytest.mark.parametrize("with_image", [True, False])
def test_p8_p11_p12_every_framework_gets_the_same_values(return_tensors, module, with_image, processor):
    pytest.importorskip(module)
    prompt = ["User:", picture(), "what"] if with_image else ["User: what"]
    expected = processor(prompt, return_tensors="np", return_labels=True)
    for arguments in ({"return_tensors": return_tensors}, {"common_kwargs": {"return_tensors": return_tensors}}):
        batch = processor(prompt, return_labels=True, **arguments)
        for name, value in batch.items():
            assert type(value).__module__.split(".")[0] == module
            np.testing.assert_array_equal(np.asarray(value), expected[name])
            assert np.asarray(value).dtype == (np.float32 if name == "pixel_values" else np.int64)
    mask = expected["image_attention_mask"]
    assert mask.sum() == (4 if with_image else 0)
    assert mask.shape == (*expected["input_ids"].shape, 1)


def test_default_framework_is_torch_or_that_of_the_constructor(processor):
    torch = pytest.importorskip("torch")
    assert isinstance(processor("hi")["input_ids"], torch.Tensor)
    own = IdeficsProcessor(processor.image_processor, processor.tokenizer, return_tensors="np")
    assert isinstance(own("hi")["input_ids"], np.ndarray)


@pytest.mark.parametrize("truncation_side", ["left", "right"])
@pytest.mark.parametrize("max_length", range(1, 15))
def test_p9_truncation_keeps_each_image_with_its_placeholder(truncation_side, max_length):
    processor = letters_processor(truncation_side=truncation_side)
    names = ["rgb", "grey", "rgba"]
    prompt = ["a", picture("rgb"), "bb", picture("grey"), picture("rgba"), "c"]
    whole = processor(prompt, return_tensors="np")["input_ids"][0]
    assert len(whole) == 13
    is_placeholder = whole == processor.image_token_id
    kept = is_placeholder[-max_length:] if truncation_side == "left" else is_placeholder[:max_length]
    first = is_placeholder[: len(whole) - len(kept)].sum() if truncation_side == "left" else 0

    batch = processor(prompt, truncation=True, max_length=max_length, return_tensors="np")
    assert batch["input_ids"].shape == (1, min(max_length, 13))
    assert (batch["input_ids"][0] == processor.image_token_id).tolist() == kept.tolist()
    images = names[first : first + kept.sum()]
    expected = np.zeros((1, max(1, len(images)), 3, 28, 28), np.float32)
    for place, name in enumerate(images):
        expected[0, place] = processor.image_processor(picture(name))[0]
    np.testing.assert_array_equal(batch["pixel_values"], expected)
    seen = np.cumsum(kept) - 1
    np.testing.assert_array_equal(
        batch["image_attention_mask"][0], (seen[:, None] == np.arange(expected.shape[1])).astype(np.int64)
    )


def test_uneven_batch_under_either_padding():
    prompts = [[picture("rgb"), "a"], ["bcd"], [picture("grey"), picture("rgba"), "e"]]
    rows = {}
    for side in ("left", "right"):
        processor = letters_processor(padding_side=side)
        batch = processor(prompts, return_tensors="np")
        assert batch["pixel_values"].shape == (3, 2, 3, 28, 28)
        assert not batch["pixel_values"][1].any()
        is_text = batch["attention_mask"].astype(bool)
        assert is_text.sum(axis=1).tolist() == [5, 4, 7]
        rows[side] = [
            (ids[text].tolist(), mask[text].tolist())
            for ids, text, mask in zip(batch["input_ids"], is_text, batch["image_attention_mask"], strict=True)
        ]
    assert rows["left"] == rows["right"]


def test_padding_arguments_and_tokenizer_defaults():
    processor = letters_processor()
    padded = processor("abc", padding="max_length", max_length=9, return_tensors="np")
    assert padded["attention_mask"].sum(axis=1).tolist() == [4]
    assert padded["input_ids"].shape == (1, 9)
    nested = processor("abc", text_kwargs={"padding": "max_length", "max_length": 9}, return_tensors="np")
    np.testing.assert_array_equal(nested["input_ids"], padded["input_ids"])
    with pytest.raises(ValueError, match="rows have 2 to 4 tokens; a batch needs padding"):
        processor([["abc"], ["a"]], padding=False, return_tensors="np")


@pytest.mark.parametrize("name", ["foo", "videos", "audio"])
def test_k5_keywords_that_nothing_has_are_refused(processor, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        processor("a", text_is_batch=True, return_tensors="np", **{name: [1]})
    message = [{"role": "user", "content": "a"}]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        processor.apply_chat_template(message, processor_kwargs={name: [1]})
    processor("a", return_tensors="np", **{name: None})


def test_k5_what_a_call_asks_of_the_tokenizer_is_in_the_output(processor):
    prompts = ["a dog", "a dog that sleeps in the sun"]
    names = ("return_token_type_ids", "return_special_tokens_mask", "return_length")
    asked = {**dict.fromkeys(names, True), "return_attention_mask": False}
    batch = processor(prompts, text_is_batch=True, return_tensors="np", **asked)
    texts = [processor.tokenizer.bos_token + prompt for prompt in prompts]
    expected = processor.tokenizer(texts, add_special_tokens=False, padding="longest", return_tensors="np", **asked)
    for name in ("input_ids", "token_type_ids", "special_tokens_mask", "length"):
        assert np.array_equal(batch[name], expected[name]), name
    assert "attention_mask" not in batch


def test_transform_is_applied_to_each_image(processor):
    def transform(image):
        return np.full((3, 6, 5), image.width, dtype=np.float32)

    images = [picture("rgb"), picture("grey")]
    batch = processor([[*images, "a"], ["b"]], transform=transform, return_tensors="np")
    assert batch["pixel_values"].shape == (2, 2, 3, 6, 5)
    assert batch["pixel_values"][0, :, 0, 0, 0].tolist() == [image.width for image in images]


def test_debug_shows_the_prompt(processor, capsys):
    processor([["a", picture()], ["b"]], debug=True, return_tensors="np")
    assert capsys.readouterr().out == (
        "prompt 0: <s>a<fake_token_around_image><image><fake_token_around_image>\nprompt 1: <s>b\n"
    )


def test_p10_urls_go_through_the_fetcher_and_can_be_switched_off(processor, monkeypatch):
    class Fetcher(ImageFetcher):
        def fetch(self, url, budget=None):
            if not self.allow_fetch:
                return super().fetch(url, budget)
            return picture({"https://example.com/1.png": "rgb", "https://example.com/2.png": "grey"}[url])

    monkeypatch.setattr(processor, "fetcher", Fetcher())
    prompt = ["https://example.com/1.png", "a", "https://example.com/2.png"]
    batch = processor(prompt, return_tensors="np")
    expected = processor([picture("rgb"), "a", picture("grey")], return_tensors="np")
    np.testing.assert_array_equal(batch["pixel_values"], expected["pixel_values"])
    apart = processor(images=[prompt[0], prompt[2]], text="<image>a<image>", return_tensors="np")
    np.testing.assert_array_equal(apart["pixel_values"], expected["pixel_values"])
    for refusing in (processor, load_processor(allow_fetch=False)):
        arguments = {"allow_fetch": False} if refusing is processor else {}
        with pytest.raises(ImageFetchError, match=r"prompt 1, segment 0: .*fetching is off"):
            refusing([["b"], prompt], return_tensors="np", **arguments)


def unreadable() -> Image.Image:
    file = (FIXTURE / "rgb.png").open("rb")
    image = Image.open(file)
    file.close()
    return image


BAD_INPUT = {
    "nothing": (lambda p: p(return_tensors="np"), ValueError, "expected prompts, or text= and images="),
    "empty prompt": (lambda p: p([["a"], []]), ValueError, "prompt 1 is empty"),
    "unreadable": (lambda p: p([["a"], ["b", unreadable()]]), ValueError, "prompt 1, segment 1: .* cannot be read"),
    "unreadable apart": (lambda p: p(images=[unreadable()], text="a"), ValueError, "prompt 0, image 0: .* cannot be"),
    "no such file": (lambda p: p(images=["no.png"], text="a"), ValueError, r"prompt 0, image 0: 'no\.png' is no URL"),
    "too many images": (lambda p: p(images=[picture()] * 2, text="<image>a"), ValueError, "prompt 0: .*got 1 tokens"),
    "too few images": (lambda p: p(images=[], text="<image>a"), ValueError, "prompt 0: .*1 tokens and 0 images"),
    "number of texts": (lambda p: p(images=[picture()] * 3, text=["a", "b"]), ValueError, "got 2 texts and 3 images"),
    "segment": (lambda p: p(["a", None]), TypeError, "prompt 0, segment 1: .*got NoneType"),
    "label turns": (lambda p: p("a", label_turns="user"), ValueError, "label_turns must be one of all, assistant"),
    "overflow": (lambda p: p("a", return_overflowing_tokens=True), ValueError, "return_overflowing_tokens is not"),
    "twice": (
        lambda p: p("a", text_kwargs={"padding": True}, padding=True),
        ValueError,
        "padding was passed two times",
    ),
    "size": (
        lambda p: IdeficsProcessor(p.image_processor, p.tokenizer, image_size=99),
        ValueError,
        "image_size=99 contradicts the image processor's 28",
    ),
    "no tokenizer": (lambda p: IdeficsProcessor(p.image_processor), ValueError, "needs a tokenizer"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(call, error, message, processor):
    processor = IdeficsProcessor(processor.image_processor, processor.tokenizer, return_tensors="np")
    with pytest.raises(error, match=message):
        call(processor)


def test_tokenizer_without_the_tokens():
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
    )
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=28), plain, return_tensors="np")
    batch = processor("zzz")  # unknown words must not count as images
    assert not batch["image_attention_mask"].any()
    with pytest.raises(ValueError, match="the tokenizer has no token <fake_token_around_image>"):
        processor([picture(), "a"])
    with pytest.raises(ValueError, match="the tokenizer has no token <end_of_utterance>"):
        processor("a", add_end_of_utterance_token=True)


@needs_torch
def test_saved_files_are_those_of_transformers_4_and_5(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    image_processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert image_processor["image_processor_type"] == "IdeficsImageProcessor"
    assert (image_processor["image_size"], image_processor["processor_class"]) == (28, "IdeficsProcessor")
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "LlamaTokenizerFast"
    assert tokenizer["additional_special_tokens"] == list(SPECIAL_TOKENS)
    assert "extra_special_tokens" not in tokenizer  # transformers 4 takes it for a dictionary and fails

    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert type(theirs).__module__.startswith("transformers.")
    prompt = ["User:", picture(), "hi"]
    ours = IdeficsProcessor.from_pretrained(tmp_path)
    expected, got = theirs(text=prompt, return_tensors="pt"), ours(prompt, return_tensors="pt")
    for output in OUTPUTS:
        np.testing.assert_array_equal(got[output], expected[output])

    letters_processor().save_pretrained(tmp_path / "letters")
    saved = json.loads((tmp_path / "letters" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def messages() -> list[dict]:
    return [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is this?"}, {"type": "image", "image": picture("rgb")}],
        },
        {"role": "assistant", "content": "A cat."},
        {
            "role": "user",
            "content": [{"type": "image", "path": str(FIXTURE / "grey.png")}, {"type": "text", "text": "And this?"}],
        },
    ]


def test_chat_messages_become_the_instruct_format():
    processor = letters_processor()
    prompt = processor.apply_chat_template(messages(), add_generation_prompt=True)
    assert prompt == (
        "<s>Answer briefly.\nUser: What is this?<image><end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
        "User:<image>And this?<end_of_utterance>\nAssistant:"
    )
    expected = processor(
        [
            "Answer briefly.\nUser: What is this?",
            picture("rgb"),
            "<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\nUser:",
            picture("grey"),
            "And this?<end_of_utterance>\nAssistant:",
        ],
        return_tensors="np",
    )
    batch = processor.apply_chat_template(
        messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    for output in OUTPUTS:
        np.testing.assert_array_equal(batch[output], expected[output])


def test_chat_batches_and_the_mask_of_the_assistant():
    processor = letters_processor()
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    batch = processor.apply_chat_template(
        [messages()[:3], short],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="np",
    )
    said = [
        processor.decode(ids[np.asarray(mask, dtype=bool)]).replace(" ", "")
        for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    ]
    assert said == ["Acat.<end_of_utterance>", "Hello.<end_of_utterance>"]
    texts = processor.apply_chat_template([short, short], tokenize=True, return_dict=True, return_tensors="np")
    assert len(texts["input_ids"]) == 2
    assert texts["pixel_values"].shape == (2, 1, 3, 28, 28)
    with pytest.raises(Exception, match="roles are system, user and assistant, got tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])


def test_p10_the_image_processor_has_the_processors_limits(server, tmp_path):
    url = server.url("/a.png", reply(encoded()))
    allowing = ImageFetcher(allow_hosts=[server.host], tls_context=ssl.create_default_context())
    processor = letters_processor()
    with pytest.raises(ImageFetchError, match="not in allow_ports"):
        processor.image_processor([url])
    processor.fetcher = allowing
    for one in (processor, copy.deepcopy(processor)):
        assert one.image_processor([url]).shape == (1, 3, 28, 28)
        assert one.image_processor.fetch_images(url).size == (6, 4)
        one.allow_fetch = False
        with pytest.raises(ImageFetchError, match="fetching is off"):
            one.image_processor([url])
        with pytest.raises(ImageFetchError, match="fetching is off"):
            one([url], return_tensors="np")
        one.allow_fetch = None
    assert len(server.seen) == 4
    built = IdeficsProcessor(processor.image_processor, processor.tokenizer)
    assert built.fetcher is allowing

    processor.allow_fetch = False
    processor.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path / "apart")
    assert not any("fetcher" in path.read_text() for path in tmp_path.rglob("p*.json"))
    loaded = IdeficsProcessor.from_pretrained(tmp_path)
    for one in (loaded, pickle.loads(pickle.dumps(loaded)), IdeficsProcessor(loaded.image_processor, loaded.tokenizer)):
        assert one.allow_fetch is False
        with pytest.raises(ImageFetchError, match="fetching is off"):
            one.image_processor([url])
    loaded.image_processor = IdeficsImageProcessor(image_size=28)
    with pytest.raises(ImageFetchError, match="fetching is off"):
        loaded([url], return_tensors="np")
    settings = {**processor.image_processor.to_dict(), "fetcher": {"allow_hosts": [server.host]}}
    assert IdeficsImageProcessor.from_dict(settings).fetcher == ImageFetcher()  # a file has no say


@pytest.mark.parametrize(
    "return_tensors",
    [
        "np",
        pytest.param("pt", marks=needs_torch),
        pytest.param("tf", marks=needs_tensorflow),
    ],
)
def test_ids_of_every_framework_are_decoded(return_tensors, processor):
    ids = processor([["User:", "one"], ["two"]], return_tensors=return_tensors)["input_ids"]
    expected = processor.tokenizer.batch_decode(np.asarray(ids).tolist(), skip_special_tokens=True)
    assert any(expected)
    assert processor.batch_decode(ids, skip_special_tokens=True) == expected
    assert processor.batch_decode([ids[0], ids[1]], skip_special_tokens=True) == expected
    assert [processor.decode(row, skip_special_tokens=True) for row in ids] == expected
