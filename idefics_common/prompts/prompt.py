"""From a user's prompt to the string that the tokenizer sees and the images that belong to it. No tensors, no files.

An interleaved prompt is a list of segments: text, image objects, and image URLs. The string it becomes is the one that
the published checkpoints were trained on: the beginning-of-text token, then the segments, each image as
``<fake_token_around_image><image><fake_token_around_image>`` (adjacent images share the token between them), and, for
checkpoints that know it, ``<end_of_utterance>`` between two text segments that follow each other.

What differs from transformers: a text with ``images=`` may mark their places by ``<image>``, and images without a mark
come before the text, where it can see them; ``<image>`` inside an interleaved text is refused, because it would shift
every later image by one; and a plain string is one segment, not a list of letters.
"""

import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from idefics_common.fetching.fetcher import is_url
from idefics_common.images.conversion import is_encoded, is_image
from idefics_common.images.decoding import is_image_file

IMAGE_TOKEN = "<image>"
FAKE_TOKEN = "<fake_token_around_image>"
END_OF_UTTERANCE_TOKEN = "<end_of_utterance>"
SPECIAL_TOKENS = (FAKE_TOKEN, IMAGE_TOKEN, END_OF_UTTERANCE_TOKEN)

_IMAGE_FILE_NAME = re.compile(
    r".*\S\.(?:png|jpe?g|jfif|jp2|webp|gif|bmp|tiff?|avif|hei[cf]|ppm|ico|tga|svg)", re.IGNORECASE
)

# A mark for an image in a text: the bare token, or the token as prompts are printed, with its neighbours.
_MARK = re.compile(f"(?:{FAKE_TOKEN})?{IMAGE_TOKEN}(?:{FAKE_TOKEN})?")


@dataclass(frozen=True)
class TextSegment:
    """A piece of text, to be taken literally. `offset` is its place in the string the user gave."""

    text: str
    offset: int = 0


@dataclass(frozen=True)
class ImageSegment:
    """The place of an image. `source` is an object, a URL or a path; `name` is what errors call it."""

    source: object
    name: str


@dataclass(frozen=True)
class Copied:
    """`length` characters of the user's string at `source_start` stand at `start` of the built prompt."""

    source_start: int
    start: int
    length: int


@dataclass(frozen=True)
class Prompt:
    """One prompt, built.

    Attributes:
        text: what the tokenizer sees.
        images: the image segments, in the order of their placeholders.
        segment_starts: where in `text` each text segment begins.
        copied: which parts of `text` are the user's, in order.
    """

    text: str
    images: list[ImageSegment] = field(default_factory=list)
    segment_starts: list[int] = field(default_factory=list)
    copied: list[Copied] = field(default_factory=list)

    def replacement_offsets(self) -> list[dict]:
        """Where `text` differs from the user's string, in the form in which `ProcessorMixin` reads it.

        Returns:
            In order, `span` (first character and one after the last) in the user's string, `new_span` in `text`, and
            the `replacement` that stands there.
        """
        offsets = []
        source_end = end = 0
        for part in self.copied:
            span, new_span = (source_end, part.source_start), (end, part.start)
            offsets.append({"span": span, "new_span": new_span, "replacement": self.text[slice(*new_span)]})
            source_end, end = part.source_start + part.length, part.start + part.length
        return offsets


