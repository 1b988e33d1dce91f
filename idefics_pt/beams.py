"""Beams and samples of one prompt read it once.

Unusual: transformers repeats each prompt for its beams before the first forward pass, which then does the same work for
every one of them. Here the first pass is over the prompts, and what it gives is repeated.

In `idefics_tf`, `decoding.py` does so. Axes: see `idefics_common`.
"""

from dataclasses import replace

import torch

from idefics_pt.cache import recall_images, remember_images, seen_so_far
from idefics_pt.growing_cache import GrowingCache
from idefics_pt.transformers_versions import CACHE

_ROWS_OF_TEXT = ("logits", "hidden_states", "attentions", "cross_attentions", "cross_attention_gates")


def read_prompts_once(prefill, input_ids, generation_config, model_kwargs, shared, *args, **kwargs):
    """Transformers' prefill with a row for each prompt instead of one for each beam or sample.

    Args:
        prefill: `GenerationMixin._prefill` of the model, which gets the other arguments.
        input_ids: (B * beams, T) ids, as transformers repeats them. model_kwargs: likewise, but for those named in
            `shared`, which have a row for each prompt.

    Returns:
        the outputs of the model, with a row for each beam, and the cache of `model_kwargs`, filled likewise.
    """
    beams = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache = model_kwargs.get(CACHE)
    if beams == 1 or not _are_repeated(input_ids, beams) or not _takes_over(cache, model_kwargs):
        return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
    prompts = {
        name: value[::beams] if isinstance(value, torch.Tensor) and name not in shared else value
        for name, value in model_kwargs.items()
    }
    if cache is not None and not isinstance(cache, GrowingCache):
        prompts[CACHE] = GrowingCache()
    outputs = prefill(input_ids[::beams], generation_config, prompts, *args, **kwargs)
    for name in _ROWS_OF_TEXT:
        if outputs.get(name) is not None:
            outputs[name] = _repeated(outputs[name], beams)
    if cache is not None:
        _hand_over(outputs[CACHE], cache, beams)
        outputs[CACHE] = cache
    return outputs


def _are_repeated(ids_BT, beams: int) -> bool:
    """Whether rows are what transformers makes of prompts; loops of others (`custom_generate`) may change them."""
    return len(ids_BT) % beams == 0 and torch.equal(ids_BT[::beams].repeat_interleave(beams, dim=0), ids_BT)


def _takes_over(cache, model_kwargs) -> bool:
    """Whether the cache can be filled from another, if there is one: one that holds text has a row for each beam
    already, and the attention weights of a static one are as wide as it has room."""
    if cache is None:
        return True
    is_static = getattr(cache, "is_compileable", False)
    return int(cache.get_seq_length()) == 0 and not (is_static and model_kwargs.get("output_attentions"))


def _repeated(value, beams: int):
    if isinstance(value, tuple):
        return tuple(_repeated(element, beams) for element in value)
    return None if value is None else value.repeat_interleave(beams, dim=0)


def _hand_over(of_prompts, cache, beams: int) -> None:
    """Fill an empty cache of any kind with the text of another, each row repeated, and give it the images."""
    if of_prompts is cache:
        cache.batch_repeat_interleave(beams)
        return
    for i, layer in enumerate(of_prompts.layers):
        cache.update(layer.keys.repeat_interleave(beams, dim=0), layer.values.repeat_interleave(beams, dim=0), i)
        layer.reset()  # as soon as may be, so that not all is held twice
    memory = recall_images(of_prompts)
    if memory is not None:
        is_static = getattr(cache, "is_compileable", False)
        seen_BSI = memory.seen_BSI.repeat_interleave(beams, dim=0)
        seen_BSI = seen_so_far(None, seen_BSI, 0, cache.get_max_length() if is_static else None)
        memory = replace(memory, seen_BSI=seen_BSI)
        if is_static:
            memory.mark_static()
    remember_images(cache, memory)
