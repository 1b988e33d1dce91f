"""What is done to scores before a token is chosen: penalties, bans, and narrowing for sampling.

Unusual: the text so far is the beginning of a tensor of fixed size, so each rule takes its length and masks what lies
behind. Rules and their order are those of transformers, so that the same settings give the same tokens.

In `idefics_pt` transformers does it. Axes: see `idefics_common`; R rows of text, C positions that fit.
"""

import tensorflow as tf

from idefics_tf.generation_settings import Settings
from idefics_tf.search_state import is_one_of

_NEVER = -float("inf")


def process(scores_RV, ids_RC, length, first_R, min_length, settings: Settings):
    """Apply every rule that `settings` ask for, those for sampling aside.

    Args:
        scores_RV: float32 logits or log probabilities of the next token.
        ids_RC: the text so far in its first `length` positions.
        first_R: where the text of each row begins, behind its left padding.
        min_length: no end of text before the text is this long.
    """
    if settings.repetition_penalty != 1.0:
        scores_RV = penalize_repetition(scores_RV, ids_RC, length, first_R, settings.repetition_penalty)
    if settings.no_repeat_ngram_size > 0:
        scores_RV = ban_repeated_ngrams(scores_RV, ids_RC, length, settings.no_repeat_ngram_size)
    for words in settings.bad_words_ids:
        scores_RV = ban_words(scores_RV, ids_RC, length, words)
    if settings.eos_token_ids:
        is_eos_V = is_one_of(tf.range(scores_RV.shape[-1]), settings.eos_token_ids)
        scores_RV = tf.where(is_eos_V & (length < min_length), _NEVER, scores_RV)
    return scores_RV


def narrow(scores_RV, settings: Settings):
    """Temperature, top-k and top-p, in this order. What is cut off gets -inf."""
    # beams need a token to go on with, should all others end them
    min_kept = 1 if settings.num_beams == 1 else len(settings.eos_token_ids or (0,)) + 1
    if settings.temperature != 1.0:
        scores_RV = scores_RV / settings.temperature
    if settings.top_k > 0:
        scores_RV = top_k(scores_RV, max(settings.top_k, min_kept))
    if settings.top_p < 1.0:
        scores_RV = top_p(scores_RV, settings.top_p, min_kept)
    return scores_RV


def penalize_repetition(scores_RV, ids_RC, length, first_R, penalty: float):
    """Make tokens that occurred less likely: positive scores divided by `penalty`, negative ones multiplied."""
    position_C = tf.range(tf.shape(ids_RC)[1])
    counts_RC = (position_C < length) & (position_C >= first_R[:, None])
    occurred_RV = _marked(ids_RC, counts_RC, scores_RV.shape[-1])
    penalized_RV = tf.where(scores_RV < 0, scores_RV * penalty, scores_RV / penalty)
    return tf.where(occurred_RV, penalized_RV, scores_RV)


def ban_repeated_ngrams(scores_RV, ids_RC, length, size: int):
    """Ban tokens that would complete an n-gram of `size` tokens for a second time, padding included."""
    windows = tf.shape(ids_RC)[1] - size + 1
    matches_RW = tf.range(windows)[None] <= length - size
    for i in range(size - 1):
        latest_R1 = _column(ids_RC, length - size + 1 + i)
        matches_RW &= ids_RC[:, i : i + windows] == latest_R1
    last_RW = ids_RC[:, size - 1 : size - 1 + windows]
    return tf.where(_marked(last_RW, matches_RW, scores_RV.shape[-1]), _NEVER, scores_RV)


def ban_words(scores_RV, ids_RC, length, words: tuple[tuple[int, ...], ...]):
    """Ban the last token of each sequence of ids in `words`, which are equally long, where the others came before."""
    size = len(words[0])
    if size == 1:
        return tf.where(is_one_of(tf.range(scores_RV.shape[-1]), [word[0] for word in words]), _NEVER, scores_RV)
    prefixes_NP, last_N = tf.constant([word[:-1] for word in words]), tf.constant([word[-1] for word in words])
    latest_RP = tf.concat([_column(ids_RC, length - size + 1 + i) for i in range(size - 1)], axis=1)
    matches_RN = tf.reduce_all(latest_RP[:, None] == prefixes_NP, axis=-1) & (length >= size - 1)
    last_RN = tf.broadcast_to(last_N, tf.shape(matches_RN))
    return tf.where(_marked(last_RN, matches_RN, scores_RV.shape[-1]), _NEVER, scores_RV)


def top_k(scores_RV, k: int):
    """Keep the `k` highest scores, and those equal to the last of them."""
    lowest_R1 = tf.math.top_k(scores_RV, min(k, scores_RV.shape[-1])).values[:, -1:]
    return tf.where(scores_RV < lowest_R1, _NEVER, scores_RV)


def top_p(scores_RV, p: float, min_kept: int):
    """Keep the fewest tokens whose probabilities add up to `p`, and at least `min_kept`."""
    order_RV = tf.argsort(scores_RV, stable=True)
    sorted_RV = tf.gather(scores_RV, order_RV, batch_dims=1)
    is_cut_RV = tf.cumsum(tf.nn.softmax(sorted_RV), axis=-1) <= 1.0 - p
    is_cut_RV &= tf.range(scores_RV.shape[-1]) < scores_RV.shape[-1] - min_kept
    is_cut_RV = tf.gather(is_cut_RV, tf.argsort(order_RV), batch_dims=1)
    return tf.where(is_cut_RV, _NEVER, scores_RV)


def _column(ids_RC, position):
    """Ids at one position, (R, 1); the first ones where there is no such position."""
    return tf.gather(ids_RC, tf.maximum(position, 0)[None], axis=1)


def _marked(ids_RN, condition_RN, vocabulary: int):
    """Boolean (R, V): which tokens are among those ids of their row for which the condition holds."""
    # those that do not count add nothing to the first token
    column_RN = tf.where(condition_RN, ids_RN, 0)
    row_RN = tf.broadcast_to(tf.range(tf.shape(ids_RN)[0])[:, None], tf.shape(ids_RN))
    place_RN2, counts_RN = tf.stack((row_RN, column_RN), axis=-1), tf.cast(condition_RN, tf.int32)
    return tf.scatter_nd(place_RN2, counts_RN, (tf.shape(ids_RN)[0], vocabulary)) > 0
