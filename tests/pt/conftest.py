"""Fixtures of the PyTorch tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each device in turn; TF32 is off, so that float32 means float32."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return request.param
