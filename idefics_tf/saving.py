"""Writing a model's directory: its configurations, and safetensors in canonical names and PyTorch's layout, sharded if
large.

Unusual: a directory that does not exist yet appears whole or not at all; into one that does (it may hold the files of
the processor) each file goes when it is complete, and files of an earlier model, which might be read instead, are
removed last.

Keras alone has this file; in `idefics_pt` transformers does it.
"""

import copy
import os
import re
import shutil
from pathlib import Path

import numpy as np

from idefics_common.checkpoint.checkpoint import DIRECTORY_FILES
from idefics_common.checkpoint.index import write_index
from idefics_common.checkpoint.model_tensors import canonical_name
from idefics_common.checkpoint.safetensors_writer import TensorToWrite, write_safetensors
from idefics_common.checkpoint.sharding import parse_size, shard_names, split_into_shards
from idefics_tf.layers import adapted_sublayers
from idefics_tf.weights import weights_by_name

_INDEX = DIRECTORY_FILES[1]


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
    adapted = adapted_sublayers(model)
    if adapted:
        raise ValueError(
            f"save_pretrained writes no LoRA adapters, which {next(iter(adapted))} has: call "
            "idefics_tf.lora.save_adapters, or merge_adapters first."
        )
    tensors = _tensors(model)
    shards = split_into_shards(tensors, limit, lambda name: tensors[name].nbytes)
    weight_map = {}
    for file_name, shard in zip(shard_names("model", ".safetensors", len(shards)), shards, strict=True):
        write_safetensors(directory / file_name, {name: tensors[name] for name in shard})
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        write_index(directory / _INDEX, weight_map, sum(tensor.nbytes for tensor in tensors.values()))


def _tensors(model) -> dict[str, TensorToWrite]:
    return {
        canonical_name(weight.parameter, model.has_head): TensorToWrite(
            np.dtype(weight.variable.dtype),
            weight.parameter.shape,
            lambda weight=weight: weight.layout.inverse(weight.variable.numpy()),
        )
        for weight in weights_by_name(model).values()
    }


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
        is_ours = stale.name == _INDEX or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", stale.name)
        if is_ours and stale.name not in written:
            stale.unlink()
