"""The inputs of a call: by name and as tensors, whichever way Keras or a caller passes them.

Unusual: what has another rank than its argument is refused by name before anything is computed, and a rank or a size
that `tf.data` has lost (`from_generator`, `py_function`) is put back, since it follows from the configuration.

In `idefics_pt` Python's own rules for arguments do.
"""

import inspect
from collections.abc import Mapping

import keras
import tensorflow as tf


def named_inputs(call, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by name.

    Args:
        call: the method whose positional arguments they are.
        args: as the method takes them; or one mapping of them, before which keywords go; or one list or tuple of them,
            as the models of Keras and of earlier versions of transformers take. A list of rows of ids is `input_ids`.

    Raises:
        TypeError: if there are more than the method has, or one comes twice.
    """
    if len(args) == 1:
        if isinstance(args[0], Mapping):
            return {**args[0], **kwargs}
        if _is_list_of_inputs(args[0]):
            args = args[0]
    names = list(inspect.signature(call).parameters) if len(args) > 1 else ["input_ids"]
    if len(args) > len(names):
        raise TypeError(f"There are {len(args)} positional inputs, but {len(names)} arguments: {', '.join(names)}.")
    given = {name: value for name, value in zip(names, args, strict=False) if value is not None}
    twice = [name for name in given if kwargs.get(name) is not None]
    if twice:
        raise TypeError(f"{twice[0]} came twice: by position and by name.")
    return {**kwargs, **given}


def as_tensors(inputs: dict, config, interpolate_pos_encoding=False) -> dict:
    """Inputs whose tensors have the ranks of their arguments; what is no tensor argument is left as it is.

    Args:
        inputs: by name. config: an `IdeficsConfig`.

    Raises:
        ValueError: for a ragged or sparse tensor, rows of different lengths, or text; the message names the argument.
    """
    vision = config.vision_config
    size = None if interpolate_pos_encoding else vision.image_size
    latents = config.perceiver_config.resampler_n_latents
    shapes = {
        "input_ids": (None, None),
        "attention_mask": (None, None),
        "position_ids": (None, None),
        "inputs_embeds": (None, None, config.hidden_size),
        "pixel_values": (None, None, vision.num_channels, size, size),
        "image_encoder_embeddings": (None, None, None, vision.embed_dim),
        "perceiver_embeddings": (None, None, latents, vision.embed_dim),
        "image_attention_mask": (None, None, None),
        "labels": (None, None),
    }
    return {
        name: value if value is None or name not in shapes else _as_tensor(name, value, shapes[name])
        for name, value in inputs.items()
    }


def is_symbolic(inputs: dict) -> bool:
    """Whether a functional model is being made of these inputs."""
    return any(isinstance(value, keras.KerasTensor) for value in inputs.values())


def symbolic_options(inputs: dict) -> dict:
    """The arguments of a layer of a functional model, whose outputs are the same tensors in every call.

    Raises:
        ValueError: for an option that leaves places without a tensor in the output.
    """
    images = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings", "past_key_values")
    if inputs.get("use_cache") and all(inputs.get(name) is None for name in images):
        raise ValueError("use_cache=True is not for text alone in a functional model: a cache has a place for images.")
    if not isinstance(inputs.get("output_hidden_states"), (bool, type(None))):
        raise ValueError(
            f"output_hidden_states={inputs['output_hidden_states']!r} is not for a functional model, whose outputs are "
            "all tensors: give True, and use those that are wanted."
        )
    return {**inputs, "use_cache": bool(inputs.get("use_cache"))}


def _is_list_of_inputs(value) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    first, depth = value[0], 0
    if first is None:
        return True
    while isinstance(first, (list, tuple)) and first:
        first, depth = first[0], depth + 1
    shape = getattr(first, "shape", ())
    rank = shape.rank if isinstance(shape, tf.TensorShape) else len(shape)
    return rank is None or depth + rank >= 2


def _as_tensor(name, value, shape):
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)) or getattr(value, "ragged", False):
        kind = "sparse" if isinstance(value, tf.SparseTensor) else "ragged"
        raise ValueError(
            f"{name} is a {kind} tensor: make rows of equal length, for example with {name}.to_tensor(), and give an "
            "attention_mask that is 0 at the padding."
        )
    if not hasattr(value, "shape") or getattr(value.dtype, "kind", "f") in "OSU":
        try:
            value = tf.convert_to_tensor(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must be a tensor, or lists that make one; got {_described(value)}. Rows of different lengths "
                "have to be padded, as the processor does."
            ) from error
    if getattr(value, "dtype", None) == tf.string:
        raise ValueError(f"{name} must hold numbers, got text: IdeficsProcessor makes inputs of it.")
    if isinstance(value, keras.KerasTensor) or not isinstance(value, tf.Tensor) or value.shape.is_fully_defined():
        return value
    if value.shape.rank not in (None, len(shape)):
        return value  # the check of this argument refuses it, with all that has to be said
    known = shape if value.shape.rank is None else value.shape
    merged = tuple(size if size is not None else known_size for known_size, size in zip(shape, known, strict=True))
    return value if merged == tuple(known) and value.shape.rank is not None else tf.ensure_shape(value, merged)


def _described(value) -> str:
    text = repr(value)
    return f"a {type(value).__name__}: {text if len(text) < 80 else text[:77] + '...'}"
