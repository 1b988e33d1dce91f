"""What one call sees of images: from what the caller gave, and what the cache remembers, to one `ImageView`.

Mirrors `idefics_tf/image_view.py`. Axes: see `idefics_common`.
"""

from dataclasses import dataclass, field, replace

import torch

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
from idefics_pt.cache import ImageMemory, recall_images, remember_images, seen_at_end, seen_so_far, with_images
from idefics_pt.image_encoding import compute_device, encode_images
from idefics_pt.image_masks import (
    attendable,
    begins_at_tokens,
    mask_from_tokens,
    moved_to_left,
    seen_images,
    sole_images,
    widened_behind,
    widened_in_front,
)
from idefics_pt.torch_internals import version_of


@dataclass
class ImageView:
    """What one call sees of images; all fields are empty in a call without any.

    Attributes:
        new_BME: states of images whose keys and values have to be made, side by side; None if there are none.
        memory: images that the cache has seen, which come before the new ones.
        narrowed: keys and values of each gated block for the one remembered image that each row looks at, if that is
            all that this call needs.
        mask_BTM: boolean, which image memory each position may attend to, see `attendable`.
        gate_BT: boolean, whether each position may see any image.
        hidden_states_BILE: states of all images so far, for the output and for later calls.
        seen_BSI, encoded_BI: see `ImageMemory`.
        source: the tensor that all these images were given as in this call, if they were.
        attentions: weights of the layers of the image modules, by the name of the output, if images went through them.
    """

    new_BME: torch.Tensor | None = None
    memory: ImageMemory | None = None
    narrowed: list | None = None
    mask_BTM: torch.Tensor | None = None
    gate_BT: torch.Tensor | None = None
    hidden_states_BILE: torch.Tensor | None = None
    seen_BSI: torch.Tensor | None = None
    encoded_BI: torch.Tensor | None = None
    source: torch.Tensor | None = None
    attentions: dict = field(default_factory=dict)

    def key_value(self, block: int):
        """Keys and values that gated block number `block` made in earlier calls, or None."""
        if self.narrowed is not None:
            return self.narrowed[block]
        return None if self.memory is None else self.memory.key_values[block]

    def remember_on(self, cache, key_values) -> None:
        """Leave on `cache` what later calls need, given the keys and values (B, H, M, K) of every gated block."""
        if self.gate_BT is None:
            remember_images(cache, None)
            return
        if self.new_BME is None:
            key_values = self.memory.key_values
        memory = ImageMemory(self.hidden_states_BILE, tuple(key_values), self.seen_BSI, self.encoded_BI)
        remember_images(cache, memory)
        if self.new_BME is None or torch.compiler.is_compiling():
            return
        if self.source is not None:
            remember_source(memory.hidden_states_BILE, self.source, version_of(self.source))
        if getattr(cache, "is_compileable", False):
            memory.mark_static()


def view_images(
    model,
    given,
    mask,
    cache,
    past_length,
    input_ids,
    hidden_BTD,
    attention_mask,
    interpolate_pos_encoding,
) -> ImageView:
    """Make the `ImageView` of a call from the images given with it and those that its cache has seen.

    Args:
        model: an `IdeficsModel`. given: (name of the argument, images), or None.
        mask: (B, T or S, I), which images each position may see, any dtype, or None; then the default one is made. It
            may be shorter than the text, see `where_uncovered`.
        cache: a `Cache`, or None. past_length: positions that it holds, a number or a scalar tensor.
        input_ids: (B, T), or None where embeddings were given. hidden_BTD: the embeddings. attention_mask: of the text,
            any number of axes, or None.

    Raises:
        ValueError: if images, mask, text and cache contradict each other.
    """
    text_shape = hidden_BTD.shape[:2]
    memory = _memory_of(cache, past_length, text_shape[1])
    if mask is not None:
        num_old = 0 if memory is None else memory.num_images
        mask = _over_text(model, mask, num_old, input_ids, hidden_BTD, attention_mask)
    mask_BTI, kind = settle_images(model, given, mask, memory, past_length, input_ids, text_shape)
    if mask_BTI is None:
        return ImageView()
    if kind is Given.NONE:
        view = ImageView(memory=memory, hidden_states_BILE=memory.hidden_states_BILE, encoded_BI=memory.encoded_BI)
    else:
        view = _view_of_new(model, memory, kind, given, mask_BTI, interpolate_pos_encoding)
        if view.new_BME is None:
            return view
    mask_BTI = _of_call(mask_BTI, past_length, text_shape[1])
    if kind is Given.NONE and isinstance(past_length, torch.Tensor):
        mask_BTI = mask_BTI & (past_length > 0)  # a cache that was emptied has no text that saw its images
    if cache is not None:
        capacity = cache.get_max_length() if getattr(cache, "is_compileable", False) else None
        before_BSI = None if memory is None else memory.seen_BSI
        view.seen_BSI = seen_so_far(before_BSI, mask_BTI, past_length, capacity)
    if kind is Given.NONE and model.config._attn_implementation != "eager":
        sole_B = sole_images(mask_BTI, memory.num_rows)
        if sole_B is not None:
            view.narrowed, mask_BTI = memory.narrowed(sole_B), mask_BTI.any(dim=2, keepdim=True)
    view.mask_BTM, view.gate_BT = attendable(mask_BTI, view.hidden_states_BILE.shape[2])
    return view


