"""`IdeficsCollator`: prompts to training batches with labels, for a loop of one's own or for `transformers.Trainer`."""

from collections.abc import Mapping, Sequence

from idefics_common.prompts.labels import check_label_turns


class IdeficsCollator:
    """Makes one batch out of several examples, with `labels` that are -100 on everything not to be learned.

    An instance is a `data_collator`. `Trainer` removes the columns that the model's forward does not name, "prompt" and
    "messages" among them, so set `TrainingArguments(remove_unused_columns=False)`.

    Args:
        processor: an `IdeficsProcessor` with a fast tokenizer.
        label_turns: what is learned: "assistant" (default) everything the assistant says, "last_assistant" its last
            turn only, "all" the user's words as well, which suits text without turns; see `prompts.labels`.
        add_eos_token: end each prompt with the end of text. It is learned with `label_turns="all"`, or where it ends
            the assistant's last turn; a turn that ends with ``<end_of_utterance>`` teaches to stop by that instead.
        max_length: longest row in tokens; longer prompts are truncated, and lose the images whose place is cut.
        return_tensors: "np", "pt" or "tf"; default as the processor's.
        **processor_kwargs: further arguments of each processor call, for example `transform`.

    Raises:
        ValueError: for an unknown `label_turns`.
    """

    def __init__(
        self,
        processor,
        *,
        label_turns: str = "assistant",
        add_eos_token: bool = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **processor_kwargs,
    ):
        check_label_turns(label_turns)
        self.processor = processor
        self.processor_kwargs = {
            "padding": "longest",
            "add_eos_token": add_eos_token,
            "return_labels": True,
            "label_turns": label_turns,
            **processor_kwargs,
        }
        if return_tensors is not None:
            self.processor_kwargs["return_tensors"] = return_tensors
        if max_length is not None:
            self.processor_kwargs |= {"truncation": True, "max_length": max_length}

    def __call__(self, examples: Sequence) -> dict:
        """Collate examples.

        Args:
            examples: each a mapping with the key "prompt", or the prompt itself: a list of texts, images and image
                URLs, or a string. Or each a mapping with the key "messages": chat messages, as for
                `IdeficsProcessor.apply_chat_template`; "images", if given, fills their image parts in order.

        Returns:
            `input_ids`, `attention_mask` (B, T), `pixel_values` (B, I, C, H, W), `image_attention_mask` (B, T, I) and
            `labels` (B, T).

        Raises:
            ValueError: naming the example without a prompt, or with images or an answer beside it that would be left
                out; or what is wrong with a prompt, for example that `max_length` leaves nothing of it to learn.
        """
        are_chats = ["messages" in example for example in examples if isinstance(example, Mapping)]
        if any(are_chats):
            if len(are_chats) < len(examples) or not all(are_chats):
                raise ValueError('some examples of the batch have the key "messages" and others have not.')
            chats = [_with_images(example, index) for index, example in enumerate(examples)]
            options = {"tokenize": True, "return_dict": True, "processor_kwargs": self.processor_kwargs}
            return dict(self.processor.apply_chat_template(chats, **options))
        prompts = [_prompt_of(example, index) for index, example in enumerate(examples)]
        return dict(self.processor(prompts, **self.processor_kwargs))


_CONTENT = ("prompt", "messages", "images", "image", "completion")


def _is_empty(value) -> bool:
    return isinstance(value, (str, list)) and not value


def _check_rest(example: Mapping, index: int, used: tuple) -> None:
    """Refuse content that would be left out without a word; other keys are nobody's business."""
    given = {name: example.get(name) for name in _CONTENT if name not in used}
    rest = [name for name, value in given.items() if value is not None and not _is_empty(value)]
    if rest:
        raise ValueError(
            f'example {index} has the key "{rest[0]}" beside "{used[0]}", where it would be left out. A prompt is a '
            'list with its images and its answer in it; messages have their images in them or under "images".'
        )


def _prompt_of(example, index: int) -> list:
    if isinstance(example, Mapping):
        if "prompt" not in example:
            raise ValueError(
                f'example {index} has neither the key "prompt" nor "messages"; its keys are {sorted(example)}. Trainer '
                "takes them away unless it is told otherwise: TrainingArguments(remove_unused_columns=False)."
            )
        _check_rest(example, index, ("prompt",))
        example = example["prompt"]
    return [example] if isinstance(example, str) else list(example)


def _with_images(example: Mapping, index: int) -> list[dict]:
    """The messages of an example, with its "images" in those image parts that name none."""
    _check_rest(example, index, ("messages", "images"))
    images = list(example.get("images") or [])
    messages, used = [], 0
    for message in example["messages"]:
        if isinstance(message["content"], (list, tuple)):
            parts = []
            for part in message["content"]:
                given = [value for key, value in part.items() if key not in ("type", "text") and value is not None]
                if part.get("type") == "image" and not given and used < len(images):
                    part = {"type": "image", "image": images[used]}
                    used += 1
                parts.append(part)
            message = {**message, "content": parts}
        messages.append(message)
    if used != len(images):
        raise ValueError(
            f"example {index} has {len(images)} images and {used} places for them, parts {{'type': 'image'}} without "
            "an image, in its messages."
        )
    return messages
