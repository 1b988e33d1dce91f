"""A GPU that computes nothing: fake tensors on `cuda`, on machines with and without one, and a watch on the host.

Shapes, dtypes and devices are those that a GPU would see; values there are none. So whoever mixes devices is refused,
and whoever asks a tensor for a value is noticed: on a GPU the host would wait there for all that is queued.

Unusual: a torch that was built without CUDA looks for it before it indexes or copies a tensor that says it is there;
`FakeCuda` does these few things by operators that do not.
"""

import sys

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda:0")
_Tensor, _ROWS = torch.Tensor, torch.contiguous_format
_READS = {
    _Tensor.__bool__: False,
    _Tensor.__int__: 0,
    _Tensor.__index__: 0,
    _Tensor.__float__: 0.0,
    _Tensor.item: 0,
    torch.equal: True,
}
_COPIES = (_Tensor.tolist, _Tensor.cpu, _Tensor.numpy)
_GUARDED = {
    _Tensor.__getitem__: lambda tensor, key: _index(tensor, key),
    _Tensor.__setitem__: lambda tensor, key, value: torch.ops.aten.copy_(_index(tensor, key), value),
    _Tensor.__invert__: torch.ops.aten.bitwise_not,
    _Tensor.contiguous: lambda tensor: tensor if tensor.is_contiguous() else torch.clone(tensor, memory_format=_ROWS),
    _Tensor.copy_: torch.ops.aten.copy_,
}
"""What would look for a GPU, by operators that do not."""
_OF_US = ("idefics_pt", "transformers")


class FakeCuda(TorchFunctionMode):
    """Makes tensors fake while it lasts.

    Args:
        answers: what a read finds, by the qualified name of the function that asks; the others find False, 0, or, for
            `nonzero`, every element.

    Attributes:
        waits: (operation, qualified name of the function that asked for it), in order, wherever the host would wait
            for a GPU: reads of values, and copies between host and device that are not asynchronous and from pinned
            memory.
    """

    def __init__(self, answers=()):
        super().__init__()
        self.fakes = FakeTensorMode()
        self.answers = dict(answers)
        self.waits = []
        self._pinned = set()

    def __enter__(self):
        self.fakes.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        return self.fakes.__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], _Tensor) else None
        is_there = first is not None and first.device.type == CUDA.type
        if is_there and function in _READS:
            asker = self._note(function)
            return self.answers[asker]() if asker in self.answers else _READS[function]
        if is_there and function in (_Tensor.nonzero, torch.nonzero):
            self._note(function)
            return first.new_empty((first.numel(), first.dim()), dtype=torch.long)
        if is_there and function in _GUARDED:
            return _GUARDED[function](*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            return self._made(function, args, kwargs)
        if function is _Tensor.pin_memory:
            self._pinned.add(id(first))
            return first
        result = function(*args, **kwargs)
        is_copied = function is _Tensor.to and result.device.type != first.device.type
        is_queued = is_copied and not is_there and id(first) in self._pinned and kwargs.get("non_blocking")
        if (is_there and function in _COPIES) or (is_copied and not is_queued):
            self._note(function)
        return result

    def _made(self, function, args, kwargs):
        device = torch.device(kwargs.pop("device", None) or "cpu")
        made = function(*args, **kwargs)
        if device.type == "cpu" or made.device == device:
            return made
        self._note(function)
        return made.to(device)

    def _note(self, function) -> str:
        frame = sys._getframe(1)
        while frame is not None and not any(name in frame.f_code.co_filename for name in _OF_US):
            frame = frame.f_back
        asker = "" if frame is None else frame.f_code.co_qualname
        self.waits.append((function.__name__, asker))
        return asker

    def tensor(self, like, device=CUDA):
        """A fake tensor of the shape and dtype of `like`."""
        with self:
            return torch.empty(like.shape, dtype=like.dtype, device=device)

    def model(self, model, device_of=lambda name: CUDA):
        """The model with fake parameters and buffers, each on ``device_of(name)``; changed in place."""
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = self.tensor(parameter, device_of(f"{prefix}.{name}"))
                    module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = self.tensor(buffer, device_of(f"{prefix}.{name}"))
        return model


def _index(tensor, key):
    """``tensor[key]``."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [part for part in keys if not isinstance(part, _Tensor)]:
        at = next(i for i, part in enumerate(keys) if part is Ellipsis)
        used = sum(part is not None and part is not Ellipsis for part in keys)
        keys[at : at + 1] = [slice(None)] * (tensor.dim() - used)
    axis, indices = 0, []
    for part in keys:
        if part is None:
            tensor, axis = tensor.unsqueeze(axis), axis + 1
        elif isinstance(part, int):
            tensor = tensor.select(axis, part)
        elif isinstance(part, slice):
            start, stop, step = part.indices(tensor.shape[axis])
            tensor = torch.ops.aten.slice.Tensor(tensor, axis, start, max(start, stop), step)
            axis += 1
        else:
            indices += [None] * (axis - len(indices)) + [torch.as_tensor(part, device=tensor.device)]
            axis += 1
    return torch.ops.aten.index.Tensor(tensor, indices) if indices else tensor