def escape_special_tokens(text: str, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> str:
    """Neutralise special tokens in text that a user wrote: ``<image>`` becomes ``< image>``.

    A space goes after the first character of each token, so that the tokenizer reads plain text. Use it on
    everything that comes from outside; `IdeficsProcessor.escape` does it for all special tokens of a tokenizer.
    """
    tokens = [re.escape(token) for token in special_tokens if len(token) > 1]
    if not tokens:
        return text
    # The look-ahead finds occurrences that overlap, too.
    return re.sub(f"(?={'|'.join(tokens)})(.)", r"\1 ", text, flags=re.DOTALL)


def check_no_image_file(text: str, name: str) -> None:
    """Refuse a text that is nothing but the path of an image file of this machine, with or without ``file://``.

    It would be read as text, and the answer would be blind. It is not opened either: texts come from users of servers,
    who have no business with this machine's files.

    Raises:
        ValueError: naming `name`, and what to pass for the image.
    """
    text = text.strip()
    uri = re.fullmatch("file:(?://(?:localhost(?=/))?)?(.+)", text, re.IGNORECASE)
    path = Path(urllib.parse.unquote(uri[1]) if uri else text)
    try:
        is_file = path.expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, no such user
        return
    if is_file and (_IMAGE_FILE_NAME.fullmatch(text) or is_image_file(path.expanduser())):
        raise ValueError(
            f"{name}: the text {shortened(text)} is the path of an image file, and would be read as text: texts never "
            "open files. For the image, pass PIL.Image.open(path) or pathlib.Path(path) in its place; for the text, "
            "put it in a longer one."
        )


def is_batch_of_texts(text) -> bool:
    """Whether `text=` without `images=` is a batch: a list of nothing but strings, as processors of transformers take
    it. The same list given first, as `processor([...])`, is one prompt of several segments."""
    return isinstance(text, (list, tuple)) and bool(text) and all(isinstance(one, str) for one in text)


def check_no_image_names(texts: Sequence[str]) -> None:
    """Refuse texts of a batch that are nothing but the URL of an image or the path of an image file.

    Raises:
        ValueError: naming the text.
    """
    for index, one in enumerate(texts):
        check_no_image_file(one, f"prompt {index}")
        if is_url(one.strip()):
            raise ValueError(
                f"prompt {index} is a URL, {shortened(one)}, and would be read as text: a list of strings given as "
                "text= is a batch of texts. For one prompt of several segments, give the list first, processor([...]); "
                "for the text, pass text_is_batch=True."
            )


def as_list(value):
    """A sequence of another kind, such as a column of a dataset, as a list; strings and all else as they are."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview, list, tuple)):
        return list(value)
    return value


def split_prompts(prompts) -> list[list[TextSegment | ImageSegment]]:
    """Read interleaved prompts, the documented input without `images=`.

    Args:
        prompts: a string or an image (one prompt of one segment), a flat list of segments (one prompt), or a list in
            which at least one element is a list: a batch, each element a list of segments, a string or an image.

    Raises:
        ValueError: naming prompt and segment: an empty batch or prompt, a literal ``<image>`` in a text, the path of an
            image file as a string, a prompt of nothing but names of image files: strings among segments are text, so
            that a text cannot read files.
        TypeError: naming them: a segment that is neither text nor image.
    """
    if _is_segment(prompts):
        prompts = [[prompts]]
    elif not isinstance(prompts, (list, tuple)):
        raise TypeError(
            "prompts must be a string, a list of segments or a list of such lists, "
            f"got {type(prompts).__name__}; for chat messages see apply_chat_template."
        )
    elif not prompts:
        raise ValueError("there are no prompts: got an empty list.")
    elif not any(isinstance(element, (list, tuple)) for element in prompts):
        prompts = [prompts]
    return [_split_prompt(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]


def _is_segment(value) -> bool:
    return isinstance(value, (str, os.PathLike)) or is_image(value) or is_encoded(value)


def _split_prompt(prompt, name: str) -> list[TextSegment | ImageSegment]:
    if _is_segment(prompt):
        prompt = [prompt]
    if not isinstance(prompt, (list, tuple)):
        raise TypeError(
            f"{name}: in a batch every prompt must be a list of segments, a string or an image, "
            f"got {type(prompt).__name__}."
        )
    segments = [_read_segment(segment, f"{name}, segment {index}") for index, segment in enumerate(prompt)]
    if all(isinstance(segment, TextSegment) and not segment.text.strip() for segment in segments):
        raise ValueError(f"{name} is empty: it has neither text nor an image.")
    if all(isinstance(segment, TextSegment) and _is_file_name(segment.text.strip()) for segment in segments):
        raise ValueError(
            f"{name} is nothing but the name of an image file, {shortened(segments[0].text)}, and would be read as "
            "text. For the image, pass pathlib.Path(...) or give text= as well; for the text, pass text_is_batch=True."
        )
    return segments


def _is_file_name(text: str) -> bool:
    """Whether a text is nothing but the name of an image file. One with spaces may be a sentence that ends in it."""
    return " " not in text and _IMAGE_FILE_NAME.fullmatch(text) is not None


def _read_segment(segment, name: str) -> TextSegment | ImageSegment:
    if isinstance(segment, str):
        stripped = segment.strip()
        if is_url(stripped):
            return ImageSegment(stripped, name)
        if IMAGE_TOKEN in segment:
            raise ValueError(
                f"{name}: the text {shortened(segment)} contains a literal {IMAGE_TOKEN}, which would count as an "
                "image. Put the image itself in its place, use text= with images=, or, for text that users wrote, "
                "neutralise it with escape_special_tokens."
            )
        check_no_image_file(segment, name)
        return TextSegment(segment)
    if _is_segment(segment):
        return ImageSegment(segment, name)
    raise TypeError(f"{name}: expected text, an image or an image URL, got {type(segment).__name__}.")


def place_images(text, images, *, strip: bool = True) -> list[list[TextSegment | ImageSegment]]:
    """Read prompts given as `text=` and `images=` apart.

    Args:
        text: a string, or a list of strings, one for each prompt. ``<image>`` marks the place of an image; the images
            of a text without marks come before it.
        images: for one text, an image or a list; for several, a list of one image each, or a list of lists. An image
            is an object, a URL, a data URI, the path of a file or its content. None is no image.
        strip: as in `build_prompt`; decides whether spaces between two marks are text.

    Raises:
        ValueError: if the numbers of texts, images and marks do not fit; the message names the prompt.
        TypeError: if a text is not a string.
    """
    texts = [text] if isinstance(text, str) else text
    if all(isinstance(one, str) for one in _elements(images)) and any(is_image(one) for one in _elements(text)):
        raise TypeError(
            "images= holds text and text= holds images: the order is processor(images, text); "
            "processor(images=..., text=...) says which is which."
        )
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise TypeError(
            "with images=, text must be a string or a list of strings; a prompt that holds its images itself is "
            "passed alone."
        )
    if not texts:
        raise ValueError("there are no prompts: got an empty list of texts.")
    per_text = _images_per_text(images, len(texts))
    return [
        _place_in_text(one, list(its_images), f"prompt {index}", strip)
        for index, (one, its_images) in enumerate(zip(texts, per_text, strict=True))
    ]


def _elements(value) -> Sequence:
    return value if isinstance(value, (list, tuple)) else [value]


def _images_per_text(images, num_texts: int) -> list[Sequence]:
    if getattr(images, "ndim", 3) == 4:
        images = list(images)
    images = _elements(images)
    nested = any(isinstance(element, (list, tuple)) for element in images)
    if num_texts == 1 and not nested:
        images = [images]
    if len(images) != num_texts:
        entries = "lists of images" if nested else "images"
        raise ValueError(
            f"got {num_texts} texts and {len(images)} {entries}. For several texts pass one image each, or, for any "
            "number of images per text, lists: images=[[image1, image2], [image3]] for text=[text1, text2]."
        )
    return [[] if element is None else _elements(element) for element in images]


def _place_in_text(text: str, images: list, name: str, strip: bool) -> list[TextSegment | ImageSegment]:
    image_segments = [ImageSegment(image, f"{name}, image {index}") for index, image in enumerate(images)]
    marks = list(_MARK.finditer(text))
    if not marks:
        if not images and not text.strip():
            raise ValueError(f"{name} is empty: it has neither text nor an image.")
        return [*image_segments, TextSegment(text)]
    if len(marks) != len(images):
        raise ValueError(
            f"{name}: the number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images, "
            f"got {len(marks)} tokens and {len(images)} images in {shortened(text)}."
        )
    segments, end = [], 0
    for mark, image in zip(marks, image_segments, strict=True):
        segments += [TextSegment(text[end : mark.start()], end), image]
        end = mark.end()
    segments.append(TextSegment(text[end:], end))
    return [
        segment
        for segment in segments
        if isinstance(segment, ImageSegment) or (segment.text.strip(" ") if strip else segment.text)
    ]


def build_prompt(
    segments: Sequence[TextSegment | ImageSegment],
    *,
    bos_token: str = "",
    eos_token: str = "",
    end_of_utterance_token: str = "",
    strip: bool = True,
) -> Prompt:
    """Join segments into one prompt.

    Args:
        segments: as `split_prompts` and `place_images` return them.
        bos_token: goes before the prompt, unless the first text brings it along.
        eos_token: goes after the prompt, unless the last text brings it along; empty for none.
        end_of_utterance_token: goes between two text segments that follow each other; empty for none.
        strip: remove spaces at both ends of each text segment, as in the training of the checkpoints.
    """
    images, segment_starts, copied = [], [], []
    first = segments[0].text.lstrip(" ") if segments and isinstance(segments[0], TextSegment) else ""
    prompt = "" if first.startswith(bos_token) else bos_token
    previous = None
    for segment in segments:
        if isinstance(segment, ImageSegment):
            prompt += ("" if isinstance(previous, ImageSegment) else FAKE_TOKEN) + IMAGE_TOKEN + FAKE_TOKEN
            images.append(segment)
        else:
            if isinstance(previous, TextSegment):
                prompt += end_of_utterance_token
            text = segment.text.strip(" ") if strip else segment.text
            skipped = segment.text.index(text)
            segment_starts.append(len(prompt))
            copied.append(Copied(segment.offset + skipped, len(prompt), len(text)))
            prompt += text
        previous = segment
    if not prompt.endswith(eos_token):
        prompt += eos_token
    return Prompt(prompt, images, segment_starts, copied)


def shortened(text: str) -> str:
    """A user's text for an error message: quoted, and cut where it is long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
