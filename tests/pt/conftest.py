"""Fixtures of the PyTorch tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Each device that is here (`tests/test_devices.py`) in turn; TF32 is off, so that float32 means float32."""
    if request.param == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return request.param
