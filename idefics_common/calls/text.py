"""Checks of text and labels by their shapes, for both rooms; sizes that a graph does not know are None, and trusted."""


def check_text(input_ids, inputs_embeds, attention_mask, has_cache: bool, mask_axes=(2,)) -> None:
    """Refuse text whose shapes do not fit together.

    Args:
        input_ids, inputs_embeds, attention_mask: tensors, or None.
        has_cache: whether the attention mask is over cached positions too; then it may be longer than the text.
        mask_axes: how many axes an attention mask may have.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    name, text, wanted = "input_ids", input_ids, "(batch, text_len)"
    if input_ids is None:
        name, text, wanted = "inputs_embeds", inputs_embeds, "(batch, text_len, hidden_size)"
    shape = tuple(text.shape)
    if len(shape) != wanted.count(",") + 1 or any(size is not None and size == 0 for size in shape):
        raise ValueError(f"{name} must have shape {wanted} and hold something, got {shape}.")
    if attention_mask is None:
        return
    mask_shape = tuple(attention_mask.shape)
    if len(mask_shape) not in mask_axes:
        raise ValueError(f"attention_mask must have {' or '.join(map(str, mask_axes))} axes, got shape {mask_shape}.")
    if len(mask_shape) == 2 and not has_cache and not _fits(mask_shape, shape[:2]):
        raise ValueError(f"attention_mask must have shape {shape[:2]}, got {mask_shape}.")


def check_mask_over_cache(mask_shape, past_length: int, text_len: int) -> None:
    """Refuse a mask that is not one for each cached position and each of the call: those left out would see nothing,
    and positions are counted from its end.

    Raises:
        ValueError: naming all three lengths.
    """
    if len(mask_shape) == 2 and mask_shape[1] != past_length + text_len:
        raise ValueError(
            f"attention_mask must cover the {past_length} cached positions and the {text_len} of this call, got shape "
            f"{tuple(mask_shape)}."
        )


def check_position_ids(shape, expected) -> None:
    """Refuse positions that are not one for each token, `expected` (batch, text_len), or for each column of all rows.

    Raises:
        ValueError: naming both shapes.
    """
    if not (_fits(shape, expected) or _fits(shape, (1, expected[1]))):
        raise ValueError(f"position_ids must have shape {tuple(expected)} or (1, text_len), got {tuple(shape)}.")


def check_label_shape(labels_shape, logits_shape, note: str = "") -> None:
    """Refuse labels that are not one for each position with logits. Raises `ValueError`, ending in `note`."""
    if not _fits(labels_shape, logits_shape[:2]):
        raise ValueError(
            f"labels must have shape {tuple(logits_shape[:2])}, one for each position with logits, got "
            f"{tuple(labels_shape)}{note}."
        )


def check_label_range(lowest: int, highest: int, vocabulary: int) -> None:
    """Refuse labels, other than -100, outside of the whole vocabulary. Raises `ValueError`."""
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(f"labels must be -100 or lie in [0, {vocabulary}), got {lowest} to {highest}.")


def check_id_range(lowest: int, highest: int, base: int, additional: int) -> None:
    """Refuse ids outside of the base vocabulary and the additional one. Raises `ValueError`, naming their sizes."""
    if lowest < 0 or highest >= base + additional:
        raise ValueError(
            f"input_ids must lie in [0, {base + additional}): vocab_size {base} plus additional_vocab_size "
            f"{additional}; got ids from {lowest} to {highest}. Do the tokenizer and the model belong together?"
        )


def _fits(shape, expected) -> bool:
    if len(shape) != len(expected):
        return False
    pairs = zip(shape, expected, strict=True)
    return all(size is None or other is None or size == other for size, other in pairs)
