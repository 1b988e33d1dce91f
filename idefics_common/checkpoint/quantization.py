"""Is a checkpoint quantised, by which tool, and does its config.json say so?

Unusual: a file does not name its tool, but each tool stores scales of its own beside the weights, under names that give
it away. Where neither those nor integers are found, all is floating point.
"""

import json
import os
from collections.abc import Mapping

import numpy as np

from idefics_common.checkpoint.errors import CheckpointError, quote
from idefics_common.checkpoint.tensor_source import FLOAT_DTYPES, TensorInfo

_SIGNS = {
    "bitsandbytes in 4 bits": (".absmax", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
    "bitsandbytes in 8 bits": (".SCB", ".weight_format"),
    "torchao": ("._weight_qdata", "._weight_scale", "._weight_zero_point"),
    "quanto": ("._data", "._scale", "._shift"),
    "hqq": (".W_q",),
}
_UNKNOWN = "a tool that is not known here"
_INDICES = np.dtype(np.int64)  # of stale buffers

_WAY_OUT = (
    "Load the original checkpoint. What bitsandbytes made can also be turned back in PyTorch: "
    "IdeficsForVisionText2Text.from_pretrained(...).dequantize().save_pretrained(...)."
)


def declared_quantization(directory: str | os.PathLike) -> dict | None:
    """What the config.json in a directory says of quantisation; None if nothing, or if it cannot be read."""
    try:
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
            return json.load(file).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def check_quantization(path, found: Mapping[str, TensorInfo], declared: Mapping | None) -> None:
    """Refuse a checkpoint whose tensors are not quantised as its configuration says.

    Args:
        path: of the checkpoint, for the error. found: its tensors. declared: see `declared_quantization`.

    Raises:
        CheckpointError: naming a tensor, its dtype and what to do.
    """
    if declared is not None and not isinstance(declared, Mapping):
        raise CheckpointError(path, f"quantization_config in config.json must be an object, got {quote(declared)}")
    tensor, stored = _stored(found)
    claimed = None if declared is None else _claimed(declared)
    if stored is not None and claimed is None:
        writer = "" if stored == _UNKNOWN else f", as {stored} writes it"
        problem = (
            f"is {found[tensor].dtype}{writer}; expected floating point, since config.json declares no "
            f"quantization_config. {_WAY_OUT} To load it in PyTorch as it is, restore the config.json saved with it."
        )
        raise CheckpointError(path, problem, tensor)
    if claimed is not None and stored is None:
        raise CheckpointError(
            path,
            f"config.json says quantised by {claimed}, but all tensors are floating point. If these are the original "
            "weights, remove quantization_config from config.json, and give it to from_pretrained to quantise them.",
        )
    if stored != claimed and (claimed in _SIGNS or stored in _SIGNS):
        problem = f"was written by {stored}, and config.json says {claimed}: restore the config.json saved with it."
        raise CheckpointError(path, problem, tensor)
    for name, info in found.items():
        scale = _scale_of(name, stored)
        if scale is not None and _is_integer(info) and scale not in found:
            problem = f"is {info.dtype} and has no scale {quote(scale)}: expected floating point, or both. {_WAY_OUT}"
            raise CheckpointError(path, problem, name)


def refuse_quantized(path, found: Mapping[str, TensorInfo], declared: Mapping | None) -> None:
    """Refuse a quantised checkpoint, for readers of floating point alone; see `check_quantization`."""
    check_quantization(path, found, declared)
    if declared is not None:
        tensor, stored = _stored(found)
        problem = f"is {found[tensor].dtype}, quantised by {stored}: expected floating point. {_WAY_OUT}"
        raise CheckpointError(path, problem, tensor)


def _stored(found: Mapping[str, TensorInfo]) -> tuple[str | None, str | None]:
    """The first tensor of integers, and who wrote it; None twice where all is floating point."""
    tools = (tool for tool, signs in _SIGNS.items() if any(name.endswith(signs) for name in found))
    integers = (name for name, info in found.items() if _is_integer(info))
    tensor = next(integers, None)
    return tensor, None if tensor is None else next(tools, _UNKNOWN)


def _claimed(declared: Mapping) -> str:
    """The tool that a configuration names, as `_SIGNS` does where it is there."""
    tool = declared.get("quant_method") or "bitsandbytes"
    if tool == "bitsandbytes":
        return f"bitsandbytes in {4 if declared.get('load_in_4bit') else 8} bits"
    return str(tool)


def _scale_of(name: str, tool: str | None) -> str | None:
    """Where the scale of a weight that bitsandbytes quantised is; None for names and tools that are not those."""
    if tool not in ("bitsandbytes in 4 bits", "bitsandbytes in 8 bits") or name.endswith(_SIGNS[tool]):
        return None
    return f"{name}.absmax" if "4" in tool else f"{name.rpartition('.')[0]}.SCB"


def _is_integer(info: TensorInfo) -> bool:
    return info.dtype not in FLOAT_DTYPES and info.dtype != _INDICES
