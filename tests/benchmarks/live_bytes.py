"""How many bytes of tensors are alive at once, counted operator by operator: the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the memory that operators allocate and that is not freed yet.

    Attributes:
        now, peak: bytes alive at this moment, and at most so far.

    Args:
        known: tensors that were there before, whose memory and views do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes):
        self.now -= nbytes
