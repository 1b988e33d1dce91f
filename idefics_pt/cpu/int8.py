"""int8 for inference on the CPU: weights in int8 with a scale per output, activations in int8 with a scale per row.

Unusual: float32 activations with int8 weights would be slower than no quantisation, since each weight would have to be
turned back; so activations are quantised too, on the fly, and oneDNN multiplies int8 by int8. The decoder layers, the
gated blocks and the head over the base vocabulary are quantised: what decoding reads for every token. Vision tower,
resampler, embeddings, norms, gates and the small head over the additional vocabulary stay as they are.

In `idefics_tf`, `quantization.py` does it with Keras's kernels. Axes: see `idefics_common`.
"""

import torch
from torch import nn

from idefics_pt import torch_internals
from idefics_pt.cpu.onednn import project
from idefics_pt.layers import DecoupledLinear
from idefics_pt.quantizers import refuse_quantized

_ZERO = 128  # activations are uint8 to the kernel; this one stands for 0
_TINY = torch.finfo(torch.float32).tiny  # a scale for what is all zeros


class Int8Linear(nn.Module):
    """A linear layer without gradients whose weight is int8.

    Args:
        weight: (rows, columns), any float type. bias: (rows,) or None.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float().contiguous()  # the packing does not look at strides
        self.scales = (weight.abs().amax(dim=1) / 127).clamp(min=_TINY)
        self.zero_points = torch.zeros(self.out_features, dtype=torch.int32)
        rounded = (weight / self.scales.unsqueeze(1)).round()
        self.sums = rounded.sum(dim=1) * self.scales
        self.packed = torch_internals.pack_int8(rounded.to(torch.int8), None)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x):
        """(..., columns) to (..., rows), in the precision of x.

        Raises:
            RuntimeError: if x is not on the CPU, or gradients are wanted.
        """
        if x.device.type != "cpu":
            raise RuntimeError(f"The model was quantised to int8 for the CPU; got inputs on {x.device}.")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("A model quantised to int8 has no gradients; load it again to train it.")
        rows = x.detach().float().flatten(0, -2)
        # the kernel knows one scale and one zero for all rows; each row gets its own around it, since the product is
        # linear: W x = scale * W q + centre * (the sums of W)
        lowest, highest = torch.aminmax(rows, dim=-1, keepdim=True)
        centres, scales = (lowest + highest) / 2, ((highest - lowest) / 254).clamp_(min=_TINY)
        rounded = ((rows - centres) / scales).round_().add_(_ZERO).to(torch.uint8)
        out = torch_internals.multiply_int8(
            rounded, 1.0, _ZERO, self.packed, self.scales, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out = torch.addcmul(out * scales, centres, self.sums)
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def __deepcopy__(self, memo):
        return self  # nothing in it ever changes, and packed weights cannot be copied

    def __getstate__(self):
        return {**self.__dict__, "packed": self.packed.to_dense()}  # as pickle can have it

    def __setstate__(self, state):
        super().__setstate__(state)
        self.packed = torch_internals.pack_int8(self.packed.t().contiguous(), None)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, int8"


class Int8DecoupledLinear(nn.Module):
    """`DecoupledLinear` whose base matrix is int8."""

    def __init__(self, head: DecoupledLinear):
        super().__init__()
        head.split()
        self.base = Int8Linear(head.weight)
        self.additional_fc = head.additional_fc

    def forward(self, hidden_BTD):
        logits_BTV = self.base(hidden_BTD)
        if self.additional_fc is None:
            return logits_BTV
        return torch.cat((logits_BTV, project(self.additional_fc, hidden_BTD)), dim=-1)


def quantize_int8(model):
    """Replace the linear layers that decoding reads, in place; see `IdeficsPreTrainedModel.quantize_int8`."""
    if is_quantized(model):
        raise ValueError("The model is quantised already.")
    if None in (torch_internals.pack_int8, torch_internals.multiply_int8):
        raise ValueError(f"torch {torch.__version__} has no int8 kernels of oneDNN that are known here.")
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError(f"int8 kernels are oneDNN's, for the CPU; the model is on {model.device}.")
    if not _kernels_are_exact():
        raise ValueError(
            "int8 would be wrong here: this processor adds products of int8 in 16 bits, which overflow (it lacks VNNI)."
        )
    base, head = model.base_model, getattr(model, "lm_head", None)
    parts = [base.layers, base.gated_cross_attn_layers]
    adapted = [name for part in [*parts, head] if part is not None for name, _ in _adapters(part)]
    if adapted:
        raise ValueError(f"{', '.join(sorted(set(adapted)))} has an adapter; merge adapters before quantising.")
    refuse_quantized(model.state_dict(), "load the original checkpoint for quantize_int8().")
    model.unfuse_projections()
    for part in parts:
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child.weight, child.bias))
    if isinstance(head, DecoupledLinear):
        model.lm_head = Int8DecoupledLinear(head)
    model.requires_grad_(False)


def _adapters(part):
    """Layers that wrap another one, as PEFT's do, by their own name."""
    modules = [("lm_head", part), *part.named_modules()]
    return [(name.rpartition(".")[2], module) for name, module in modules if hasattr(module, "base_layer")]


def _kernels_are_exact() -> bool:
    """Whether products of the largest numbers add up: they saturate where the processor adds in 16 bits."""
    extreme = torch.full((1, 256), 100.0)
    extreme[:, 0] = -100.0
    return abs(Int8Linear(torch.ones(1, 256))(extreme).item() - extreme.sum().item()) < 1000.0


def is_quantized(model) -> bool:
    """Whether `quantize_int8` was applied."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
