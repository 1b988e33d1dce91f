"""Linear layers by the faster of the two matrix libraries that torch brings for the CPU.

Unusual: for float32 on x86 `F.linear` calls MKL, which on some processors (AMD's) reaches half of what oneDNN does,
from one row to thousands, forward and backward. Here oneDNN is called wherever plain float32 tensors meet on the CPU;
everything else (other precisions and devices, shards, quantised weights, graphs being captured, products too small to
matter) goes to `F.linear` as ever. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.

In `idefics_tf`, TensorFlow calls oneDNN itself. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import _len_torch_dispatch_stack

_LEAST_PRODUCTS = 2**18  # multiply-adds below which the few microseconds more of a oneDNN call are not made up for
_PLAIN = (torch.Tensor, nn.Parameter)


class Linear(nn.Linear):
    """`nn.Linear` whose product is `linear`."""

    is_beside = False  # whether `lay_side_by_side` placed the weight

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """``x @ weight.T + bias``: `F.linear`, by oneDNN where it serves; differentiable, any number of times.

    Args:
        x: (..., columns). weight: (rows, columns). bias: (rows,) or None.

    Returns:
        (..., rows).

    With gradient checkpointing, what decides between the libraries (autocast, `torch.backends.mkldnn.flags`, a counter
    of operations) has to be the same around forward and backward.
    """
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def lay_side_by_side(*layers: Linear):
    """Let the weights of layers with the same input be parts of one tensor, so that `side_by_side` is one product.

    The layers keep their parameters, and these their values, hooks and gradients; only where values lie in memory
    changes. Whatever moves a weight later (another device or precision, an adapter, a shard) makes the products
    separate again; nothing goes stale. Layers of another class (adapters, quantised ones) are left alone.
    """
    if any(type(layer) is not Linear or layer.bias is not None for layer in layers):
        return
    weights = [layer.weight for layer in layers]
    parts = torch.cat([weight.detach() for weight in weights]).split([len(weight) for weight in weights])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.data = part
        layer.is_beside = True


def lay_apart(*layers):
    """Undo `lay_side_by_side`: every weight gets memory of its own again."""
    for layer in layers:
        if type(layer) is Linear and layer.is_beside:
            layer.weight.data = layer.weight.data.clone()
            layer.is_beside = False


def side_by_side(x, *layers):
    """The results of several layers for the same x, computed as one product if their weights lie side by side."""
    whole = None
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        whole = _whole(layers)
    if whole is None:
        return [layer(x) for layer in layers]
    return linear(x, whole).split([layer.weight.shape[0] for layer in layers], dim=-1)


def _whole(layers):
    """The tensor of which the weights are adjacent parts, or None if they are not, or someone listens to a layer."""
    if any(type(layer) is not Linear or not layer.is_beside or _has_hooks(layer) for layer in layers):
        return None
    weights = [layer.weight for layer in layers]
    if any(type(weight) not in _PLAIN for weight in weights) or torch._C._are_functorch_transforms_active():
        return None
    first = weights[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        is_next = weight.data_ptr() == end and weight.untyped_storage().data_ptr() == storage
        if not (is_next and weight.is_contiguous() and weight.shape[1:] == first.shape[1:] and weight.nbytes):
            return None
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _has_hooks(layer) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def _suits_onednn(x, weight, bias) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.numel() * weight.shape[0] >= _LEAST_PRODUCTS
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.dtype is torch.float32 and bias.shape == weight.shape[:1]))
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and x.layout is weight.layout is torch.strided
        and torch._C._get_mkldnn_enabled()
        and torch._C._has_mkldnn
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _len_torch_dispatch_stack()
        == 0  # counters of operations and the like know the operators that torch documents
    )


def _product(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The product and its gradients, which are products of the same kind with a transposed factor."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        # a frozen weight needs no gradient, and then its input is not kept
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        gradient_x = linear(gradient, weight.t()) if needs_x else None
        gradient_weight = linear(rows.t(), x.flatten(0, -2).t()) if needs_weight else None
        gradient_bias = rows.sum(0) if needs_bias and ctx.has_bias else None
        return gradient_x, gradient_weight, gradient_bias
