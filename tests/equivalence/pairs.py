"""The same random model in both rooms, and ways to spoil one of them, so that a check can be seen to fail."""

import numpy as np
import tensorflow as tf
import torch

from idefics_tf.weights import weights_by_name
from tests.pt.pairs import our_model, tensors
from tests.tf.random_models import tf_model


def model_pair(device="cpu", **overrides):
    """The PyTorch and the Keras model of a configuration, with the same weights; PyTorch's with eager attention."""
    return our_model(device, "eager", **overrides), tf_model(**overrides)


def spoil(tf_model, name: str) -> None:
    """Make one weight wrong: a square kernel as if its transpose were forgotten, anything else reversed."""
    variable = weights_by_name(tf_model)[name].variable
    value = variable.numpy()
    is_square = value.ndim == 2 and value.shape[0] == value.shape[1]
    if value.size == 1:
        variable.assign(value + 0.5)
    else:
        variable.assign(value.T if is_square else np.flip(value).copy())


def to_torch(value, device="cpu"):
    """Numpy arrays as tensors, through tuples and dicts."""
    if isinstance(value, dict):
        return tensors(value, device)
    if isinstance(value, tuple):
        return tuple(to_torch(part, device) for part in value)
    return torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value


def to_numpy(value) -> np.ndarray:
    """A tensor of either room."""
    if isinstance(value, torch.Tensor):
        return value.detach().float().cpu().numpy()
    return tf.convert_to_tensor(value).numpy()
