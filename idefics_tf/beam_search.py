"""Beam search, by the rules of transformers: several texts a row grow together, and the best that end are kept.

Unusual: the whole search is one `tf.while_loop` on tensors of fixed size, with n running and n finished texts a prompt.
A step looks at the best `(ends + 1) * n` continuations of a prompt, enough for n that do not end. Scores of texts
that are out are lowered by 1e9 rather than removed.

In `idefics_pt` transformers does it. Axes: see `idefics_common`; n beams, C positions that fit, k continuations.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from idefics_tf.generation_settings import Settings
from idefics_tf.logits_processors import narrow, process
from idefics_tf.search_state import Limits, empty_records, is_one_of, recorded, repeat_while, stacked

_OUT = -1.0e9


class _Texts(NamedTuple):
    """Texts of each prompt, best first.

    Attributes:
        ids_BnC: int32. scores_Bn: float32, log probabilities; those of finished texts with the length penalty.
        rows_BnC: for each generated token, counted from the prompt's end, the row of text it was added to; then -1.
    """

    ids_BnC: Any
    scores_Bn: Any
    rows_BnC: Any

    def at(self, index_Bk) -> "_Texts":
        """The texts at some indices."""
        return _Texts(*(tf.gather(tensor, index_Bk, batch_dims=1) for tensor in self))

    def lowered(self, where_Bn) -> "_Texts":
        """With those texts out for which `where_Bn` holds."""
        return self._replace(scores_Bn=self.scores_Bn + tf.cast(where_Bn, tf.float32) * _OUT)


class _State(NamedTuple):
    running: _Texts
    finished: _Texts
    is_finished_Bn: Any
    can_improve_B1: Any
    all_ended: Any
    length: Any
    memory: Any
    records: dict


def beam_search(decoder, ids_RC, first_R, limits: Limits, settings: Settings, seed) -> dict:
    """Search the likeliest continuations of each prompt.

    Args:
        decoder: see `idefics_tf.decoding`. ids_RC: int32, the prompts in their first positions, n adjacent rows each.
        first_R: where the text of each row begins, behind its left padding.
        seed: int32 (2,), for sampling among continuations.

    Returns:
        `sequences` (B * returned, C), of which the first `length` positions count; their `sequences_scores` and
        `beam_indices`; `memory` of the decoder; and what was recorded.
    """
    beams, vocabulary = settings.num_beams, decoder.first_logits_RV.shape[-1]
    num_candidates = max(2, 1 + len(settings.eos_token_ids)) * beams
    rows, capacity = tf.unstack(tf.shape(ids_RC))
    prompts = rows // beams

    def continuations(state: _State, logits_RV):
        """The best continuations of each prompt, and the scores (R, V) that they are chosen by."""
        ids_RC = tf.reshape(state.running.ids_BnC, (rows, capacity))
        scores_RV = tf.nn.log_softmax(logits_RV)
        scores_RV = process(scores_RV, ids_RC, state.length, first_R, limits.min_length, settings)
        if settings.do_sample:
            scores_RV = narrow(scores_RV, settings)
        total_BnV = tf.reshape(scores_RV, (prompts, beams, vocabulary)) + state.running.scores_Bn[..., None]
        total_Bj = tf.reshape(total_BnV, (prompts, beams * vocabulary))
        if settings.do_sample:
            index_Bk = _draw(total_Bj, num_candidates, seed + tf.stack((0, state.length - limits.prompt_length)))
            chosen_Bk = tf.gather(total_Bj, index_Bk, batch_dims=1)
        else:
            chosen_Bk, index_Bk = tf.math.top_k(total_Bj, num_candidates)
        beam_Bk, token_Bk = index_Bk // vocabulary, index_Bk % vocabulary
        texts = state.running.at(beam_Bk)
        row_Bk = beam_Bk + beams * tf.range(prompts)[:, None]
        position_C = tf.range(capacity)
        return scores_RV, _Texts(
            tf.where(position_C == state.length, token_Bk[..., None], texts.ids_BnC),
            chosen_Bk,
            tf.where(position_C == state.length - limits.prompt_length, row_Bk[..., None], texts.rows_BnC),
        )

    def finish(state: _State, candidates: _Texts, ends_Bk):
        """The best finished texts, those among the candidates that end now included."""
        # only the first n continuations may be finished; the others are there in case these end
        is_new_Bk = ends_Bk & (tf.range(num_candidates) < beams)
        new_length = tf.cast(state.length + 1 - limits.prompt_length, tf.float32)
        new = candidates._replace(scores_Bn=candidates.scores_Bn / new_length**settings.length_penalty)
        if settings.early_stopping is True:
            new = new.lowered(tf.reduce_all(state.is_finished_Bn, axis=1, keepdims=True))
        new = new.lowered(~state.can_improve_B1).lowered(~is_new_Bk)
        both = _Texts(*(tf.concat(pair, axis=1) for pair in zip(state.finished, new, strict=True)))
        best_Bn = tf.math.top_k(both.scores_Bn, beams).indices
        is_finished_Bm = tf.concat((state.is_finished_Bn, is_new_Bk), axis=1)
        return both.at(best_Bn), tf.gather(is_finished_Bm, best_Bn, batch_dims=1)

    def can_improve(state: _State, running: _Texts, finished: _Texts, is_finished_Bn):
        """Whether a running text may still become better than the worst finished one, (B, 1); once not, never again."""
        best_length = state.length + 1 - limits.prompt_length
        if settings.early_stopping == "never" and settings.length_penalty > 0.0:
            best_length = limits.max_length - limits.prompt_length
        best_B1 = running.scores_Bn[:, :1] / tf.cast(best_length, tf.float32) ** settings.length_penalty
        worst_B1 = tf.reduce_min(finished.scores_Bn, axis=1, keepdims=True)
        worst_Bn = tf.where(is_finished_Bn, worst_B1, _OUT)
        return state.can_improve_B1 & tf.reduce_any(best_B1 > worst_Bn, axis=1, keepdims=True)

    def advance(state: _State, logits_RV, memory):
        scores_RV, candidates = continuations(state, logits_RV)
        ends_Bk = tf.fill(tf.shape(candidates.scores_Bn), state.length + 1 >= limits.max_length)
        if settings.eos_token_ids:
            last_Bk = tf.gather(candidates.ids_BnC, state.length, axis=2)
            ends_Bk |= is_one_of(last_Bk, settings.eos_token_ids)
        open_ones = candidates.lowered(ends_Bk)
        running = open_ones.at(tf.math.top_k(open_ones.scores_Bn, beams).indices)
        finished, is_finished_Bn = finish(state, candidates, ends_Bk)
        step = state.length - limits.prompt_length
        return _State(
            running,
            finished,
            is_finished_Bn,
            can_improve(state, running, finished, is_finished_Bn),
            tf.reduce_all(ends_Bk),
            state.length + 1,
            decoder.reordered(memory, tf.reshape(tf.gather(running.rows_BnC, step, axis=2), (rows,))),
            recorded(state.records, step, scores=scores_RV, logits=logits_RV),
        )

    def goes_on(state: _State):
        going = tf.reduce_any(state.can_improve_B1) & ~state.all_ended
        if settings.early_stopping is True:
            going &= ~tf.reduce_all(state.is_finished_Bn)
        return going

    def step(state: _State):
        ids_RC = tf.reshape(state.running.ids_BnC, (rows, capacity))
        return advance(state, *decoder.next_logits(state.memory, ids_RC, state.length))

    records = empty_records(settings, limits.max_length - limits.prompt_length, vocabulary)
    state = _start(ids_RC, limits, settings, decoder.memory, records)
    state = advance(state, decoder.first_logits_RV, decoder.memory)
    state = repeat_while(goes_on, step, state)
    returned = _Texts(*(tensor[:, : settings.num_return_sequences] for tensor in state.finished))
    rows_RC = tf.reshape(returned.rows_BnC, (-1, capacity))
    return {
        "sequences": tf.reshape(returned.ids_BnC, (-1, capacity)),
        "length": limits.prompt_length + tf.reduce_max(tf.reduce_sum(tf.cast(rows_RC >= 0, tf.int32), axis=1)),
        "sequences_scores": tf.reshape(returned.scores_Bn, (-1,)),
        "beam_indices": rows_RC,
        "memory": state.memory,
        **stacked(state.records, state.length - limits.prompt_length),
    }


def _start(ids_RC, limits: Limits, settings: Settings, memory, records: dict) -> _State:
    beams = settings.num_beams
    rows, capacity = tf.unstack(tf.shape(ids_RC))
    # What stands behind the end of a text is transformers' choice: the first id that ends texts where the id of padding
    # is 0, too.
    fill = (settings.pad_token_id or settings.eos_token_ids[0]) if settings.eos_token_ids else -1
    ids_RC = tf.where(tf.range(capacity) < limits.prompt_length, ids_RC, fill)
    ids_BnC = tf.reshape(ids_RC, (rows // beams, beams, capacity))
    zeros_Bn = tf.zeros((rows // beams, beams))
    rows_BnC = tf.fill(tf.shape(ids_BnC), -1)
    # all beams start alike, so only the first one counts
    running = _Texts(ids_BnC, zeros_Bn + tf.where(tf.range(beams) > 0, _OUT, 0.0), rows_BnC)
    return _State(
        running,
        _Texts(ids_BnC, zeros_Bn + _OUT, rows_BnC),
        tf.zeros_like(zeros_Bn, dtype=tf.bool),
        tf.ones_like(zeros_Bn[:, :1], dtype=tf.bool),
        tf.constant(False),
        limits.prompt_length,
        memory,
        records,
    )


def _draw(log_weights_Bj, count: int, seed):
    """Indices (B, count) drawn without replacement: the largest after Gumbel noise (Vieira, 2014)."""
    uniform_Bj = tf.random.stateless_uniform(tf.shape(log_weights_Bj), seed, minval=1e-20)
    return tf.math.top_k(log_weights_Bj - tf.math.log(-tf.math.log(uniform_Bj)), count).indices
