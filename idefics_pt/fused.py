"""Linear layers with the same input as one, for inference: fewer and larger products.

Unusual: while they are fused there is one weight, and the layers are stand-ins that take their part of the result. They
stay where they are, so that hooks hear of them and optimisers know their parameters, which are empty meanwhile; tools
that replace linear layers do not take them for some.

Mirrored by nothing in `idefics_tf`, where compiling a graph has the same effect. Axes: see `idefics_common`.
"""

import torch
from torch import nn

from idefics_pt.cpu.onednn import by_columns, has_no_hooks, project


class FusedPart(nn.Module):
    """A linear layer whose weight is some rows of a fused one, `start` and `out_features` saying which."""

    def forward(self, fused_BTF):
        return fused_BTF.narrow(-1, self.start, self.out_features)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, fused: adapters and tools need unfuse_projections() first"


class Fusable(nn.Module):
    """A module with linear layers that have the same input, `same_input` being their names."""

    same_input = ()

    def __init__(self):
        super().__init__()
        self.fused = None
        self.register_load_state_dict_pre_hook(_unfuse)

    def project_same_input(self, x):
        """What each of the layers gives for x, in the order of their names."""
        layers = [getattr(self, name) for name in self.same_input]
        if self.fused is None:
            return [project(layer, x) for layer in layers]
        out = project(self.fused, x)
        if out.requires_grad and type(self.fused) is nn.Linear and self.fused.weight.requires_grad:
            out.register_hook(_refuse_gradient)
        return [layer(out) for layer in layers]

    def fuse_projections(self):
        """Fuse the layers, unless one of them is anything but a linear layer without bias and hooks."""
        layers = [getattr(self, name) for name in self.same_input]
        if not all(_is_fusable(layer) for layer in layers):
            return
        with torch.inference_mode(False), torch.no_grad():
            weight = by_columns(torch.cat([layer.weight for layer in layers]))
            fused = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            fused.weight = nn.Parameter(weight, any(layer.weight.requires_grad for layer in layers))
            fused.training = self.training
            start = 0
            for layer in layers:
                layer.weight.data = weight.new_empty(0)
                layer.__class__, layer.start = FusedPart, start
                start += layer.out_features
        self.fused = fused

    def unfuse_projections(self):
        """Give the layers their weights back, each in memory of its own.

        Raises:
            ValueError: if the fused layer was replaced, so that its parts are not to be had.
        """
        if self.fused is None:
            return
        if type(self.fused) is not nn.Linear:
            raise ValueError(
                f"The fused layer of {', '.join(self.same_input)} was replaced by a {type(self.fused).__name__} and "
                "cannot be taken apart: load the model again, or call unfuse_projections() before changing its layers."
            )
        for name, weight in self._weights(self.fused.weight.detach()):
            layer = getattr(self, name)
            layer.weight.data = weight.clone(memory_format=torch.contiguous_format)
            layer.__class__ = nn.Linear
            del layer.start
        self.fused = None

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """See `torch.nn.Module.state_dict`; fused or not, there is one weight for each layer."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if type(self.fused) is nn.Linear:
            for name, weight in self._weights(state.pop(f"{prefix}fused.weight")):
                state[f"{prefix}{name}.weight"] = weight.contiguous()
        return state

    def _weights(self, fused_weight):
        """Names of the layers, and their rows of the fused weight."""
        sizes = [getattr(self, name).out_features for name in self.same_input]
        return zip(self.same_input, fused_weight.split(sizes), strict=True)


def _is_fusable(layer) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and has_no_hooks(layer)
        and type(layer.weight) is nn.Parameter
        and not layer.weight.is_meta  # offloaded
    )


def _unfuse(module, *args):
    """Before a state is loaded."""
    module.unfuse_projections()


def _refuse_gradient(gradient):
    raise RuntimeError(
        "Projections are fused, for inference, and their weights would get no gradients: call train() or "
        "unfuse_projections() before a forward pass that is to be differentiated."
    )
