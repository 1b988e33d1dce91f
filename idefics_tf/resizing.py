"""Changing the size of the vocabulary.

Keras's variables cannot change their shape, so the layer inside `DecoupledEmbedding` or `DecoupledLinear` is replaced
by a new one.

Mirrors `idefics_pt/resizing.py`. Axes: see `idefics_common`.
"""

import contextlib

import keras
import numpy as np

from idefics_common.configuration.vocabulary import additional_size, rounded_size
from idefics_tf.adaptable import Dense, Embedding
from idefics_tf.initialization import Normal, values_follow


def resize_vocabulary(embedding, head, config, new_num_tokens, pad_to_multiple_of, mean_resizing) -> None:
    """Resize the layers of a model and its configuration; see `TFIdeficsPreTrainedModel.resize_token_embeddings`.

    Args:
        embedding: a `DecoupledEmbedding`. head: a `DecoupledLinear`, or None.
    """
    std = None if mean_resizing else config.initializer_range
    if config.additional_vocab_size == 0:
        size = rounded_size(config, new_num_tokens, pad_to_multiple_of)
        _replace(embedding, "base", size, std)
        if head is not None and not head.tied:
            _replace(head, "base", size, std)
        embedding.num_embeddings = config.vocab_size = size
        return
    size = additional_size(config, new_num_tokens, pad_to_multiple_of)
    _replace(embedding, "additional_embedding", size, std)
    if head is not None:
        if not head.tied:
            _replace(head, "additional_fc", size, std)
        head.out_additional_features = size
    embedding.num_additional_embeddings = config.additional_vocab_size = size


def _replace(parent, name: str, size: int, std: float | None) -> None:
    """Replace the layer `name` of `parent` by one for a vocabulary of `size`; remove it for size 0.

    Args:
        std: standard deviation of new rows around zero; None for the mean of the base rows, which disturbs the
            probabilities of a trained model least.
    """
    old = getattr(parent, name)
    is_embedding = isinstance(old, keras.layers.Embedding)
    rows = _rows(old)
    new_rows = _new_rows(_rows(parent.base), size, std)
    kept = min(size, len(rows))
    new_rows[:kept] = rows[:kept]
    # Keras forbids changing the layers of a layer that is built, and has no public way to allow it
    parent._tracker.unlock()
    parent._tracker.untrack(old)
    delattr(parent, name)
    if size > 0:
        policy = old.dtype_policy
        if is_embedding:
            new = Embedding(size, new_rows.shape[1], Normal(0.0), name=name, dtype=policy)
        else:
            new = Dense(size, use_bias=False, kernel_initializer=Normal(0.0), name=name, dtype=policy)
        with values_follow(), contextlib.ExitStack() as scopes:
            for scope in parent.path.split("/"):
                scopes.enter_context(keras.name_scope(scope))
            new.build((None, new_rows.shape[1]))
        new.weights[0].assign(new_rows if is_embedding else new_rows.T)
        new.trainable = old.trainable
        new.weights[0].trainable = old.weights[0].trainable
        setattr(parent, name, new)
    parent._tracker.lock()


def _rows(layer) -> np.ndarray:
    """A matrix with one row for each id, whichever kind of layer holds it."""
    matrix = layer.weights[0].numpy()
    return matrix if isinstance(layer, keras.layers.Embedding) else matrix.T


def _new_rows(base: np.ndarray, size: int, std: float | None) -> np.ndarray:
    if std is None:
        return np.repeat(base.astype("float32").mean(axis=0, keepdims=True), size, axis=0).astype(base.dtype)
    return keras.random.normal((size, base.shape[1]), stddev=std).numpy().astype(base.dtype)
