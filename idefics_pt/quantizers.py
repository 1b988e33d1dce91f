"""What quantisers of other people do to a model: found, put right where it can be, and refused where not.

Unusual: nothing here needs one of them. Such a tool puts layers or tensors of its own in the place of linear layers;
what it did shows in the state of a module.

Mirrored by nothing in `idefics_tf`. Axes: see `idefics_common`.
"""

import copy

import torch

from idefics_common.checkpoint import CheckpointError


def quantized_tensors(state: dict) -> list[str]:
    """The names in a state of what is no plain tensor of numbers: bytes, packed weights, tensor classes of tools."""
    return [name for name, value in state.items() if not _is_plain(value)]


def _is_plain(value) -> bool:
    is_torchs = isinstance(value, torch.Tensor) and type(value).__module__.partition(".")[0] == "torch"
    return is_torchs and (value.dtype.itemsize > 1 or value.dtype is torch.bool)


def refuse_quantized(state: dict, what_to_do: str) -> None:
    """Raise `ValueError`, naming a tensor and `what_to_do`, if a quantiser was at work."""
    names = quantized_tensors(state)
    if names:
        more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        raise ValueError(f"{names[0]}{more} quantised by another tool: {what_to_do}")


def whole_vocabulary(head, hidden_BTD, logits_BTV, config):
    """Logits of the base and the additional vocabulary, also where a tool's own layer took the language head's place.

    Such a layer knows the base matrix. The additional one is below it still, unless the tool dropped it.

    Args:
        head: the language head. hidden_BTD: its input. logits_BTV: its output.

    Raises:
        ValueError: if the additional vocabulary is lost.
    """
    if config.additional_vocab_size == 0 or logits_BTV.shape[-1] != config.base_vocab_size:
        return logits_BTV
    additional_fc = getattr(head, "additional_fc", None)
    if additional_fc is None:
        raise ValueError(
            f"lm_head is a {type(head).__name__} with {config.vocab_size} outputs, the base vocabulary alone: the "
            f"{config.additional_vocab_size} of the additional vocabulary (additional_fc) are lost. Leave lm_head out "
            "when layers are quantised or replaced."
        )
    return torch.cat((logits_BTV, additional_fc(hidden_BTD)), dim=-1)


def check_loaded_layers(model, source) -> None:
    """Refuse a model in which a layer and its weight do not fit: one quantised, and not the other.

    Raises:
        CheckpointError: naming the tensor and its dtype.
    """
    for name, module in model.named_modules():
        weight, package = getattr(module, "weight", None), type(module).__module__.partition(".")[0]
        if not isinstance(weight, torch.Tensor):
            continue
        has_scale = any(getattr(weight, scale, None) is not None for scale in ("quant_state", "SCB"))
        if package == "bitsandbytes" and not has_scale:
            problem = "has no scale, and config.json does not except its layer from quantisation"
        elif package in ("torch", "idefics_pt") and not weight.is_floating_point():
            problem = "is not floating point, and config.json does not say that its layer is quantised"
        else:
            continue
        dtype = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(source, f"{dtype}, {problem}. Restore the config.json saved with it.", f"{name}.weight")


def mend_four_bits(model) -> None:
    """Keep bitsandbytes' 4-bit layers from two faults on the CPU that give no error (0.50.2).

    On processors with AVX512-BF16 the first inference call rearranges a weight for a faster kernel. Afterwards
    gradients do not pass, `dequantize` and merged adapters read scrambled weights, and saving loses scales. That is
    turned off.

    Raises:
        ValueError: for layers whose scales it confuses, as it does where blocks go across rows.
    """
    confused = [name for name, module in model.named_modules() if _is_confused(getattr(module, "weight", None))]
    if confused:
        raise ValueError(
            "On the CPU, bitsandbytes takes the wrong scales for weights whose rows are no multiple of its blocks of "
            f"64: {', '.join(confused)}. Name these layers in llm_int8_skip_modules."
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_confused(weight) -> bool:
    """Whether a 4-bit weight is another one when it is read as a single row, in which all blocks follow each other."""
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return False
    from bitsandbytes.functional import dequantize_4bit

    as_one_row = copy.copy(state)
    as_one_row.shape = torch.Size([1, state.shape.numel()])
    return not torch.equal(dequantize_4bit(weight, state).flatten(), dequantize_4bit(weight, as_one_row).flatten())