def settle_images(model, given, mask, memory, past_length, input_ids, text_shape):
    """Hold the images of a call against those that its cache has seen, and against the image mask.

    Arguments as `view_images`; `memory` is that of the cache. text_shape: (B, T).

    Returns:
        the mask, boolean (B, T or S, I), over the images of the memory and the given ones, or the given ones alone; and
        what is given. None twice if there are no images.

    Raises:
        ValueError: if they contradict each other.
    """
    rows, _ = text_shape
    name, images = given or (None, None)
    if given is not None:
        check_images(name, images.shape, rows, model.config)
    if memory is not None:
        check_rows(memory.num_rows, rows, name, None if images is None else images.shape[0])
    num_old, num_new = 0 if memory is None else memory.num_images, 0 if given is None else images.shape[1]
    if num_old == 0 and num_new == 0:
        if mask is not None and not torch.compiler.is_compiling() and not mask.is_meta and mask.any():
            raise ValueError(MASK_WITHOUT_IMAGES)
        return None, None
    if mask is None:
        mask_BTI = _default_mask(model, memory, images, past_length, input_ids, text_shape)
    else:
        mask_BTI = mask != 0
    check_image_mask(mask_BTI.shape, rows)
    kind = what_is_given(mask_BTI.shape[2], num_old, num_new)
    if memory is not None and not torch.compiler.is_compiling():
        is_known = kind is Given.ALL and is_source(images, memory.hidden_states_BILE, version_of(images))
        if is_known or kind is not Given.ALL:
            sees_more = _sees_more(memory, mask_BTI[..., :num_old])
            if sees_more and not is_known:
                raise ValueError(NOT_ENCODED)
            kind = Given.NONE if is_known and not sees_more else kind
    return mask_BTI, kind


def _memory_of(cache, past_length, length: int):
    """The image memory of a cache, unless the cache is known to hold no text any more.

    The length of the text in a static cache is a tensor. It is not asked while a graph is captured, nor in one-token
    steps on an accelerator, which would stop for the answer; `seen_at_end` then lets nothing be seen, and new images
    need a mask.
    """
    memory = None if cache is None else recall_images(cache)
    if memory is None:
        return None
    if isinstance(past_length, torch.Tensor):
        is_stop = length == 1 and past_length.device.type != "cpu"
        if torch.compiler.is_compiling() or past_length.is_meta or is_stop:
            return memory
    return memory if past_length > 0 else None


def _default_mask(model, memory, images, past_length, input_ids, text_shape):
    """The mask of a call that brings none: what the text before saw, or what the image tokens say, or all."""
    rows, length = text_shape
    if images is None:
        return seen_at_end(memory.seen_BSI, past_length, rows).unsqueeze(1).expand(-1, length, -1)
    if memory is not None:
        raise ValueError(NEW_IMAGES_WITHOUT_MASK)
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is not None and input_ids is not None:
        return mask_from_tokens(input_ids, image_token_id, model.config.eos_token_id, images.shape[1])
    if model.is_of_trl:
        raise ValueError(
            "TRL gives images without an image_attention_mask, and the model does not know its image token: set "
            "config.image_token_id = processor.image_token_id, that of the trainer's `ref_model` too."
        )
    return torch.ones((rows, length, images.shape[1]), dtype=torch.bool, device=compute_device(model, images))


