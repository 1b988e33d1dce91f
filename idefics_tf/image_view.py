"""What one call sees of images: from what the caller gave, and what the cache remembers, to one `ImageView`.

Mirrors `idefics_pt/image_view.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from keras import ops

from idefics_common.calls.images import (
    MASK_WITHOUT_IMAGES,
    NEW_IMAGES_WITHOUT_MASK,
    NOT_ENCODED,
    Given,
    Uncovered,
    check_image_mask,
    check_images,
    check_rows,
    check_tokens_of_new_images,
    not_at_their_tokens,
    start_of_call,
    what_is_given,
    where_uncovered,
)
from idefics_common.calls.known_images import is_source, remember_source
from idefics_tf.cache import ImageMemory, seen_at_end, seen_so_far, with_images
from idefics_tf.image_encoding import encode_images
from idefics_tf.image_masks import (
    attendable,
    begins_at_tokens,
    mask_from_tokens,
    moved_to_left,
    seen_images,
    widened_behind,
    widened_in_front,
)
from idefics_tf.layers import sizes


@dataclass
class ImageView:
    """What one call sees of images; all fields are empty in a call without any.

    Attributes:
        new_BME: states of images whose keys and values have to be made, side by side; None if there are none.
        memory: images that the cache has seen, which come before the new ones.
        mask_BTM: boolean, which image memory each position may attend to, see `attendable`.
        gate_BT: boolean, whether each position may see any image.
        hidden_states_BILE: states of all images so far, for the output and for later calls.
        seen_BSI, encoded_BI: see `ImageMemory`.
        source: the tensor that all these images were given as in this call, if they were.
        attentions: weights of the layers of the image modules, by the name of the output, if they were asked for and
            images went through the module in this call.
    """

    new_BME: Any = None
    memory: ImageMemory | None = None
    mask_BTM: Any = None
    gate_BT: Any = None
    hidden_states_BILE: Any = None
    seen_BSI: Any = None
    encoded_BI: Any = None
    source: Any = None
    attentions: dict = field(default_factory=dict)

    def key_value(self, block: int):
        """Keys and values that gated block number `block` made in earlier calls, or None."""
        return None if self.memory is None else self.memory.key_values[block]

    def memory_with(self, key_values) -> ImageMemory | None:
        """What later calls need, given the keys and values (B, H, M, K) of every gated block."""
        if self.gate_BT is None:
            return None
        if self.source is not None and tf.executing_eagerly():
            remember_source(self.hidden_states_BILE, self.source)
        return ImageMemory(self.hidden_states_BILE, tuple(key_values), self.seen_BSI, self.encoded_BI)


def view_images(
    model,
    given,
    mask,
    memory,
    past_length,
    input_ids,
    hidden_BTD,
    attention_mask,
    interpolate_pos_encoding,
    output_attentions,
    training,
) -> ImageView:
    """Make the `ImageView` of a call from the images given with it and those that its cache has seen.

    Args:
        model: a `TFIdeficsModel`. given: (name of the argument, images), or None.
        mask: (B, T or S, I), which images each position may see, any dtype, or None; then the default one is made. It
            may be shorter than the text, see `where_uncovered`.
        memory: of the cache, or None. past_length: positions that the cache holds, a number or a scalar tensor.
        input_ids: (B, T), or None where embeddings were given. hidden_BTD: the embeddings. attention_mask: of the text,
            or None.

    Raises:
        ValueError: if images, mask, text and cache contradict each other.
    """
    text_shape = sizes(hidden_BTD)[:2]
    if mask is not None:
        mask = _over_text(model, tf.convert_to_tensor(mask), memory, input_ids, hidden_BTD, attention_mask)
    mask_BTI, kind = settle_images(model, given, mask, memory, past_length, input_ids, text_shape)
    if mask_BTI is None:
        return ImageView()
    if kind is Given.NONE:
        view = ImageView(memory=memory, hidden_states_BILE=memory.hidden_states_BILE, encoded_BI=memory.encoded_BI)
    else:
        view = _view_of_new(model, memory, kind, given, mask_BTI, interpolate_pos_encoding, output_attentions, training)
        if view.new_BME is None:
            return view
    mask_BTI = _of_call(mask_BTI, past_length, text_shape[1])
    before_BSI = None if memory is None else memory.seen_BSI
    goes_on = kind is Given.NONE and mask is None  # then the last position that is remembered says it all
    view.seen_BSI = before_BSI if goes_on else seen_so_far(before_BSI, mask_BTI, past_length)
    view.mask_BTM, view.gate_BT = attendable(mask_BTI, view.hidden_states_BILE.shape[2])
    return view


def settle_images(model, given, mask, memory, past_length, input_ids, text_shape):
    """Hold the images of a call against those that its cache has seen, and against the image mask.

    Arguments as `view_images`. text_shape: (B, T).

    Returns:
        the mask, boolean (B, T or S, I), over the images of the memory and the given ones, or the given ones alone; and
        what is given, None where a graph has to find out when it runs. None twice if there are no images.

    Raises:
        ValueError: if they contradict each other.
    """
    rows, _ = text_shape
    name, images = given or (None, None)
    if given is not None:
        images = tf.convert_to_tensor(images)  # a variable can change, and is another tensor then
        check_images(name, images.shape, _if_known(rows), model.config)
    if memory is not None:
        check_rows(_if_known(memory.num_rows), _if_known(rows), name, None if images is None else images.shape[0])
    num_old = 0 if memory is None else _if_known(memory.num_images)
    num_new = 0 if given is None else images.shape[1]
    if num_old == 0 and num_new == 0:
        if mask is not None and tf.executing_eagerly() and bool(ops.any(ops.cast(mask, "bool"))):
            raise ValueError(MASK_WITHOUT_IMAGES)
        return None, None
    if mask is None:
        mask_BTI = _default_mask(model, memory, images, past_length, input_ids, text_shape)
    else:
        mask_BTI = ops.cast(mask, "bool")
    check_image_mask(mask_BTI.shape, _if_known(rows))
    kind = what_is_given(mask_BTI.shape[2], num_old, num_new)
    if memory is not None and tf.executing_eagerly():
        is_known = kind is Given.ALL and is_source(images, memory.hidden_states_BILE)
        if is_known or kind is not Given.ALL:
            sees_more = _sees_more(memory, mask_BTI[..., :num_old])
            if sees_more and not is_known:
                raise ValueError(NOT_ENCODED)
            kind = Given.NONE if is_known and not sees_more else kind
    return mask_BTI, kind


def _if_known(size) -> int | None:
    """A size, unless it is a tensor that a graph will only know when it runs."""
    return size if isinstance(size, int) else None


def _default_mask(model, memory, images, past_length, input_ids, text_shape):
    """The mask of a call that brings none: what the text before saw, or what the image tokens say, or all."""
    rows, length = text_shape
    if images is None:
        return ops.repeat(ops.expand_dims(seen_at_end(memory.seen_BSI, past_length), 1), length, axis=1)
    if memory is not None:
        raise ValueError(NEW_IMAGES_WITHOUT_MASK)
    num_images = sizes(images)[1]
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is None or input_ids is None:
        return ops.ones((rows, length, num_images), dtype="bool")
    return mask_from_tokens(input_ids, image_token_id, model.config.eos_token_id, num_images)


def _over_text(model, mask, memory, input_ids, hidden_BTD, attention_mask):
    """An image mask over the positions of the call, if it covers fewer of them and says which; see `where_uncovered`.

    Raises:
        ValueError: if it does not say which; where a graph is captured, values are not asked.
    """
    check_image_mask(mask.shape, hidden_BTD.shape[0])
    covered, length = mask.shape[1], hidden_BTD.shape[1]
    token, is_embedded = getattr(model.config, "image_token_id", None), input_ids is None
    num_old = 0 if memory is None else memory.num_images
    where = where_uncovered(covered, length, num_old, is_embedded, may_be_in_front=token is not None)
    if where is Uncovered.NONE:
        is_for_all = covered == 1 and length is not None and length > 1
        return ops.repeat(mask, length, axis=1) if is_for_all else mask
    mask_BTI = ops.cast(mask, "bool")
    offset_B = moved_B = tf.zeros(tf.shape(mask)[:1], "int32")
    if token is not None:
        is_image_BT = (
            _is_embedded(model, token, hidden_BTD) if is_embedded else tf.convert_to_tensor(input_ids) == token
        )
        if where is Uncovered.BEHIND:
            moved_B = moved_to_left(mask_BTI, is_image_BT)
            begins_B = begins_at_tokens(mask_BTI, is_image_BT, -moved_B)
            is_at_tokens_B = tf.equal(moved_B, 0) | ((moved_B > 0) & begins_B)
        else:
            is_at_tokens_B = begins_at_tokens(mask_BTI, is_image_BT, offset_B + (length - covered))
        if tf.executing_eagerly() and not bool(ops.all(is_at_tokens_B)):
            raise ValueError(not_at_their_tokens(covered, length, is_embedded))
    if where is Uncovered.IN_FRONT:
        return widened_in_front(mask_BTI, length)
    return widened_behind(mask_BTI, length, attention_mask, tf.maximum(moved_B, 0))


def _is_embedded(model, token: int, hidden_BTD):
    """Which positions hold the embedding of a token, (B, T)."""
    row_D = ops.cast(model.embed_tokens(tf.constant([[token]]))[0, 0], hidden_BTD.dtype)
    return ops.all(hidden_BTD == row_D, axis=2)


def _sees_more(memory, mask_BTI) -> bool:
    """Whether text sees remembered images that were not encoded; for eager execution."""
    unseen_BI = ops.logical_not(memory.encoded_BI)
    return bool(ops.any(ops.logical_and(seen_images(mask_BTI, memory.num_rows), unseen_BI)))


def _view_of_new(
    model, memory, kind, given, mask_BTI, interpolate_pos_encoding, output_attentions, training
) -> ImageView:
    """The images of a view that has new ones, which are encoded. `new_BME` is None if nobody may see any."""
    name, images = given
    source = images if kind is Given.ALL else None
    replaced_BI = None
    if memory is not None:
        memory, images = _with_equal_rows(memory, images)
    num_new = sizes(images)[1]
    if memory is not None and kind is not Given.MORE:
        replaced_BI = with_images(memory.encoded_BI, num_new)
        if kind is Given.ALL:
            memory = None
        else:
            # images take the place of those of the cache if the mask covers no others
            is_all = tf.equal(sizes(mask_BTI)[2], num_new)
            replaced_BI = ops.logical_and(replaced_BI, is_all)
            memory = memory.images_from(tf.where(is_all, memory.num_images, 0))
    # a later call may show what this one does not yet, so what is seen is asked of the whole mask
    seen_BI = seen_images(mask_BTI[..., -num_new:], sizes(images)[0])
    if replaced_BI is not None:
        seen_BI = ops.logical_or(seen_BI, replaced_BI)
    states_BILE, attentions = encode_images(
        model, name, images, seen_BI, interpolate_pos_encoding, output_attentions, training
    )
    rows, _, tokens, width = sizes(states_BILE)
    view = ImageView(
        new_BME=ops.reshape(states_BILE, (rows, num_new * tokens, width)),
        memory=memory,
        hidden_states_BILE=states_BILE,
        encoded_BI=seen_BI,
        source=source,
        attentions=attentions or {},
    )
    if memory is None:
        return view if attentions is not None else ImageView(hidden_states_BILE=states_BILE)
    check_tokens_of_new_images(tokens, memory.hidden_states_BILE.shape[2])
    view.hidden_states_BILE = ops.concatenate((memory.hidden_states_BILE, states_BILE), axis=1)
    view.encoded_BI = ops.concatenate((memory.encoded_BI, seen_BI), axis=1)
    return view


def _with_equal_rows(memory, images):
    """Repeat the rows of remembered images, or of new ones, where one is a multiple of the other."""
    old, new = memory.num_rows, sizes(images)[0]
    if isinstance(old, int) and old == new:
        return memory, images
    indices = ops.repeat(ops.arange(old), ops.maximum(new // old, 1))
    memory = memory.rows(indices)._replace(seen_BSI=memory.seen_BSI)
    return memory, ops.repeat(images, ops.maximum(old // new, 1), axis=0)


def _of_call(mask_BTI, past_length, length):
    """The part of an image mask that is about the positions of the call."""
    covered = sizes(mask_BTI)[1]
    if all(isinstance(size, int) for size in (covered, past_length, length)):
        start = start_of_call(covered, past_length, length)
    elif covered is length:
        return mask_BTI
    else:
        start = tf.where(tf.equal(covered, length), 0, past_length)
    return mask_BTI[:, start : start + length]
