"""Products of linear layers, by the faster of the two matrix libraries that torch brings for the CPU.

For float32 on x86 `F.linear` calls MKL, which on some processors (AMD's) reaches half of what oneDNN does, from one row
to thousands, forward and backward. `project` calls oneDNN wherever plain float32 tensors meet on the CPU, and for a
product with GELU in bfloat16 too. Everything else goes to `F.linear` as ever: other precisions and devices, shards,
quantised weights, graphs being captured, products too small to matter.
``torch.backends.mkldnn.flags(enabled=False)`` turns it off.

In `idefics_tf`, TensorFlow calls oneDNN itself. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula
from transformers.activations import GELUActivation

from idefics_pt import torch_internals

_LEAST_PRODUCTS = 2**18  # multiply-adds below which the few microseconds more of a oneDNN call are not made up for
_LEAST_TALL = 2048  # rows of a matrix that is read faster column by column
_MOST_COPIED = 2**22  # numbers of a factor that oneDNN may copy at once because its rows are not contiguous
_IS_AVAILABLE = torch.backends.mkldnn.is_available()
_PLAIN = (torch.Tensor, nn.Parameter)


def project(layer, x):
    """What calling a linear layer gives, ``layer(x)``.

    A plain `nn.Linear` without hooks is not called: its product is `linear`'s. Anything else is called, be it a layer
    with hooks, with an adapter, or quantised. What PEFT's adapters and linear layers with hooks give to `F.linear` is
    given to `linear`.
    """
    if type(layer) is nn.Linear and has_no_hooks(layer):
        return linear(x, layer.weight, layer.bias)
    # not in any layer: a checkpoint inside one would run forward here, and again, in the backward pass, elsewhere
    is_known = hasattr(layer, "base_layer") or (type(layer) is nn.Linear and "forward" not in layer.__dict__)
    if is_known and x.is_cpu and x.dtype is torch.float32 and not torch.compiler.is_compiling():
        with _LinearFunction():
            return layer(x)
    return layer(x)


def project_and_activate(layer, activation, x):
    """``activation(layer(x))``; the exact GELU, where no gradient is wanted on the CPU, in one pass over the result.

    That spares a tensor of this size, in the vision tower the largest there is, and in bfloat16 one rounding.
    """
    is_gelu = type(activation) is GELUActivation and activation.act is F.gelu and has_no_hooks(activation)
    if is_gelu and type(layer) is nn.Linear and has_no_hooks(layer):
        weight, bias = layer.weight, layer.bias
        if (
            not _is_recorded(x, weight, bias)
            and suits_onednn(x, weight, bias, x.dtype)
            and (x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and torch_internals.supports_bfloat16()))
        ):
            return _product(x, weight, bias, "gelu")
    return activation(project(layer, x))


def linear(input, weight, bias=None):
    """``input @ weight.T + bias``: `F.linear`, by oneDNN where it serves; differentiable, any number of times.

    Args:
        input: (..., columns). weight: (rows, columns). bias: (rows,) or None.

    Returns:
        (..., rows).

    With gradient checkpointing, what decides between the libraries (autocast, `torch.backends.mkldnn.flags`) has to be
    the same around forward and backward.
    """
    if not suits_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    if _is_recorded(input, weight, bias):
        return _Linear.apply(input, weight, bias)
    return _product(input, weight, bias)


def by_columns(matrix):
    """The same values, column after column in memory, if they are of the kind that oneDNN multiplies, and if that is
    faster: it is for few rows of x, by a tenth to a fifth for tall matrices, unless columns a multiple of 8 KB long
    drive each other out of the cache."""
    is_faster = len(matrix) >= _LEAST_TALL and len(matrix) * matrix.element_size() % 2**13
    is_for_onednn = type(matrix) in _PLAIN and matrix.is_cpu and matrix.dtype is torch.float32
    return matrix.t().contiguous().t() if is_faster and is_for_onednn else matrix


def has_no_hooks(module) -> bool:
    """Whether nobody listens to the module, so that its forward may run at another time, twice, or not through it."""
    return (
        torch_internals.is_complete
        and "forward" not in module.__dict__
        and not any(module.__dict__[name] for name in torch_internals.hooks_of_modules)
        and not torch_internals.has_global_hooks()
    )


def is_plain(x, weight, dtype=torch.float32) -> bool:
    """Whether both are ordinary CPU tensors of `dtype`, and nothing captures or transforms operations."""
    return (
        torch_internals.is_complete
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.dtype is weight.dtype is dtype
        and x.is_cpu
        and weight.is_cpu
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.layout is weight.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
        and not torch_internals.is_transformed()
        and unpack_dual(x).tangent is unpack_dual(weight).tangent is None
    )


def suits_onednn(x, weight, bias=None, dtype=torch.float32) -> bool:
    """Whether oneDNN can multiply these, and the product is large enough; `linear` uses it for float32."""
    return (
        is_plain(x, weight, dtype)
        and x.numel() * weight.shape[0] >= _LEAST_PRODUCTS
        and (bias is None or _is_plain_bias(bias, weight))
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and _is_dense(weight)
        and _IS_AVAILABLE
        and torch.backends.mkldnn.enabled
    )


def _is_plain_bias(bias, weight) -> bool:
    return (
        type(bias) in _PLAIN
        and bias.dtype is weight.dtype
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
        and unpack_dual(bias).tangent is None
    )


def _is_dense(weight) -> bool:
    """Whether rows, or columns, follow each other without gaps: between others oneDNN takes a hundred times as long."""
    return weight.stride() in ((weight.shape[1], 1), (1, weight.shape[0]))


def _is_recorded(x, weight, bias) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _product(x, weight, bias=None, activation="none"):
    if x.dim() != 2 and not torch.is_inference_mode_enabled():
        # of more axes the operator makes a view of a matrix, and those autograd refuses to let be changed in place
        return _product(x.flatten(0, -2), weight, bias, activation).resize_(*x.shape[:-1], len(weight))
    if x.numel() <= _MOST_COPIED or x.dim() != 2 or x.is_contiguous():
        return torch_internals.linear_pointwise(x, weight, bias, activation, [], "none")
    # of such an x, in training the gradient of the logits, oneDNN would copy the whole
    out = x.new_empty(x.shape[0], weight.shape[0])
    length = max(1, _MOST_COPIED // x.shape[1])
    for rows, out_rows in zip(x.split(length), out.split(length), strict=True):
        out_rows.copy_(_product(rows.contiguous(), weight, bias, activation))
    return out


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
        rows = gradient.reshape(-1, gradient.shape[-1])
        gradient_x = linear(rows, weight.t()).reshape(*gradient.shape[:-1], -1) if needs_x else None
        gradient_weight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None
        gradient_bias = rows.sum(0) if needs_bias and ctx.has_bias else None
        return gradient_x, gradient_weight, gradient_bias


class _LinearFunction(TorchFunctionMode):
    """Within, `F.linear` is `linear`, whoever calls it: in a layer with an adapter, the layer that is adapted."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (linear if function is F.linear else function)(*args, **(kwargs or {}))


if torch_internals.linear_pointwise is not None:

    @register_flop_formula(torch_internals.linear_pointwise)
    def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        """What `FlopCounterMode` counts for a product: two for each multiply-add."""
        return 2 * x_shape.numel() * weight_shape[0]
