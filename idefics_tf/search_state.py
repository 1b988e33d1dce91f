"""What the searches share: bounds of the length, records of the steps, and the loop."""

from typing import Any, NamedTuple

import tensorflow as tf


class Limits(NamedTuple):
    """Scalar int32 tensors: lengths of the prompt, and least and most length of the text, prompt included."""

    prompt_length: Any
    min_length: Any
    max_length: Any


def empty_records(settings, num_steps, vocabulary: int) -> dict:
    """What a search keeps of its steps, by name: for all that is asked for a `tf.TensorArray`, one (R, V) a step."""
    wanted = [name for name in ("scores", "logits") if getattr(settings, f"output_{name}")]
    return {
        name: tf.TensorArray(tf.float32, num_steps, clear_after_read=False, element_shape=(None, vocabulary))
        for name in wanted
    }


def recorded(records: dict, step, **values) -> dict:
    """The records with what one step had."""
    return {name: array.write(step, values[name]) for name, array in records.items()}


def stacked(records: dict, num_steps) -> dict:
    """By name, what was kept of the first `num_steps` steps, (steps, R, V)."""
    return {name: array.gather(tf.range(num_steps)) for name, array in records.items()}


def is_one_of(ids, wanted):
    """Boolean, of the shape of `ids`: which of them are wanted."""
    return tf.reduce_any(ids[..., None] == tf.constant(wanted), axis=-1)


def repeat_while(goes_on, step, state):
    """`tf.while_loop` on one structure of tensors, none of which changes its shape.

    A graph forgets sizes on the way through a step, and the loop would refuse what comes out.
    """

    def step_keeping_shapes(state):
        return (tf.nest.map_structure(_with_shape_of, step(state), state),)

    (state,) = tf.while_loop(goes_on, step_keeping_shapes, (state,))
    return state


def _with_shape_of(new, old):
    if isinstance(new, tf.Tensor):
        new.set_shape(old.shape)
    return new