def _over_text(model, mask, num_old: int, input_ids, hidden_BTD, attention_mask):
    """An image mask over the positions of the call, if it covers fewer of them and says which; see `where_uncovered`.

    Raises:
        ValueError: if it does not say which; where a graph is captured, values are not asked.
    """
    check_image_mask(mask.shape, hidden_BTD.shape[0])
    covered, length = mask.shape[1], hidden_BTD.shape[1]
    token, is_embedded = getattr(model.config, "image_token_id", None), input_ids is None
    if covered == 1 and (num_old or not is_embedded):
        # one row stands for all; a graph must not ask whether it is given one token or several, it is for both
        return mask.expand(-1, length, -1)
    if covered == length:
        return mask
    may_be_in_front = token is not None or model.has_virtual_tokens
    where = where_uncovered(covered, length, num_old, is_embedded, may_be_in_front)
    if where is Uncovered.NONE:
        return mask
    mask_BTI, is_at_tokens_B = mask != 0, None
    offset_B = moved_B = torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    if token is not None:
        is_image_BT = _is_embedded(model, token, hidden_BTD) if is_embedded else input_ids == token
        is_image_BT = is_image_BT.to(mask.device)
        if where is Uncovered.BEHIND:
            moved_B = moved_to_left(mask_BTI, is_image_BT)
            offset_B = -moved_B
            is_at_tokens_B = (moved_B == 0) | ((moved_B > 0) & begins_at_tokens(mask_BTI, is_image_BT, offset_B))
        else:
            is_at_tokens_B = begins_at_tokens(mask_BTI, is_image_BT, offset_B + (length - covered))
        if not torch.compiler.is_compiling() and not mask.is_meta and not is_at_tokens_B.all():
            raise ValueError(not_at_their_tokens(covered, length, is_embedded))
    if where is Uncovered.IN_FRONT:
        return widened_in_front(mask_BTI, length)
    return widened_behind(mask_BTI, length, attention_mask, moved_B.clamp(min=0))


def _is_embedded(model, token: int, hidden_BTD):
    """Which positions hold the embedding of a token, (B, T)."""
    row_D = model.embed_tokens(torch.tensor([token], device=hidden_BTD.device))[0]
    return (hidden_BTD == row_D.to(hidden_BTD.dtype)).all(dim=2)


def _sees_more(memory, mask_BTI) -> bool:
    """Whether text sees remembered images that were not encoded. On an accelerator one-token steps do not ask: the
    question would stop them, and what is generated sees no more than the prompt did."""
    if mask_BTI.is_meta or (mask_BTI.shape[1] == 1 and mask_BTI.device.type != "cpu"):
        return False
    return bool((seen_images(mask_BTI, memory.num_rows) & ~memory.encoded_BI).any())


def _view_of_new(model, memory, kind: Given, given, mask_BTI, interpolate_pos_encoding) -> ImageView:
    """The images of a view that has new ones, which are encoded. `new_BME` is None if nobody may see any."""
    name, images = given
    source = images if kind is Given.ALL else None
    replaced_BI = None
    if memory is not None:
        memory, images = _with_equal_rows(memory, images)
        if kind is Given.ALL:
            memory, replaced_BI = None, with_images(memory.encoded_BI, images.shape[1])
    # a later call may show what this one does not yet, so what is seen is asked of the whole mask
    seen_BI = seen_images(mask_BTI[..., -images.shape[1] :], images.shape[0])
    if replaced_BI is not None:
        seen_BI = seen_BI | replaced_BI
    states_BILE, attentions = encode_images(model, name, images, seen_BI, interpolate_pos_encoding)
    view = ImageView(
        new_BME=states_BILE.flatten(1, 2),
        memory=memory,
        hidden_states_BILE=states_BILE,
        encoded_BI=seen_BI,
        source=source,
        attentions=attentions or {},
    )
    if memory is None:
        return view if attentions is not None else ImageView(hidden_states_BILE=states_BILE)
    check_tokens_of_new_images(states_BILE.shape[2], memory.hidden_states_BILE.shape[2])
    view.hidden_states_BILE = torch.cat((memory.hidden_states_BILE, states_BILE), dim=1)
    view.encoded_BI = torch.cat((memory.encoded_BI, seen_BI), dim=1)
    return view


def _with_equal_rows(memory, images):
    """Repeat the rows of remembered images, or of new ones, where one is a multiple of the other."""
    old, new = memory.num_rows, images.shape[0]
    if new > old:
        rows = torch.arange(old, device=memory.hidden_states_BILE.device)
        memory = replace(memory.rows(rows.repeat_interleave(new // old)), seen_BSI=memory.seen_BSI)
    return memory, images if old <= new else images.repeat_interleave(old // new, dim=0)


def _of_call(mask_BTI, past_length, length: int):
    """The part of an image mask that is about the positions of the call."""
    if mask_BTI.shape[1] == length:
        return mask_BTI
    start = start_of_call(mask_BTI.shape[1], int(past_length), length)
    return mask_BTI[:, start : start + length]
