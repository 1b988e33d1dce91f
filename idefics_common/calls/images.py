"""How the images of a call, its image mask and what a cache remembers fit together, decided by sizes alone.

Sizes that a graph does not know are None; they are trusted. Both rooms ask here, so that they refuse the same in the
same words, in eager execution and in graphs.
"""

from enum import Enum


class Given(Enum):
    """What the images that come with a call are to those that its cache has seen."""

    NONE = "none are given, or none that the cache does not know"
    ALL = "they are all there are; those of the cache are replaced, each by the one in its place"
    MORE = "they come after those of the cache"


def one_form(**candidates):
    """The one form in which images were given, as (name of the argument, tensor), or None.

    Raises:
        ValueError: if there are several.
    """
    given = [(name, value) for name, value in candidates.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Give images in one form only, got {' and '.join(name for name, _ in given)}.")
    return given[0] if given else None


def what_is_given(covered, num_old, num_new) -> Given | None:
    """What the given images are to those of the cache, by the number of images that the image mask covers.

    Args:
        covered: images per row in the mask. num_old: images per row that the cache has seen, 0 without any. num_new:
            images per row given with the call, 0 without any.

    Returns:
        None where it is `Given.ALL` or `Given.MORE`, and a graph has to find out which when it runs.

    Raises:
        ValueError: if the mask covers neither all images nor the given ones alone.
    """
    if num_new == 0:
        kind, expected = Given.NONE, num_old
    elif num_old == 0:
        kind, expected = Given.ALL, num_new
    elif covered is None or num_old is None or num_new is None:
        return None
    else:
        kind, expected = (Given.ALL, num_new) if covered == num_new else (Given.MORE, num_old + num_new)
    if covered is None or expected is None or covered == expected:
        return kind
    also = ", or the given ones alone, which then replace the earlier ones" if num_old and num_new else ""
    raise ValueError(
        f"image_attention_mask covers {covered} images per row, but there are {num_old + num_new}: {num_old} that the "
        f"cache has seen and {num_new} given with this call. It must cover all of them, earlier ones first{also}."
    )


def check_images(name: str, shape, rows, config) -> None:
    """Refuse images whose shape is not that of their form.

    Args:
        name: `pixel_values`, `image_encoder_embeddings` or `perceiver_embeddings`. rows: rows of text.

    Raises:
        ValueError: naming what was expected.
    """
    axes = "(batch, num_images, tokens, width)"
    if name == "pixel_values":
        axes = "(batch, num_images, channels, height, width)"
    fits = len(shape) == axes.count(",") + 1
    if not fits or (shape[0] is not None and (shape[0] == 0 or (rows is not None and rows % shape[0]))):
        raise ValueError(
            f"{name} must have shape {axes} with a batch that divides the {rows} rows of text, got {tuple(shape)}."
        )
    width = config.vision_config.embed_dim
    if name != "pixel_values" and shape[-1] != width:
        raise ValueError(f"{name} must have the vision tower's width {width}, got {shape[-1]}.")
    if name == "perceiver_embeddings" and not config.use_resampler:
        raise ValueError("perceiver_embeddings were given, but the model has no resampler (use_resampler is False).")


def check_pixels(shape, vision_config, interpolate_pos_encoding: bool) -> None:
    """Refuse pixels (images, channels, height, width) that the vision tower does not take. Raises `ValueError`."""
    channels, height, width = shape[1:]
    size, patch = vision_config.image_size, vision_config.patch_size
    if channels != vision_config.num_channels:
        raise ValueError(
            f"pixel_values must have {vision_config.num_channels} channels, got {channels}; the shape is (batch, "
            "num_images, channels, height, width)."
        )
    if height is None or width is None:
        raise ValueError(
            "The height and width of pixel_values must be known when the graph is made; got "
            f"{height} x {width}. Batch and number of images may be unknown."
        )
    if not interpolate_pos_encoding and (height, width) != (size, size):
        raise ValueError(
            f"pixel_values are {height} x {width} pixels but the model's images are {size} x {size}; resize them "
            "with the processor, or pass `interpolate_pos_encoding=True`."
        )
    if height < patch or width < patch:
        raise ValueError(f"pixel_values are {height} x {width} pixels, less than one patch of {patch}.")


def check_image_mask(shape, rows) -> None:
    """Refuse an image mask of another number of axes, or of rows than the text's. Raises `ValueError`."""
    if len(shape) != 3 or not (shape[0] is None or rows is None or shape[0] == rows):
        raise ValueError(
            f"image_attention_mask must have shape (batch, text_len, num_images) with batch {rows}, got {tuple(shape)}."
        )


class Uncovered(Enum):
    """Where in the text of a call the positions lie that its image mask does not cover."""

    NONE = "the mask covers the call, or more, or one of its rows stands for all"
    BEHIND = "text was appended: it sees what the last covered position sees"
    IN_FRONT = "virtual tokens were put in front: they see nothing"


def where_uncovered(covered, length, num_old, is_embedded: bool, may_be_in_front: bool) -> Uncovered:
    """Where the positions lie that an image mask does not cover: behind ids, in front of embeddings.

    Ids that came later were appended, as completions are to a prompt. Embeddings that came later were put in front, as
    prompt tuning does with virtual tokens. The rooms refuse either where they know the image tokens and do not find
    them where the mask shows their images.

    Args:
        covered: positions that the mask covers. length: positions of the call. num_old: images per row that the cache
            has seen; with some, a mask that is too short is for `start_of_call` to judge.
        is_embedded: whether the text came as `inputs_embeds`. may_be_in_front: whether virtual tokens are to be
            expected: the model knows its image token, to check it, or PEFT is known to put them there.

    Raises:
        ValueError: if embeddings came later and no virtual tokens are to be expected.
    """
    if covered is None or length is None or covered >= length or num_old:
        return Uncovered.NONE
    if not is_embedded:
        return Uncovered.NONE if covered == 1 else Uncovered.BEHIND
    if not may_be_in_front:
        raise ValueError(
            f"image_attention_mask covers {covered} of the {length} positions of inputs_embeds; nothing says which: "
            "give it for all. Virtual tokens in front are known as such if they are PEFT's, or if the model's "
            "configuration has an `image_token_id` (set it to the processor's)."
        )
    return Uncovered.IN_FRONT


def not_at_their_tokens(covered, length, is_embedded: bool) -> str:
    """The message of a mask that is shorter than the text, and does not show images where their tokens are."""
    name, place = ("inputs_embeds", "in front of") if is_embedded else ("input_ids", "behind")
    return (
        f"image_attention_mask covers {covered} of the {length} positions of {name}. What was added should stand "
        f"{place} the text that it covers, but then images are first seen elsewhere than at their image tokens: give "
        "the mask for all positions."
    )


def start_of_call(covered, past_length, length):
    """Where the positions of a call begin in an image mask.

    Args:
        covered: positions that the mask covers. past_length: positions that the cache holds, a number or a scalar
            tensor. length: positions of the call.

    Returns:
        0 if the mask is over this call's positions; `past_length` if it is over all from the start of the text.

    Raises:
        ValueError: if it is over neither.
    """
    if covered == length:
        return 0
    if covered < past_length + length:
        raise ValueError(
            f"image_attention_mask has text_len {covered}; expected {length}, the positions of this call, or at least "
            f"{int(past_length) + length}, all positions so far."
        )
    return past_length


def check_rows(prompts, rows, name: str | None, new) -> None:
    """Refuse rows of text or of new images that do not go with the prompts whose images a cache has seen.

    Args:
        rows: of text, a multiple of `prompts`. new: rows of the new images that came by the argument `name`, a multiple
            or a divisor of `prompts`; None if none came.

    Raises:
        ValueError: naming both numbers.
    """
    if prompts is None:
        return
    if rows is not None and rows % prompts:
        raise ValueError(f"The cache has seen the images of {prompts} prompts; {rows} rows of text do not fit.")
    if new is not None and max(prompts, new) % min(prompts, new):
        raise ValueError(f"{name} has {new} rows, but the cache has seen the images of {prompts} prompts.")


def check_tokens_of_new_images(new: int, old: int) -> None:
    """Refuse images of another size than those that a cache has seen. Raises `ValueError`."""
    if new != old:
        raise ValueError(
            f"The new images have {new} tokens each, those that the cache has seen {old}; without a resampler all "
            "images of a text must have one size."
        )


def tokens_per_image(name: str, shape, config) -> int:
    """How many states the decoder gets of each image that is given in the form `name`, with this shape."""
    if config.use_resampler:
        return config.perceiver_config.resampler_n_latents
    if name == "pixel_values":
        patch = config.vision_config.patch_size
        return (shape[-2] // patch) * (shape[-1] // patch) + 1
    return shape[2]


MASK_WITHOUT_IMAGES = (
    "image_attention_mask lets text attend to images, but there are none: give pixel_values, image_encoder_embeddings "
    "or perceiver_embeddings, or a cache that has seen images."
)
NEW_IMAGES_WITHOUT_MASK = (
    "New images for a cache that has seen some need an image_attention_mask: over all of them, earlier ones first, or "
    "over the new ones alone, which then replace the earlier ones."
)
NOT_ENCODED = (
    "image_attention_mask lets text see images that no earlier call could see, so they were not encoded; give all "
    "images again with this call."
)
