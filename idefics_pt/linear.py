"""Linear layers by the faster of the two matrix libraries that torch brings for the CPU.

Unusual: for float32 on x86 `F.linear` calls MKL, which on some processors (AMD's) reaches half of what oneDNN does,
from one row to thousands, forward and backward. Here oneDNN is called wherever plain float32 tensors meet on the CPU,
and for a product with GELU in bfloat16 too; everything else (other precisions and devices, shards, quantised weights,
graphs being captured, products too small to matter) goes to `F.linear` as ever.
``torch.backends.mkldnn.flags(enabled=False)`` turns it off.

In `idefics_tf`, TensorFlow calls oneDNN itself. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from transformers.activations import GELUActivation

_LEAST_PRODUCTS = 2**18  # multiply-adds below which the few microseconds more of a oneDNN call are not made up for
_LEAST_TALL = 2048  # rows of a matrix that is read faster column by column
_MOST_COPIED = 2**22  # numbers of a factor that oneDNN may copy at once because its rows are not contiguous
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
    if not suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if _is_recorded(x, weight, bias):
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
    parts = by_columns(torch.cat([weight.detach() for weight in weights])).split([len(weight) for weight in weights])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.data = part
        layer.is_beside = True


def by_columns(matrix):
    """The same values, column after column in memory, if they are of the kind that oneDNN multiplies, and if that is
    faster: it is for few rows of x, by a tenth to a fifth for tall matrices, unless columns a multiple of 8 KB long
    drive each other out of the cache."""
    is_faster = len(matrix) >= _LEAST_TALL and len(matrix) * matrix.element_size() % 2**13
    is_for_onednn = type(matrix) in _PLAIN and matrix.is_cpu and matrix.dtype is torch.float32
    return matrix.t().contiguous().t() if is_faster and is_for_onednn else matrix


def lay_apart(*modules):
    """Undo `lay_side_by_side`: every weight of a `Linear` among the modules gets memory of its own again, by rows."""
    for module in modules:
        # copies of a model and loading by assignment keep the order of a weight and not the mark
        if type(module) is Linear and (module.is_beside or not module.weight.is_contiguous()):
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.is_beside = False


def side_by_side(x, *layers):
    """The results of several layers for the same x, computed as one product if their weights lie side by side."""
    whole = None
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        whole = _whole(layers)
    if whole is None:
        return [layer(x) for layer in layers]
    return linear(x, whole).split([layer.weight.shape[0] for layer in layers], dim=-1)


def activated(layer, activation, x):
    """``activation(layer(x))``; the exact GELU, where no gradient is wanted on the CPU, in one pass over the result.

    That spares a tensor of this size, in the vision tower the largest there is, and in bfloat16 one rounding.
    """
    is_gelu = type(activation) is GELUActivation and activation.act is F.gelu and is_silent(activation)
    if is_gelu and type(layer) is Linear and is_silent(layer):
        weight, bias = layer.weight, layer.bias
        # the last question is the costliest, and asked where oneDNN is there and no graph is captured
        if (
            not _is_recorded(x, weight, bias)
            and suits_onednn(x, weight, bias, x.dtype)
            and (x.dtype is torch.float32 or _multiplies_bfloat16(x.dtype))
        ):
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return activation(layer(x))


def _multiplies_bfloat16(dtype) -> bool:
    return dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _whole(layers):
    """The tensor of which the weights are adjacent parts, or None if they are not, or someone listens to a layer."""
    if torch._C._are_functorch_transforms_active():
        return None
    rows, end = 0, None
    for layer in layers:
        # read past `nn.Module.__getattr__`: this runs for every token
        if type(layer) is not Linear or not layer.is_beside or not is_silent(layer):
            return None
        weight = layer._parameters.get("weight")
        if type(weight) not in _PLAIN or weight.dim() != 2:
            return None
        if end is None:
            first, stride, columns, end = weight, weight.stride(), weight.shape[1], weight.data_ptr()
            itemsize = weight.element_size()
        is_next = weight.data_ptr() == end and weight.dtype is first.dtype
        if not is_next or weight.stride() != stride or weight.shape[1] != columns:
            return None
        rows += weight.shape[0]
        end += weight.shape[0] * stride[0] * itemsize
    if stride not in ((columns, 1), (1, rows)) or not rows * columns:
        return None
    # parts that lie in a row by accident, in memory of their own, are not one tensor
    room = first.untyped_storage().nbytes() // itemsize - first.storage_offset()
    return first.as_strided((rows, columns), stride) if room >= rows * columns else None


def _is_recorded(x, weight, bias) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def is_silent(module) -> bool:
    """Whether nobody listens to the module, so that its forward may run at another time, twice, or not through it."""
    return "forward" not in module.__dict__ and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _has_any_global_hook()
    )


def is_plain(x, weight, dtype=torch.float32) -> bool:
    """Whether both are ordinary CPU tensors of `dtype`, and nothing captures, transforms or counts operations."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and x.dtype is weight.dtype is dtype
        and x.is_cpu
        and weight.is_cpu
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.layout is weight.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _len_torch_dispatch_stack()
        == 0  # counters of operations and the like know the operators that torch documents
    )


def suits_onednn(x, weight, bias=None, dtype=torch.float32) -> bool:
    """Whether oneDNN can multiply these, and the product is large enough; `linear` uses it for float32."""
    return (
        is_plain(x, weight, dtype)
        and x.numel() * weight.shape[0] >= _LEAST_PRODUCTS
        and (bias is None or (type(bias) in _PLAIN and bias.dtype is dtype and bias.shape == weight.shape[:1]))
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and _is_dense(weight)
        and torch._C._get_mkldnn_enabled()
        and torch._C._has_mkldnn
    )


def _is_dense(weight) -> bool:
    """Whether rows, or columns, follow each other without gaps: between others oneDNN takes a hundred times as long."""
    return weight.stride() in ((weight.shape[1], 1), (1, weight.shape[0]))


def _product(x, weight, bias=None):
    if x.numel() <= _MOST_COPIED or x.dim() != 2 or x.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    # of such an x, in training the gradient of the logits, oneDNN would copy the whole
    out = x.new_empty(x.shape[0], weight.shape[0])
    length = max(1, _MOST_COPIED // x.shape[1])
    for rows, out_rows in zip(x.split(length), out.split(length), strict=True):
        out_rows.copy_(_product(rows.contiguous(), weight, bias))
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
