"""Fixtures of the comparisons between the rooms."""

import pytest
import tensorflow as tf
import torch

import tests.tf.settings  # noqa: F401 - before TensorFlow runs anything

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each device in turn, for both rooms; TF32 is off on both sides, so that float32 means float32."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device for torch here")
        if not tf.config.list_physical_devices("GPU"):
            pytest.skip("no GPU device for TensorFlow here")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    with tf.device("/GPU:0" if request.param == "cuda" else "/CPU:0"):
        yield request.param
