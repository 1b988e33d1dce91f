"""From the numpy arrays that the processors work on to the tensors that the caller's framework wants.

The only place of the input side where torch or TensorFlow is imported, and only when it is asked for.
"""

import numpy as np

FRAMEWORKS = ("np", "pt", "tf")


def resolve_framework(return_tensors, *, default: str | None = None) -> str:
    """Turn a `return_tensors` argument into "np", "pt" or "tf".

    Args:
        return_tensors: one of those strings, a transformers `TensorType`, or None for the default.
        default: what None means; without it, "pt" where torch can be imported.

    Raises:
        ValueError: for another value, or for None without a default where torch cannot be imported.
    """
    if return_tensors is None:
        if default is not None:
            return default
        try:
            import torch  # noqa: F401 - the question is whether it is there
        except ImportError:
            raise ValueError(
                'return_tensors was not given, and its default "pt" needs torch, which is not installed: '
                'pass return_tensors="np" or return_tensors="tf".'
            ) from None
        return "pt"
    framework = getattr(return_tensors, "value", return_tensors)
    if framework not in FRAMEWORKS:
        raise ValueError(f'return_tensors must be "np", "pt" or "tf", got {return_tensors!r}.')
    return framework


def to_framework(array: np.ndarray, framework: str):
    """Hand `array` to "np" (as it is), "pt" (shares memory) or "tf" (copies); shape and dtype stay."""
    if framework == "pt":
        import torch

        return torch.from_numpy(array)
    if framework == "tf":
        import tensorflow as tf

        return tf.convert_to_tensor(array)
    return array


def to_numpy(value) -> np.ndarray:
    """The numpy array behind a numpy, torch (any device, with or without gradient) or TensorFlow value.

    bfloat16, which numpy lacks, becomes float32.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
    return np.asarray(value)


def to_lists(value):
    """A value of any framework as nested lists; lists and tuples of such values, of unequal lengths too, likewise."""
    if hasattr(value, "shape"):
        return to_numpy(value).tolist()
    if isinstance(value, (list, tuple)):
        return [to_lists(element) for element in value]
    return value
