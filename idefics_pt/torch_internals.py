"""The names of torch that it does not document, all that this package uses.

Unusual: a torch without one of them is no error. Where `is_complete` is then False, everything is computed by torch's
documented ways, as on other devices; int8, which has none, is refused.
"""

import torch
from torch import nn


def _find(owner, *path):
    for name in path:
        owner = getattr(owner, name, None)
    return owner


linear_pointwise = _find(torch, "ops", "mkldnn", "_linear_pointwise")
"""oneDNN's product with an activation: (x, weight, bias or None, activation, its numbers, its variant)."""

supports_bfloat16 = _find(torch, "ops", "mkldnn", "_is_mkldnn_bf16_supported")
"""Whether oneDNN multiplies bfloat16 on this processor."""

is_transformed = _find(torch, "_C", "_are_functorch_transforms_active")
"""Whether `torch.func` (vmap, grad, jvp, ...) looks on."""

has_global_hooks = _find(torch, "nn", "modules", "module", "_has_any_global_hook")
"""Whether a hook is registered on all modules at once."""

hooks_of_modules = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The attributes in which a module has the hooks that are registered on it."""

pack_int8 = _find(torch, "ops", "onednn", "qlinear_prepack")
"""An int8 weight in the layout of `multiply_int8`."""

multiply_int8 = _find(torch, "ops", "onednn", "qlinear_pointwise")
"""oneDNN's product of int8 matrices."""

mark_static_address = _find(torch, "_dynamo", "mark_static_address")
"""Tells `torch.compile` that a tensor stays where it is, so that CUDA graphs do not copy it."""

is_complete = None not in (linear_pointwise, supports_bfloat16, is_transformed, has_global_hooks) and all(
    name in nn.Module().__dict__ for name in hooks_of_modules
)
"""Whether `idefics_pt.cpu.onednn` and `idefics_pt.cpu.recomputed` have what they need."""


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; None where that is not counted, as in inference mode."""
    return None if tensor.is_inference() else getattr(tensor, "_version", None)
