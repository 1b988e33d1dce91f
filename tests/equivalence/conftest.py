"""Fixtures of the comparisons between the rooms."""

import pytest
import tensorflow as tf
import torch

import tests.tf.settings  # noqa: F401 - before TensorFlow runs anything

torch.set_num_threads(1)


HAS_GPU = torch.cuda.is_available() and bool(tf.config.list_physical_devices("GPU"))


@pytest.fixture(params=["cpu", "cuda"] if HAS_GPU else ["cpu"])
def device(request):
    """Each device of both rooms (`tests/test_devices.py`) in turn; TF32 is off, so that float32 means float32."""
    if request.param == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    with tf.device("/GPU:0" if request.param == "cuda" else "/CPU:0"):
        yield request.param
