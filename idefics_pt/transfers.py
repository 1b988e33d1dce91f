"""Inputs on their way to a GPU, without the host waiting until they are there.

Unusual: only memory that the system may not move ("pinned") can be copied while the host goes on; a copy from any other
first waits for the device. Pinning is for CUDA alone, and costs a copy on the host, unless a `DataLoader` with
``pin_memory=True`` has done so in a thread of its own.

In `idefics_tf`, TensorFlow moves tensors itself.
"""

from collections.abc import Mapping

import torch


def to_device(inputs: Mapping[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """What a processor or a collator made, where a model is.

    Args:
        inputs: tensors by name, of any shape and dtype, which stay as they are; other values are passed on.
        device: of the model, for example ``model.device``.

    Returns:
        the same on `device`. On a GPU the copies may still be under way; what is computed with them waits for them, and
        pinned inputs must not be written to before.
    """
    is_cuda = torch.device(device).type == "cuda"
    return {name: _moved(value, device, is_cuda) for name, value in inputs.items()}


def _moved(value, device, is_cuda: bool):
    if not isinstance(value, torch.Tensor):
        return value
    if not is_cuda or value.device.type != "cpu":
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)
