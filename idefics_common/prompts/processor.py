"""`IdeficsProcessor`: prompts of text and images to the inputs of a model.

The string comes from `prompt`, pixels from `images.loading` and `images.processing`, which token sees which image from
`image_masks`; labels and chats have files of their names. Everything is numpy until the last step, which hands it to
the framework asked for, so PyTorch and TensorFlow get the same values of the same dtypes.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Unpack

import numpy as np

from idefics_common.configuration.config import IdeficsConfig
from idefics_common.fetching.fetcher import ImageFetcher
from idefics_common.images.loading import load_images
from idefics_common.images.processing import IdeficsImageProcessor
from idefics_common.images.settings import plain_settings
from idefics_common.prompts.batch import IdeficsBatch
from idefics_common.prompts.chat import check_conversation, default_chat_template
from idefics_common.prompts.generation_defaults import fill_generation_config
from idefics_common.prompts.image_masks import image_attention_mask
from idefics_common.prompts.labels import check_label_turns, keep_assistant_turns, make_labels
from idefics_common.prompts.processor_files import complete_saved_files
from idefics_common.prompts.prompt import (
    END_OF_UTTERANCE_TOKEN,
    FAKE_TOKEN,
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    Prompt,
    as_list,
    build_prompt,
    check_no_image_names,
    escape_special_tokens,
    is_batch_of_texts,
    place_images,
    split_prompts,
)
from idefics_common.prompts.tokenizer_checks import check_image_tokens, has_token
from idefics_common.tensors import resolve_framework, to_framework, to_lists, to_numpy
from idefics_common.torch_later import torch_left_for_later

with torch_left_for_later():
    from transformers import BatchFeature, ProcessorMixin
    from transformers.image_processing_utils import get_size_dict
    from transformers.image_utils import ImageInput
    from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs


_MAY_HOLD_VARIABLES = "may_hold_variables"  # keyword of a call that `apply_chat_template` makes


class IdeficsProcessorKwargs(ProcessingKwargs, total=False):
    """What a call accepts besides the arguments of the tokenizer and of the image processor."""

    add_eos_token: bool
    add_end_of_utterance_token: bool | None
    strip: bool
    text_is_batch: bool | None
    debug: bool
    allow_fetch: bool | None
    return_image_attention_mask: bool
    return_labels: bool
    label_turns: str


def _limit(name: str) -> property:
    """An attribute of a processor that is the same as that of the image processor it was made with."""
    return property(lambda self: getattr(self._limits, name), lambda self, value: setattr(self._limits, name, value))


class IdeficsProcessor(ProcessorMixin):
    """Tokenizer and image processor in one, for prompts that interleave text and images.

    Args:
        image_processor: an `IdeficsImageProcessor`, or transformers' own.
        tokenizer: a LLaMA-style tokenizer with the image tokens.
        image_size: here for compatibility; it must be the default or the image processor's own.
        add_end_of_utterance_token: the default of calls; None, as in a call, asks the tokenizer.
        chat_template: a Jinja template for `apply_chat_template`; by default the tokenizer's, else the format of the
            -instruct checkpoints.
        return_tensors: the default of calls; it is not saved.
        allow_fetch: the default of calls; False refuses URLs.

    Attributes:
        fetcher: the `ImageFetcher` for URLs, the same as that of `image_processor`. Put another one here for other
            limits; it is not saved.
        allow_fetch: whether URLs are fetched, in prompts and by `image_processor`; None leaves it to `fetcher`.
            (Another `image_processor` put in later keeps its own limits when it is called by itself.)
        image_token, image_token_id: the placeholder of an image; the id is None where the tokenizer has none.

    Raises:
        ValueError: without a tokenizer, or for a contradicting `image_size`.
    """

    valid_processor_kwargs = IdeficsProcessorKwargs
    text_kwargs = {"padding": "longest"}  # noqa: RUF012 - read by ProcessorMixin

    fetcher, allow_fetch = _limit("fetcher"), _limit("allow_fetch")

    # defaults of calls, read by ProcessorMixin
    add_eos_token = False
    strip = True
    text_is_batch = None
    debug = False
    return_image_attention_mask = True
    return_labels = False
    label_turns = "all"

    def __init__(
        self,
        image_processor,
        tokenizer=None,
        image_size=224,
        add_end_of_utterance_token=None,
        chat_template=None,
        return_tensors=None,
        allow_fetch=None,
    ):
        if tokenizer is None:
            raise ValueError("IdeficsProcessor needs a tokenizer, got None.")
        if image_size not in (224, image_processor.image_size):
            raise ValueError(
                f"image_size={image_size} contradicts the image processor's {image_processor.image_size}; set it there."
            )
        self.image_token = IMAGE_TOKEN
        self.image_token_id = (
            tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if has_token(tokenizer, IMAGE_TOKEN) else None
        )
        self.tokenizer_was_trained_with_end_of_utterance_token = has_token(tokenizer, END_OF_UTTERANCE_TOKEN)
        self.add_end_of_utterance_token = add_end_of_utterance_token
        self._framework = None if return_tensors is None else resolve_framework(return_tensors)
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or tokenizer.chat_template or default_chat_template(tokenizer),
        )
        # limits for URLs are the image processor's; transformers' own has none
        has_limits = isinstance(image_processor, IdeficsImageProcessor)
        self._limits = image_processor if has_limits else SimpleNamespace(fetcher=ImageFetcher(), allow_fetch=None)
        if allow_fetch is not None:
            self.allow_fetch = allow_fetch

    def to_dict(self):
        """What is saved: as `ProcessorMixin.to_dict`, and `allow_fetch`."""
        return super().to_dict() | {"allow_fetch": self.allow_fetch}

    def __call__(
        self,
        images: ImageInput | list | str | None = None,
        text: str | list | None = None,
        **kwargs: Unpack[IdeficsProcessorKwargs],
    ) -> BatchFeature:
        """Process one prompt or a batch.

        The input is either interleaved prompts alone, first or as `text=` (`processor(prompts)`), or texts and images
        apart (`processor(images=..., text=...)`).

        Interleaved, a prompt is a list of segments: strings, images (`PIL.Image`, array or tensor, `pathlib.Path` or
        bytes of a file, ``{"bytes": ..., "path": ...}``) and image URLs, which are fetched. Other strings are text; the
        path of an image file as a string is refused. A string or an image is a prompt of one segment; a flat list is
        one prompt; a list that holds lists is a batch. Nothing but strings, one rule more: given as `text=`, as
        processors of transformers take them, they are a batch of texts; given first, they are one prompt.

        Apart, ``<image>`` in a text marks the place of an image, and the images of a text without marks come before it;
        there strings among the images are URLs, data URIs or paths, and texts are never fetched.

        Args:
            images, text: the input, as above.
            return_tensors: "np", "pt" or "tf"; by default "pt".
            padding, truncation, max_length, ...: as for tokenizers; default: pad to the longest row. Images whose place
                was truncated away are left out. padding=False without `return_tensors` gives lists for unequal rows.
            add_special_tokens: False leaves out the beginning of text, for texts that go on; default True.
            add_eos_token: end each prompt with the end of text; default False.
            add_end_of_utterance_token: put ``<end_of_utterance>`` between text segments that follow each other;
                default: if the tokenizer has it.
            strip: remove spaces at both ends of text segments, as in training; default True.
            text_is_batch: True reads a list of strings given as `text=` as a batch of texts whatever they say, False
                as one prompt of segments; default: a batch, in which names of images are refused.
            debug: print each prompt as the tokenizer gets it; default False.
            allow_fetch: False refuses URLs; default: as the processor's `fetcher` says.
            return_image_attention_mask: False leaves the mask to the model, which makes it from the image tokens if its
                `config.image_token_id` is set; default True.
            return_labels: add `labels`, -100 on pads and image tokens; default False.
            label_turns: "all" (default), "assistant" or "last_assistant": what else is masked; see
                `idefics_common.prompts.labels`.
            transform, image_size, size, image_mean, ...: as for `IdeficsImageProcessor.preprocess`.

        Returns:
            `input_ids` and `attention_mask` (B, T) int64, `pixel_values` (B, I, C, H, W), zeros where a prompt has
            fewer than I images, `image_attention_mask` (B, T, I) int64, and `labels` (B, T) int64 on request. I is the
            largest number of images of a prompt, and 1, an image of zeros with mask 0, where no prompt has any. New
            `input_ids` that are put into the batch get a new mask; see `prompts.batch`.

        Raises:
            ValueError: naming the prompt and the segment: an empty prompt, an image that cannot be read or fetched, a
                literal ``<image>``, marks and images that differ in number, nothing left to learn with `return_labels`.
            TypeError: for a segment that is neither text nor image, or a keyword that nothing here has.
        """
        if not kwargs.pop(_MAY_HOLD_VARIABLES, False):
            self._check_keywords(kwargs)
        return_tensors = _pop(kwargs, "return_tensors")  # transformers, which knows no "tf", is not shown it
        framework = resolve_framework(return_tensors, default=self._framework)
        with_bos = _pop(kwargs, "add_special_tokens") is not False
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **plain_settings(kwargs))
        check_label_turns(options["label_turns"])
        prompts = self._build_prompts(images, text, options, with_bos)
        as_lists = options["text_kwargs"].get("padding") is False and return_tensors is self._framework is None
        if as_lists:
            options["text_kwargs"]["padding"] = "longest"
        data, offsets = self._tokenize(prompts, options)
        input_ids = data["input_ids"]

        kept_images = self._images_in_place(prompts, input_ids)
        data["pixel_values"] = self._pixel_values(kept_images, options)
        num_images = data["pixel_values"].shape[1]

        def image_mask(ids_BT):
            ends = self.tokenizer.eos_token_id
            mask_BTI = image_attention_mask(to_numpy(ids_BT), self.image_token_id, ends, num_images)
            mask_BTI = to_framework(mask_BTI, framework)
            return mask_BTI.to(ids_BT.device) if hasattr(ids_BT, "device") and framework == "pt" else mask_BTI

        if options["return_labels"]:
            image_token_ids = [self.tokenizer.convert_tokens_to_ids(token) for token in (IMAGE_TOKEN, FAKE_TOKEN)]
            labels = make_labels(input_ids, data["attention_mask"], image_token_ids)
            if options["label_turns"] != "all":
                labels = keep_assistant_turns(labels, prompts, offsets, options["label_turns"])
            data["labels"] = labels
        with_mask = options["return_image_attention_mask"]
        batch = IdeficsBatch(
            {name: to_framework(array, framework) for name, array in data.items()}, image_mask if with_mask else None
        )
        batch["input_ids"] = batch["input_ids"]
        if as_lists and not data["attention_mask"].all():
            batch = _unpadded(batch, data["attention_mask"])
        if options["text_kwargs"].get("return_attention_mask") is False:
            del batch["attention_mask"]
        if options.get("return_text_replacement_offsets"):
            batch["text_replacement_offsets"] = [prompt.replacement_offsets() for prompt in prompts]
        return batch

    def decode(self, token_ids, **kwargs) -> str:
        """Text of one row of ids, of any framework; keyword arguments are the tokenizer's."""
        return self.tokenizer.decode(to_lists(token_ids), **kwargs)

    def batch_decode(self, sequences, **kwargs) -> list[str]:
        """Texts of rows of ids, (B, T) of any framework or lists; keyword arguments are the tokenizer's."""
        return self.tokenizer.batch_decode(to_lists(sequences), **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_attention_mask"]

    def escape(self, text: str) -> str:
        """Neutralise every special token in text that a user wrote; see `prompts.escape_special_tokens`."""
        return escape_special_tokens(text, {*SPECIAL_TOKENS, *self.tokenizer.all_special_tokens})

    def generation_config(self, model):
        """Fill `model.generation_config` with what the tokenizer knows, so that `generate` of the model, of either
        room, never writes image tokens and stops at ``<end_of_utterance>``; settings that it has already stay.

        Returns:
            `model.generation_config`, changed in place.
        """
        return fill_generation_config(model.generation_config, self.tokenizer)

    def apply_chat_template(self, conversation, chat_template=None, *, processor_kwargs=None, **kwargs):
        """Render chat messages, and with `tokenize=True` process them; as `ProcessorMixin.apply_chat_template`.

        Args:
            conversation: messages ``{"role": "user" | "assistant" | "system", "content": ...}``, or a list of such
                lists. Content is a string, or a list of ``{"type": "text", "text": ...}`` and
                ``{"type": "image", "image" | "url" | "path" | "base64": ...}``; an image stands where its entry does.
                Where fetching is off, only ``"path"`` may name a file of this machine.
            chat_template: instead of the processor's own.
            processor_kwargs: arguments of the call that `tokenize=True` leads to.
            **kwargs: `add_generation_prompt`, `continue_final_message`, `tokenize`, `return_dict`, `return_tensors`,
                `return_assistant_tokens_mask`, and variables of the template. Without `return_tensors`, unequal rows
                come as lists, and so do ids with the mask of the assistant's tokens.

        Raises:
            ValueError: naming message and part: content that is neither text nor an image, such as audio or video;
                where fetching is off, a ``"url"`` that is none; and what a call raises.
            TypeError: for a message or a part that is no dictionary.
        """
        # before anything else sees it: transformers would fetch audio and video itself, within no limits
        processor_kwargs = {"text_is_batch": True} | (processor_kwargs or {})
        named = processor_kwargs | kwargs | processor_kwargs.get("text_kwargs", {})
        as_lists = self._framework is None and named.get("return_tensors", "auto") == "auto"
        if as_lists and "padding" not in named:
            processor_kwargs["padding"] = False  # for those who pad themselves, and would take pads for text
        allow_fetch = processor_kwargs.get("allow_fetch", kwargs.get("allow_fetch", self.allow_fetch))
        fetching_is_off = self.fetcher.with_allow_fetch(allow_fetch).why_off() is not None
        conversation = check_conversation(conversation, urls_only=fetching_is_off)
        self._check_keywords(processor_kwargs)
        # transformers' pipelines give settings of `generate` as variables, which then come to the call, too
        processor_kwargs[_MAY_HOLD_VARIABLES] = True
        output = super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)
        if as_lists and kwargs.get("return_assistant_tokens_mask") and isinstance(output, BatchFeature):
            for name in ("input_ids", "attention_mask"):  # lists, as the masks themselves are
                output.data[name] = to_lists(output[name])
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save in the form of transformers 5, and make the same directory readable to transformers 4.

        Raises what `ProcessorMixin.save_pretrained` raises.
        """
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        complete_saved_files(self, save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # ProcessorMixin would ask AutoImageProcessor, which knows transformers' own class only.
        of_processor = ("image_processor", "tokenizer", "return_tensors", "allow_fetch", "add_end_of_utterance_token")
        kwargs = {name: value for name, value in kwargs.items() if name not in of_processor}
        config = _our_config(pretrained_model_name_or_path, kwargs)
        return [
            IdeficsImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **config | kwargs),
        ]

    def _check_keywords(self, kwargs: dict) -> None:
        """Refuse keywords that transformers would leave out with a warning; None says nothing."""
        of_images = getattr(self.image_processor, "valid_kwargs", None) or ImagesKwargs
        known = {"text_kwargs", "images_kwargs", "common_kwargs", "return_tensors"}
        for fields in (TextKwargs, of_images, IdeficsProcessorKwargs):
            known |= fields.__annotations__.keys()
        unknown = [name for name, value in kwargs.items() if value is not None and name not in known]
        if unknown:
            raise TypeError(f"IdeficsProcessor got an unexpected keyword argument {unknown[0]!r}.")

    def _build_prompts(self, images, text, options: dict, with_bos: bool) -> list[Prompt]:
        add_end_of_utterance_token = options["add_end_of_utterance_token"]
        if add_end_of_utterance_token is None:
            add_end_of_utterance_token = self.tokenizer_was_trained_with_end_of_utterance_token
        elif add_end_of_utterance_token and not self.tokenizer_was_trained_with_end_of_utterance_token:
            raise ValueError(
                f"add_end_of_utterance_token=True, but the tokenizer has no token {END_OF_UTTERANCE_TOKEN}."
            )
        images, text = as_list(images), as_list(text)
        if text is None and images is None:
            raise ValueError("expected prompts, or text= and images=, and got neither.")
        if text is not None and images is not None:
            segments = place_images(text, images, strip=options["strip"])
        elif options["text_is_batch"] or (options["text_is_batch"] is None and is_batch_of_texts(text)):
            texts = images if text is None else text
            texts = [texts] if isinstance(texts, str) else texts
            if options["text_is_batch"] is None:
                check_no_image_names(texts)
            segments = place_images(texts, [[]] * len(texts), strip=options["strip"])
        else:
            segments = split_prompts(images if text is None else text)
        prompts = [
            build_prompt(
                of_one_prompt,
                bos_token=(self.tokenizer.bos_token or "") if with_bos else "",
                eos_token=(self.tokenizer.eos_token or "") if options["add_eos_token"] else "",
                end_of_utterance_token=END_OF_UTTERANCE_TOKEN if add_end_of_utterance_token else "",
                strip=options["strip"],
            )
            for of_one_prompt in segments
        ]
        if options["debug"]:
            for index, prompt in enumerate(prompts):
                print(f"prompt {index}: {prompt.text}")
        if any(prompt.images for prompt in prompts):
            check_image_tokens(self.tokenizer)
        return self._load_images(prompts, options)

    def _load_images(self, prompts: list[Prompt], options: dict) -> list[Prompt]:
        """Replace the sources in the image segments by images that have been read."""
        segments = [image for prompt in prompts for image in prompt.images]
        resize = None
        if isinstance(self.image_processor, IdeficsImageProcessor):
            resize = self.image_processor.resizer(**options["images_kwargs"])
        sources, names = [image.source for image in segments], [image.name for image in segments]
        loaded = iter(load_images(sources, names, self.fetcher.with_allow_fetch(options["allow_fetch"]), resize))
        return [
            dataclasses.replace(prompt, images=[dataclasses.replace(i, source=next(loaded)) for i in prompt.images])
            for prompt in prompts
        ]

    def _tokenize(self, prompts: list[Prompt], options: dict) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Returns the arrays of the output, and the offsets (B, T, 2) of the tokens where they are needed."""
        arguments = dict(options["text_kwargs"])
        for name in ("return_tensors", "return_mm_token_type_ids", "return_text_replacement_offsets"):
            arguments.pop(name, None)
        show_offsets = bool(arguments.get("return_offsets_mapping"))
        need_offsets = options["return_labels"] and options["label_turns"] != "all"
        if need_offsets and not self.tokenizer.is_fast:
            raise ValueError(
                f"label_turns={options['label_turns']!r} needs a fast tokenizer, which knows where in the text "
                f"each token is; {type(self.tokenizer).__name__} is a slow one."
            )
        arguments["add_special_tokens"] = False  # they are in the text
        arguments |= {"return_attention_mask": True, "return_offsets_mapping": show_offsets or need_offsets}
        if arguments.get("return_overflowing_tokens"):
            raise ValueError("return_overflowing_tokens is not supported: a row must stand for one prompt.")
        encoding = self.tokenizer([prompt.text for prompt in prompts], **arguments)
        lengths = {len(row) for row in encoding["input_ids"]}
        if len(lengths) > 1:
            raise ValueError(f"rows have {min(lengths)} to {max(lengths)} tokens; a batch needs padding.")
        data = {name: np.array(encoding[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}
        for name in ("token_type_ids", "special_tokens_mask", "length"):
            if arguments.get(f"return_{name}"):
                data[name] = np.array(encoding[name], dtype=np.int64)
        offsets = None
        if show_offsets or need_offsets:
            offsets = np.array(encoding["offset_mapping"], dtype=np.int64)
            if show_offsets:
                data["offset_mapping"] = offsets
        if options.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = (data["input_ids"] == self.image_token_id).astype(np.int64)
        return data, offsets

    def _images_in_place(self, prompts: list[Prompt], input_ids: np.ndarray) -> list[list]:
        """The images of each prompt whose placeholders are in the tokens: all of them, unless it was truncated."""
        kept = []
        for prompt, count in zip(prompts, (input_ids == self.image_token_id).sum(axis=1).tolist(), strict=True):
            images = [image.source for image in prompt.images]
            if count < len(images):
                images = images[len(images) - count :] if self.tokenizer.truncation_side == "left" else images[:count]
            kept.append(images)
        return kept

    def _pixel_values(self, images_per_prompt: list[list], options: dict) -> np.ndarray:
        """All images in one call of the image processor, laid out as (B, I, C, H, W) and padded with zeros."""
        arguments = options["images_kwargs"] | {"return_tensors": "np"}
        counts = [len(images) for images in images_per_prompt]
        if any(counts):
            images = [image for images in images_per_prompt for image in images]
            pixels = np.asarray(self.image_processor(images, **arguments))
        else:
            size = get_size_dict(arguments.get("size") or dict(self.image_processor.size))
            channels = self.image_processor.image_num_channels
            pixels = np.empty((0, channels, size["height"], size["width"]), np.float32)
        is_image_BI = np.arange(max(1, *counts)) < np.reshape(counts, (-1, 1))
        values = np.zeros((*is_image_BI.shape, *pixels.shape[1:]), pixels.dtype)
        values[is_image_BI] = pixels
        return values


def _pop(kwargs: dict, name: str):
    """Take an argument out of those of a call, in all places that transformers allows; None where it is not given."""
    values = [kwargs.pop(name, None)]
    for group in ("text_kwargs", "images_kwargs", "common_kwargs"):
        if name in (kwargs.get(group) or {}):
            kwargs[group] = dict(kwargs[group])
            values.append(kwargs[group].pop(name))
    return next((value for value in values if value is not None), None)


def _unpadded(batch: IdeficsBatch, attention_mask: np.ndarray) -> BatchFeature:
    """The batch with what has a value for each token as lists without pads."""
    kept_BT = attention_mask.astype(bool)
    data = dict(batch)
    for name in data.keys() - {"pixel_values", "length"}:
        data[name] = [row[kept].tolist() for row, kept in zip(to_numpy(data[name]), kept_BT, strict=True)]
    return BatchFeature(data)


def _our_config(checkpoint, kwargs: dict) -> dict:
    """The argument `config` for AutoTokenizer, which would read transformers' own and warn of its image token."""
    try:
        settings, _ = IdeficsConfig.get_config_dict(checkpoint, **kwargs)
        return {"config": IdeficsConfig.from_dict(settings)} if settings.get("model_type") == "idefics" else {}
    except (ValueError, OSError):
        return {}  # a tokenizer can be had without config.json


__all__ = ["IdeficsProcessor", "IdeficsProcessorKwargs"]
