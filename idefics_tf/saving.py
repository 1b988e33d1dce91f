"""Writing a model's directory: its configurations, and safetensors in canonical names and PyTorch's layout, sharded if
large.

Unusual: a directory that does not exist yet appears whole or not at all; into one that does (it may hold the files of
the processor) each file goes when it is complete, and files of an earlier model, which might be read instead, are
removed last.

Keras alone has this file; in `idefics_pt` transformers does it.
"""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from idefics_common.checkpoint.safetensors_writer import TensorToWrite, write_safetensors
from idefics_common.parameters import MODEL
from idefics_tf.quantization import linear_layers
from idefics_tf.weights import weights_by_name

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"`` or ``"200MiB"``. Raises `ValueError` for anything else."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)", size.strip().upper())
    if match is None:
        raise ValueError(f"max_shard_size must be a number of bytes or a string such as '5GB', got {size!r}.")
    return int(match[1]) * _UNITS[match[2]]


def save_model(model, directory: str | os.PathLike, max_shard_size: int | str) -> None:
    """Write a model; see `TFIdeficsPreTrainedModel.save_pretrained`."""
    directory = Path(directory)
    limit = parse_size(max_shard_size)
    staging = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        _write_weights(model, staging, limit)
        _write_config(model, staging)
        _move_into_place(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(model, directory: Path, limit: int) -> None:
    if model.is_quantized:
        raise ValueError("save_pretrained writes no quantized weights: call it before quantizing, or use save_weights.")
    if any(layer.lora_enabled for layer in linear_layers(model)):
        raise ValueError(
            "save_pretrained writes no LoRA adapters: call idefics_tf.lora.save_adapters, or merge_adapters first."
        )
    shards = _plan(_tensors(model), limit)
    if len(shards) == 1:
        write_safetensors(directory / _SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file_name, shard)
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(model) -> dict[str, TensorToWrite]:
    prefix = "" if model.has_head else f"{MODEL.name}."
    return {
        name.removeprefix(prefix): TensorToWrite(
            np.dtype(weight.variable.dtype),
            weight.parameter.shape,
            lambda weight=weight: weight.layout.inverse(weight.variable.numpy()),
        )
        for name, weight in weights_by_name(model).items()
    }


def _plan(tensors: dict[str, TensorToWrite], limit: int) -> list[dict[str, TensorToWrite]]:
    """Consecutive tensors together up to `limit` bytes; a larger one has a file of its own."""
    shards, used = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def _write_config(model, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("TF")]
    config.dtype = model.dtype_policy.variable_dtype
    config.save_pretrained(directory)
    if model.has_head:
        model.generation_config.save_pretrained(directory)


def _move_into_place(staging: Path, directory: Path) -> None:
    if not directory.exists():
        os.rename(staging, directory)
        return
    written = sorted(path.name for path in staging.iterdir())
    # shards before the index that names them
    for name in sorted(written, key=lambda name: (name == _INDEX, name)):
        os.replace(staging / name, directory / name)
    for stale in directory.glob("model*.safetensors*"):
        is_ours = stale.name in (_SINGLE, _INDEX) or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", stale.name)
        if is_ours and stale.name not in written:
            stale.unlink()
