"""Prompts as strings: the format of the checkpoints, places of images, escaping. No tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from idefics_common.prompts.prompt import (
    FAKE_TOKEN,
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    ImageSegment,
    build_prompt,
    escape_special_tokens,
    place_images,
    split_prompts,
)

IMG = Image.new("RGB", (2, 2))
F, I, E = FAKE_TOKEN, IMAGE_TOKEN, "<end_of_utterance>"  # noqa: E741 - short, so that the expected strings can be read
SPECIAL = {"bos_token": "<s>", "end_of_utterance_token": E}


def built(prompts, **kwargs) -> list[str]:
    return [build_prompt(segments, **SPECIAL | kwargs).text for segments in split_prompts(prompts)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("Describe this", ["<s>Describe this"]),
        (["User:", IMG, "hi"], [f"<s>User:{F}{I}{F}hi"]),
        ([IMG, IMG, np.zeros((2, 2, 3), np.uint8), "hi"], [f"<s>{F}{I}{F}{I}{F}{I}{F}hi"]),
        ([[IMG], "two words", ["a", Path("b.png")]], [f"<s>{F}{I}{F}", "<s>two words", f"<s>a{F}{I}{F}"]),
        (["a", "b"], [f"<s>a{E}b"]),
        (["a", IMG, "b", "c"], [f"<s>a{F}{I}{F}b{E}c"]),
        (["a", "", "b"], [f"<s>a{E}{E}b"]),  # as published processors do it
        ([" <s>a"], ["<s>a"]),
        (["http://example.com/a.png ", "see http://example.com/a.png"], [f"<s>{F}{I}{F}see http://example.com/a.png"]),
        (IMG, [f"<s>{F}{I}{F}"]),
        (Path("b.png"), [f"<s>{F}{I}{F}"]),
        ([["a", IMG], IMG, Path("b.png")], [f"<s>a{F}{I}{F}", f"<s>{F}{I}{F}", f"<s>{F}{I}{F}"]),
        (["a", "b.png"], [f"<s>a{E}b.png"]),
    ],
)
def test_interleaved_prompts(prompts, expected):
    assert built(prompts) == expected


def test_p5_a_string_is_one_segment_and_a_flat_list_one_prompt():
    assert built("Describe this") == ["<s>Describe this"]
    assert built(["first prompt", "second prompt"], end_of_utterance_token="") == ["<s>first promptsecond prompt"]
    assert built([["first prompt"], ["second prompt"]]) == ["<s>first prompt", "<s>second prompt"]


def test_p6_edge_spaces_are_stripped_unless_told_otherwise():
    prompt = ["Hello ", IMG, " world\n "]
    assert built(prompt) == [f"<s>Hello{F}{I}{F}world\n"]
    assert built(prompt, strip=False) == [f"<s>Hello {F}{I}{F} world\n "]
    (segments,) = place_images(" <image> <image> hi ", [IMG, IMG], strip=False)
    assert build_prompt(segments, strip=False).text == f" {F}{I}{F} {F}{I}{F} hi "


def test_end_of_text_goes_last_and_only_once():
    assert built("a", eos_token="</s>") == ["<s>a</s>"]
    assert built("a</s>", eos_token="</s>") == ["<s>a</s>"]
    assert built(["a", IMG], eos_token="</s>") == [f"<s>a{F}{I}{F}</s>"]


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("Hi", IMG, [f"<s>{F}{I}{F}Hi"]),
        ("Hi", [IMG, IMG], [f"<s>{F}{I}{F}{I}{F}Hi"]),
        (["Hi"], [[IMG]], [f"<s>{F}{I}{F}Hi"]),
        (["a", "b"], [IMG, IMG], [f"<s>{F}{I}{F}a", f"<s>{F}{I}{F}b"]),
        (["a", "b", "c"], [[], [IMG, IMG], IMG], ["<s>a", f"<s>{F}{I}{F}{I}{F}b", f"<s>{F}{I}{F}c"]),
        ("a <image> b<image>", [IMG, IMG], [f"<s>a{F}{I}{F}b{F}{I}{F}"]),
        ("<image> <image> a", [IMG, IMG], [f"<s>{F}{I}{F}{I}{F}a"]),
        (f"a{F}{I}{F}{I}{F}b", [IMG, IMG], [f"<s>a{F}{I}{F}{I}{F}b"]),  # as a printed prompt has it
        ("http://example.com", ["a.png"], [f"<s>{F}{I}{F}http://example.com"]),  # text is never fetched
        (["a", "b"], np.zeros((2, 5, 5, 3), np.uint8), [f"<s>{F}{I}{F}a", f"<s>{F}{I}{F}b"]),
    ],
)
def test_p2_text_and_images_apart(text, images, expected):
    assert [build_prompt(segments, **SPECIAL).text for segments in place_images(text, images)] == expected


def test_images_keep_their_order_and_their_names():
    (segments,) = place_images("a<image>b<image>", ["x.png", "y.png"])
    assert build_prompt(segments).images == [
        ImageSegment("x.png", "prompt 0, image 0"),
        ImageSegment("y.png", "prompt 0, image 1"),
    ]
    _, segments = split_prompts([["a"], ["b", IMG, "data:image/png;base64,AA"]])
    assert build_prompt(segments).images == [
        ImageSegment(IMG, "prompt 1, segment 1"),
        ImageSegment("data:image/png;base64,AA", "prompt 1, segment 2"),
    ]


BAD_INPUT = {
    "nothing": (lambda: split_prompts([]), ValueError, "there are no prompts: got an empty list"),
    "no texts": (lambda: place_images([], []), ValueError, "there are no prompts: got an empty list of texts"),
    "a file name": (
        lambda: split_prompts(["a/photo.png"]),
        ValueError,
        r"prompt 0 is nothing but the name of an image file, 'a/photo\.png', .*pathlib.Path",
    ),
    "file names": (lambda: split_prompts([["a"], ["b.JPG ", "c.jpeg"]]), ValueError, r"prompt 1 .*'b\.JPG '"),
    "text first": (lambda: place_images([IMG], "hello"), TypeError, r"images= holds text .* processor\(images, text\)"),
    "texts first": (
        lambda: place_images([IMG, IMG], ["a", "b"]),
        TypeError,
        "images= holds text and text= holds images",
    ),
    "no segments": (lambda: split_prompts([["a"], []]), ValueError, "prompt 1 is empty"),
    "only spaces": (lambda: split_prompts([" ", ""]), ValueError, "prompt 0 is empty"),
    "no text at all": (lambda: place_images([" ", "a"], [[], [IMG]]), ValueError, "prompt 0 is empty"),
    "literal": (
        lambda: split_prompts([["a"], [IMG, "see <image> now"]]),
        ValueError,
        "prompt 1, segment 1: the text 'see <image> now' contains a literal <image>",
    ),
    "a number": (lambda: split_prompts(["a", 3]), TypeError, "prompt 0, segment 1: .*got int"),
    "a message": (lambda: split_prompts({"role": "user"}), TypeError, "got dict; .*apply_chat_template"),
    "a number in a batch": (lambda: split_prompts([["a"], 3]), TypeError, "prompt 1: .*or an image, got int"),
    "fewer marks": (lambda: place_images("<image> a", [IMG, IMG]), ValueError, "prompt 0: .*got 1 tokens and 2 images"),
    "more marks": (lambda: place_images(["a", "<image><image>"], [IMG, IMG]), ValueError, "prompt 1: .*got 2 tokens"),
    "no images": (lambda: place_images("<image> a", []), ValueError, "prompt 0: .*got 1 tokens and 0 images"),
    "fewer texts": (lambda: place_images(["a", "b"], [IMG] * 3), ValueError, "got 2 texts and 3 images"),
    "fewer lists": (lambda: place_images(["a", "b"], [[IMG]]), ValueError, "got 2 texts and 1 lists of images"),
    "mixed": (lambda: place_images([["a", IMG]], [IMG]), TypeError, "with images=, text must be a string"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@given(
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "<", "image", ">", "<ima", "ge>", " ", "x"]), max_size=8).map("".join)
)
def test_p4_escaped_text_holds_no_special_token_and_loses_nothing(text):
    escaped = escape_special_tokens(text)
    assert not any(token in escaped for token in SPECIAL_TOKENS)
    assert escaped.replace(" ", "") == text.replace(" ", "")


def test_escaping_breaks_up_overlapping_tokens_and_leaves_other_text_alone():
    assert escape_special_tokens("a <image> b") == "a < image> b"
    assert escape_special_tokens("if a<b: c>d") == "if a<b: c>d"
    assert escape_special_tokens("<ab>", ["<ab", "b>", "a"]) == "< ab >"
    assert escape_special_tokens("abc", []) == "abc"


@given(st.lists(st.sampled_from([" ", "a", "bc ", I, "\n"]), min_size=1, max_size=9).map("".join), st.booleans())
def test_every_copied_character_is_where_the_prompt_says(text, strip):
    marks = text.count(I)
    if not text.strip() and not marks:
        text += "a"
    (segments,) = place_images(text, [IMG] * marks, strip=strip)
    prompt = build_prompt(segments, **SPECIAL, strip=strip)
    for part, start in zip(prompt.copied, prompt.segment_starts, strict=True):
        assert start == part.start
        source = text[part.source_start : part.source_start + part.length]
        assert prompt.text[part.start : part.start + part.length] == source
    for offsets in prompt.replacement_offsets():
        assert prompt.text[slice(*offsets["new_span"])] == offsets["replacement"]
    copied = "".join(prompt.text[part.start : part.start + part.length] for part in prompt.copied)
    assert copied.replace(" ", "") == text.replace(I, "").replace(" ", "")
