"""int8 for inference on the CPU: weights in int8 with a scale per output, activations in int8 with a scale per call.

Unusual: float32 activations with int8 weights would be slower than no quantisation, since each weight would have to be
turned back; so activations are quantised too, on the fly, and oneDNN multiplies int8 by int8. The decoder layers, the
gated blocks and the head over the base vocabulary are quantised: what decoding reads for every token. Vision tower,
resampler, embeddings, norms, gates and the small head over the additional vocabulary stay as they are.

In `idefics_tf`, `quantization.py` does it with Keras's kernels. Axes: see `idefics_common`.
"""

import torch
from torch import nn

from idefics_pt.layers import DecoupledLinear

_TINY = torch.finfo(torch.float32).tiny  # a scale for what is all zeros


class Int8Linear(nn.Module):
    """A linear layer without gradients whose weight is int8.

    Args:
        weight: (rows, columns), any float type. bias: (rows,) or None.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().float()
        self.scales = (weight.abs().amax(dim=1) / 127).clamp(min=_TINY)
        self.zero_points = torch.zeros(self.out_features, dtype=torch.int32)
        rounded = (weight / self.scales.unsqueeze(1)).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
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
        # 0.0 has to lie on the grid of 256 values, and the grid between the extremes
        lowest, highest = (extreme.item() for extreme in torch.aminmax(rows))
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
        scale = max((highest - lowest) / 255, _TINY)
        zero_point = round(-lowest / scale)
        rounded = (rows * (1 / scale)).round_().add_(zero_point).clamp_(0, 255).to(torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise(
            rounded,
            scale,
            zero_point,
            self.packed,
            self.scales,
            self.zero_points,
            self.bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out.unflatten(0, x.shape[:-1]).to(x.dtype)

    def __deepcopy__(self, memo):
        return self  # nothing in it ever changes, and packed weights cannot be copied

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, int8"


class Int8DecoupledLinear(nn.Module):
    """`DecoupledLinear` whose base matrix is int8."""

    def __init__(self, head: DecoupledLinear):
        super().__init__()
        self.base = Int8Linear(head.weight)
        self.additional_fc = head.additional_fc

    def forward(self, hidden_BTD):
        logits_BTV = self.base(hidden_BTD)
        if self.additional_fc is None:
            return logits_BTV
        return torch.cat((logits_BTV, self.additional_fc(hidden_BTD)), dim=-1)


def quantize_int8(model):
    """Replace the linear layers that decoding reads, in place; see `IdeficsPreTrainedModel.quantize_int8`."""
    if is_quantized(model):
        raise ValueError("The model is quantised already.")
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError(f"int8 kernels are oneDNN's, for the CPU; the model is on {model.device}.")
    base = model.base_model
    for part in (base.layers, base.gated_cross_attn_layers):
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child.weight, child.bias))
                elif hasattr(child, "base_layer"):
                    raise ValueError(f"{name} has an adapter; merge adapters before quantising.")
    if isinstance(getattr(model, "lm_head", None), DecoupledLinear):
        model.lm_head = Int8DecoupledLinear(model.lm_head)
    model.requires_grad_(False)


def is_quantized(model) -> bool:
    """Whether `quantize_int8` was applied."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
