"""Checks around loading: are the files whole, and are their tensors the model's, exactly?

Unusual: transformers loads and saves; here is only what it leaves open. Local files are checked before a byte is used,
from headers alone, so a truncated shard is an error that names it and not a half-loaded model.

`idefics_tf/weights.py` has the other half as well: there the room itself reads the files.
"""

import json
import os
from dataclasses import fields
from pathlib import Path

from idefics_common.checkpoint import CheckpointError, compare_names_and_shapes, open_checkpoint
from idefics_common.checkpoint.checkpoint import DIRECTORY_FILES
from idefics_common.checkpoint.distributed import whole_tensors
from idefics_common.checkpoint.files import distributed_files
from idefics_common.checkpoint.model_tensors import match_tensors
from idefics_common.checkpoint.quantization import check_quantization, declared_quantization
from idefics_common.configuration.fields import IdeficsFields, read_config
from idefics_common.parameters import MODEL

_NOT_PLAIN = ("gguf_file", "variant")
_FIELDS = {field.name for field in fields(IdeficsFields)}


def check_files(source, options: dict, with_head: bool | None) -> dict[str, tuple[int, ...]]:
    """Check the files of a local checkpoint directory; a hub id, or a file of another kind, is left to transformers.

    Args:
        source: what `from_pretrained` was given. options: its keyword arguments.
        with_head: whether the model has a language head; None to leave open whether the tensors are the model's.

    Returns:
        shapes of the tensors in the files, by name; empty if they were left to transformers.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault.
        ValueError: if the directory's configuration is not one of IDEFICS, or impossible, the message naming the file;
            or if `quantization_config` is given and the checkpoint is quantised in another way.
        FileNotFoundError: if it has none.
    """
    directory = Path(os.fspath(source), options.get("subfolder") or "")
    is_plain = not any(options.get(name) for name in _NOT_PLAIN) and not (directory / "adapter_config.json").exists()
    if not directory.is_dir() or not is_plain:
        return {}
    if pieces := distributed_files(directory):
        if also := [name for name in DIRECTORY_FILES if (directory / name).exists()]:
            problem = f"holds two checkpoints, {also[0]} and {pieces[0].name}: which is meant? Remove the files of one"
            raise CheckpointError(directory, problem)
        path, found = directory, whole_tensors(pieces)
        if with_head is False and any(name.startswith(f"{MODEL.name}.") for name in found):
            raise CheckpointError(
                path, "a distributed checkpoint of the model with its head; load that, and take `.model`"
            )
    else:
        with open_checkpoint(directory) as checkpoint:
            path, found = checkpoint.path, checkpoint.infos
    config = options.get("config")
    if config is None:
        # transformers takes the default configuration where there is none: nine billion parameters
        config, declared = read_config(directory), declared_quantization(directory)
    else:
        declared = _as_dict(getattr(config, "quantization_config", None))
    check_quantization(path, found, declared)
    if declared is not None:
        _check_request(directory, declared, options.get("quantization_config"))
    elif options.get("config") is None and with_head is not None and not _FIELDS & options.keys():
        match_tensors(path, found, config, with_head)
    return {name: info.shape for name, info in found.items()}


def _check_request(directory: Path, declared: dict, requested) -> None:
    """Refuse to quantise anew what is quantised: transformers would drop the wish with a warning."""
    if requested is None or hasattr(requested, "get_loading_attributes"):  # those change how layers are run
        return
    requested = _as_dict(requested)
    shared = sorted(name for name in declared.keys() & requested.keys() if not name.startswith("_"))
    different = [name for name in shared if declared[name] != requested[name]]
    if different or not shared:
        wishes = ", ".join(f"{name}={requested[name]!r} for {declared[name]!r}" for name in different)
        raise ValueError(
            f"{directory} is quantised already, and quantization_config asks for something else: {wishes}. Leave it "
            "out to load the checkpoint as it is, or give it with the original checkpoint."
        )


def _as_dict(quantization) -> dict | None:
    """A quantisation configuration as config.json has it."""
    values = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    return None if values is None else json.loads(json.dumps(values, default=str))


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
