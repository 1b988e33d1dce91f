"""Says once, where there is no GPU, that the tests on one are left out; `device` in the conftest files runs them."""

import pytest
import tensorflow as tf
import torch


def test_torch_has_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device for torch here: tests/pt and tests/equivalence run on the CPU alone")
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_tensorflow_has_a_gpu():
    if not tf.config.list_physical_devices("GPU"):
        pytest.skip("no GPU for TensorFlow here: tests/equivalence run on the CPU alone")
    with tf.device("/GPU:0"):
        assert tf.reduce_sum(tf.ones(2)).numpy() == 2
