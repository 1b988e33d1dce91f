"""A dynamic cache that does not copy itself at every token.

Unusual: transformers' `DynamicCache` concatenates, so each new token copies the keys and values of all earlier ones,
which costs as much memory traffic as reading them twice more. Here they live in buffers with room to spare, and a new
token is written behind them. What callers see, `layer.keys` and `layer.values`, are views of the filled part.

In `idefics_tf`, the cache of `decoding.py` has room for the whole text from the start. Axes: see `idefics_common`.
"""

from dataclasses import replace

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from idefics_pt.cache import recall_images, remember_images

_LEAST_ROOM = 64  # positions
_ROOM_SHARE = 4  # a buffer that is full grows by a quarter


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, S, K) of one layer, extended in place while nothing else can notice.

    Its buffers are no part of its state, which is transformers' own, and so are in no `__dict__`: what takes a cache
    apart into tensors and puts it together again, as exporters do, must not make inputs of a graph of them.
    """

    __slots__ = ("_buffers", "_seen")

    def __init__(self):
        super().__init__()
        self._buffers = self._seen = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values (B, H, T, K); returns all of them, (B, H, S + T, K)."""
        length = self.get_seq_length()
        fits = not length or (_are_alike(self.keys, key_states) and _are_alike(self.values, value_states))
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not fits:
            # what is recorded for gradients must not change later, and what does not fit is for concatenation to judge
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total = length + key_states.shape[-2]
        if not self._may_write(total):
            self._move(length, total, key_states, value_states)
        keys, values = self._buffers
        keys.narrow(2, length, total - length).copy_(key_states)
        values.narrow(2, length, total - length).copy_(value_states)
        self.keys, self.values = self._seen = keys.narrow(2, 0, total), values.narrow(2, 0, total)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int):
        """Repeat each row; the only one without a copy, until the layer is extended."""
        if self.get_seq_length() and len(self.keys) == 1:
            self.keys, self.values = (x.expand(repeats, -1, -1, -1) for x in (self.keys, self.values))
        else:
            super().batch_repeat_interleave(repeats)

    def reorder_cache(self, beam_idx):
        """Reorder rows; those that are one and the same, after a repetition, stay as they are."""
        if not self.get_seq_length() or len(beam_idx) != len(self.keys) or self.keys.stride(0) or self.values.stride(0):
            super().reorder_cache(beam_idx)

    def __copy__(self):
        # two layers must not write behind the same positions
        other = type(self)()
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self):
        # for deep copies, pickles and so for exporters: keys and values without the room behind them
        state = dict(self.__dict__)
        if self.is_initialized:
            state |= {"keys": self.keys.contiguous(), "values": self.values.contiguous()}
        return state

    def _may_write(self, total: int) -> bool:
        """Whether the buffers have room, and nobody has cropped, reordered, repeated or moved what they hold.

        After a crop the buffers are left alone: someone may still look at what lies behind.
        """
        if getattr(self, "_buffers", None) is None or self._seen[0] is not self.keys:
            return False
        if self._seen[1] is not self.values or total > self._buffers[0].shape[2]:
            return False
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    def _move(self, length: int, total: int, *news):
        capacity = total + max(_LEAST_ROOM, total // _ROOM_SHARE)
        self._buffers = tuple(new.new_empty((*new.shape[:2], capacity, new.shape[3])) for new in news)
        if length:
            for buffer, old in zip(self._buffers, (self.keys, self.values), strict=True):
                buffer[:, :, :length] = old

    def reset(self):
        """Forget everything, the buffers too."""
        self._buffers = self._seen = None
        super().reset()


def _are_alike(old, new) -> bool:
    shapes = old.shape[:2] == new.shape[:2] and old.shape[3:] == new.shape[3:]
    return shapes and old.dtype == new.dtype and old.device == new.device


class GrowingCache(DynamicCache):
    """`DynamicCache` of `GrowingLayer`s that takes its images along wherever rows are picked.

    Args:
        ddp_cache_data: keys and values layer by layer, as transformers' cache takes them from `nn.DataParallel`.
    """

    def __init__(self, ddp_cache_data=None):
        Cache.__init__(self, layer_class_to_replicate=GrowingLayer)
        for i, (keys, values, *_) in enumerate(ddp_cache_data or ()):
            self.update(keys, values, i)

    def batch_select_indices(self, indices):
        """Keep some rows of text only, or in another order, each with its images.

        Args:
            indices: (rows,) numbers, which may repeat; or a boolean for each row.
        """
        self._pick_images(indices)
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx):
        """Reorder rows of text with what they saw, those of a prompt among themselves; prompts of one row each take
        their images along."""
        memory = recall_images(self)
        if memory is not None and len(beam_idx) == memory.num_rows:
            self._pick_images(beam_idx)
        elif memory is not None and len(beam_idx) == len(memory.seen_BSI):
            remember_images(self, replace(memory, seen_BSI=memory.seen_BSI[beam_idx.to(memory.seen_BSI.device)]))
        super().reorder_cache(beam_idx)

    def reset(self):
        """Forget everything, images too."""
        remember_images(self, None)
        super().reset()

    def _pick_images(self, indices):
        memory = recall_images(self)
        if memory is not None:
            rows = self.layers[0].keys.shape[0]
            remember_images(self, memory.text_rows(torch.arange(rows)[indices], rows))
