"""Linear layers with the same input as one, for inference: fewer and larger products.

Unusual: while they are fused there is one weight, and the layers are stand-ins that take their part of the result. They
stay where they are, so that hooks hear of them and optimisers know their parameters, which are empty meanwhile; tools
that replace linear layers do not take them for some.

Mirrored by nothing in `idefics_tf`, where compiling a graph has the same effect. Axes: see `idefics_common`.
"""

import torch
from torch import nn

from idefics_pt.cpu.onednn import by_columns, has_no_hooks, project

_TOUCHED = (
    "A layer was changed while it is fused with others, which has no effect: call unfuse_projections() before changing "
    "layers or their weights, and load this model again."
)


class FusedPart(nn.Module):
    """A linear layer whose weight is some rows of a fused one, `start` and `out_features` saying which."""

    def forward(self, fused_BTF):
        if not _is_untouched(self):
            raise ValueError(_TOUCHED)
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
        self.register_state_dict_post_hook(_give_parts)

    def project_same_input(self, x):
        """What each of the layers gives for x, in the order of their names."""
        layers = [getattr(self, name) for name in self.same_input]
        if self.fused is None:
            return [project(layer, x) for layer in layers]
        if not all(isinstance(layer, FusedPart) for layer in layers):
            raise ValueError(_TOUCHED)
        is_plain = type(self.fused) is nn.Linear
        if is_plain and torch.is_grad_enabled():
            self.fused.weight.requires_grad_(any(layer.weight.requires_grad for layer in layers))
        out = project(self.fused, x)
        if is_plain and out.requires_grad and self.fused.weight.requires_grad:
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
            ValueError: if the fused layer was replaced or offloaded, so that its parts are not to be had, or if one of
                the layers was changed meanwhile.
        """
        if self.fused is None:
            return
        if type(self.fused) is not nn.Linear:
            raise ValueError(
                f"The fused layer of {', '.join(self.same_input)} was replaced by a {type(self.fused).__name__} and "
                "cannot be taken apart: load the model again, or call unfuse_projections() before changing its layers."
            )
        layers = [getattr(self, name) for name in self.same_input]
        if not all(isinstance(layer, FusedPart) and _is_untouched(layer) for layer in layers):
            raise ValueError(_TOUCHED)
        if self.fused.weight.is_meta and not layers[0].weight.is_meta:
            raise ValueError("The fused weights are offloaded: offload a model first, and fuse its projections then.")
        with torch.inference_mode(False), torch.no_grad():
            for layer, weight in zip(layers, self._weights(self.fused.weight.detach()), strict=True):
                layer.weight.data = weight.clone(memory_format=torch.contiguous_format)
                layer.__class__ = nn.Linear
                del layer.start
        self.fused = None

    def _weights(self, fused_weight):
        """The rows of the fused weight that are those of each layer."""
        return fused_weight.split([getattr(self, name).out_features for name in self.same_input])


def _is_fusable(layer) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and has_no_hooks(layer)
        and type(layer.weight) is nn.Parameter
        and not layer.weight.is_meta  # offloaded
        and not layer.weight.is_inference()
    )


def _is_untouched(layer: FusedPart) -> bool:
    """Whether nobody gave the layer a weight of its own, by assignment, loading, pruning or `functional_call`."""
    # the replicas of `nn.DataParallel` have their tensors as plain attributes
    weight = layer.weight if getattr(layer, "_is_replica", False) else layer._parameters.get("weight")
    return weight is not None and (weight.numel() == 0 or weight.is_meta)


def _unfuse(module, *args):
    """Before a state is loaded."""
    module.unfuse_projections()


def _give_parts(module, state, prefix, local_metadata):
    """After a state is taken: a weight of its own for each layer, fused or not."""
    if type(module.fused) is nn.Linear:
        for name, weight in zip(module.same_input, module._weights(state.pop(f"{prefix}fused.weight")), strict=True):
            state[f"{prefix}{name}.weight"] = weight.clone(memory_format=torch.contiguous_format)


def _refuse_gradient(gradient):
    raise RuntimeError(
        "Projections are fused, for inference, and their weights would get no gradients: call train() or "
        "unfuse_projections() before a forward pass that is to be differentiated."
    )
