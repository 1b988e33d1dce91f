"""Greedy search and sampling: one text a row, one token a step.

Unusual: the whole search is one `tf.while_loop`; ids stand in a tensor of fixed size. A draw is a function of the seed
and the step, without state.

In `idefics_pt` transformers does it. Axes: see `idefics_common`; R rows of text, C positions that fit.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from idefics_tf.generation_settings import Settings
from idefics_tf.logits_processors import narrow, process
from idefics_tf.search_state import Limits, empty_records, is_one_of, recorded, repeat_while, stacked


class _State(NamedTuple):
    ids_RC: Any
    length: Any
    unfinished_R: Any
    memory: Any
    records: dict


def sample(decoder, ids_RC, first_R, limits: Limits, settings: Settings, seed, put=None) -> dict:
    """Continue each row until it ends.

    Args:
        decoder: see `idefics_tf.decoding`. ids_RC: int32, the prompts in their first positions.
        first_R: where the text of each row begins, behind its left padding.
        seed: int32 (2,), for sampling. put: called with the ids (R,) of each step, which it gives back, or None.

    Returns:
        `sequences` (R, C), of which the first `length` positions count; `memory` of the decoder; and what was recorded.
    """
    pad = 0 if settings.pad_token_id is None else settings.pad_token_id

    def choose(state: _State, logits_RV, memory):
        scores_RV = process(logits_RV, state.ids_RC, state.length, first_R, limits.min_length, settings)
        step = state.length - limits.prompt_length
        if settings.do_sample:
            scores_RV = narrow(scores_RV, settings)
            draw_R1 = tf.random.stateless_categorical(scores_RV, 1, seed + tf.stack((0, step)), dtype=tf.int32)
            next_R = draw_R1[:, 0]
        else:
            next_R = tf.argmax(scores_RV, axis=-1, output_type=tf.int32)
        next_R = tf.where(state.unfinished_R, next_R, pad)
        if put is not None:
            next_R = put(next_R)
        unfinished_R = state.unfinished_R
        if settings.eos_token_ids:
            unfinished_R &= ~is_one_of(next_R, settings.eos_token_ids)
        position_C = tf.range(tf.shape(state.ids_RC)[1])
        return _State(
            tf.where(position_C == state.length, next_R[:, None], state.ids_RC),
            state.length + 1,
            unfinished_R,
            memory,
            recorded(state.records, step, scores=scores_RV, logits=logits_RV),
        )

    def goes_on(state: _State):
        return tf.reduce_any(state.unfinished_R) & (state.length < limits.max_length)

    records = empty_records(settings, limits.max_length - limits.prompt_length, decoder.first_logits_RV.shape[-1])
    unfinished_R = tf.ones_like(ids_RC[:, 0], dtype=tf.bool)
    state = _State(ids_RC, limits.prompt_length, unfinished_R, decoder.memory, records)
    state = choose(state, decoder.first_logits_RV, decoder.memory)
    state = repeat_while(
        goes_on, lambda state: choose(state, *decoder.next_logits(state.memory, state.ids_RC, state.length)), state
    )
    return {
        "sequences": state.ids_RC,
        "length": state.length,
        "memory": state.memory,
        **stacked(state.records, state.length - limits.prompt_length),
    }
