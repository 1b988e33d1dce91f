"""Checks around loading: are the files whole, and are their tensors the model's, exactly?

Unusual: transformers loads and saves; here is only what it leaves open. Local files are checked before a byte is used,
from headers alone, so a truncated shard is an error that names it and not a half-loaded model.

`idefics_tf/weights.py` has the other half as well: there the room itself reads the files.
"""

import os
from pathlib import Path

from idefics_common.checkpoint import compare_names_and_shapes, open_checkpoint

_NOT_PLAIN = ("gguf_file", "quantization_config", "variant")


def check_files(source, options: dict) -> dict[str, tuple[int, ...]]:
    """Check the files of a local checkpoint directory; a hub id, or a file of another kind, is left to transformers.

    Args:
        source: what `from_pretrained` was given. options: its keyword arguments.

    Returns:
        shapes of the tensors in the files, by name; empty if they were left to transformers.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
    """
    directory = Path(os.fspath(source), options.get("subfolder") or "")
    if not directory.is_dir() or any(options.get(name) for name in _NOT_PLAIN):
        return {}
    with open_checkpoint(directory) as checkpoint:
        return {name: info.shape for name, info in checkpoint.infos.items()}


def check_loading_info(model, info: dict, source, found_shapes: dict, forgive_mismatched: bool) -> None:
    """Refuse a model whose checkpoint did not hold exactly its tensors.

    Args:
        model: the loaded model. info: transformers' loading report. source: what `from_pretrained` was given.
        found_shapes: what `check_files` returned.
        forgive_mismatched: let tensors of another shape pass; they are freshly initialised then.

    Raises:
        CheckpointError: listing missing, unexpected and mismatched tensors with their shapes.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: shape for name, shape in expected.items() if name not in info["missing_keys"]}
    if not forgive_mismatched:
        found |= {name: tuple(shape) for name, shape, _ in info["mismatched_keys"]}
    found |= {name: found_shapes.get(name, ()) for name in sorted(info["unexpected_keys"])}
    compare_names_and_shapes(found, expected).raise_if_bad(source)
