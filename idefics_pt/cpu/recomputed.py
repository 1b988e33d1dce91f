"""What is cheaper to compute again in the backward pass than to keep: RMS norms, and what enters `down_proj`.

PyTorch keeps every tensor that some derivative needs. The results of elementwise operations are a third of what a
decoder layer keeps, and cost next to nothing to make again. The functions here keep instead what those are made of, for
plain float32 tensors on the CPU outside of graphs that are captured (`idefics_pt.cpu.onednn.is_plain`); everywhere else
they are the ordinary operations. Values are the same in both cases.

Axes: see `idefics_common`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from idefics_pt.cpu.onednn import has_no_hooks, is_plain, linear, project, suits_onednn


def rms_norm(x, weight, eps: float):
    """RMS norm over the last axis, computed in float32; differentiable, any number of times.

    Args:
        x: (..., width). weight: (width,). eps: added to the mean of squares.

    Returns:
        (..., width), in the precision of the weight.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and is_plain(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return _rms_norm(x, weight, eps)


def project_gated(layer, activation, gate, up):
    """``layer(activation(gate) * up)``, where what enters the layer is not kept for the backward pass.

    Args:
        layer: called as ever unless it is an `nn.Linear` without bias and hooks.
        activation: runs again in the backward pass unless it has parameters, which would get no gradients, or hooks.
        gate, up: (..., columns of the layer's weight).

    Returns:
        (..., rows of the layer's weight).
    """
    if (
        torch.is_grad_enabled()
        and type(layer) is nn.Linear
        and layer.bias is None
        and has_no_hooks(layer)
        and has_no_hooks(activation)
        and next(activation.parameters(), None) is None
        and suits_onednn(gate, layer.weight)
        and is_plain(up, layer.weight)
        and (layer.weight.requires_grad or gate.requires_grad or up.requires_grad)
    ):
        return _GatedLinear.apply(activation, layer.weight, gate, up)
    return project(layer, activation(gate) * up)


def _rms_norm(x, weight, eps):
    x = x.float()
    if x.is_cpu:
        # for the CPU torch puts its norm together from two dozen operations, of which this spares nine
        squares = x.square().sum(-1, keepdim=True)
        normed = torch.rsub(squares, eps, alpha=-1 / x.shape[-1]).rsqrt() * x
    else:
        normed = F.rms_norm(x, weight.shape, eps=eps)
    # the product with the weight happens in the weight's precision, as when the checkpoints were trained
    return weight * normed.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x, which the residual stream mostly keeps anyway, instead of two more tensors of its size."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        normed = x * inverse
        gradient_x = None
        if needs_x:
            scaled = gradient * weight
            gradient_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
        gradient_weight = (gradient * normed).reshape(-1, len(weight)).sum(0) if needs_weight else None
        return gradient_x, gradient_weight, None


class _GatedLinear(torch.autograd.Function):
    """A product whose factor is made of what is kept."""

    @staticmethod
    def forward(ctx, activation, weight, gate, up):
        ctx.activation = activation
        ctx.save_for_backward(weight, gate, up)
        return linear(activation(gate) * up, weight)

    @staticmethod
    def backward(ctx, gradient):
        weight, gate, up = ctx.saved_tensors
        _, needs_weight, *needs = ctx.needs_input_grad
        with torch.enable_grad():
            # views, since hooks on the tensors themselves are for the outer backward pass alone
            sources = [gate.view_as(gate), up.view_as(up)]
            x = ctx.activation(sources[0]) * sources[1]
        rows = gradient.reshape(-1, len(weight))
        gradients = [None, None]
        if any(needs):
            gradient_x = linear(rows, weight.t()).view_as(x)
            wanted = [source for source, need in zip(sources, needs, strict=True) if need]
            found = iter(torch.autograd.grad(x, wanted, gradient_x, create_graph=torch.is_grad_enabled()))
            gradients = [next(found) if need else None for need in needs]
        gradient_weight = linear(rows.t(), x.reshape(-1, weight.shape[1]).t()) if needs_weight else None
        return None, gradient_weight, *gradients
