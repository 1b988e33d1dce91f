"""Checkpoints of random values at any size, written block by block: for benchmarks of files, not of models."""

import json
import os
from pathlib import Path

import numpy as np

from conversion.formats import format_of
from conversion.formats.base import Output
from idefics_common.checkpoint.sharding import split_into_shards
from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters import expand

_BLOCK = 2**22  # values made at a time


def write_random_checkpoint(directory: Path, config: dict, max_shard_size: int, seed: int = 0) -> int:
    """Write config.json and safetensors of float32 values, normal around 0 with 0.02; returns the bytes of tensors.

    Args:
        config: content of the config.json.
        max_shard_size: bytes of tensors per file.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    format = format_of("safetensors")
    outputs = [
        Output(parameter, format.stored_name(parameter), format.layout(parameter), np.dtype(np.float32))
        for parameter in expand(fields_from_dict(config))
        if parameter.tied_to is None
    ]
    shards = split_into_shards(outputs, max_shard_size)
    places = format.lay_out(directory, shards)
    generator = np.random.default_rng(seed)
    for output in outputs:
        with open(directory / places[output.name].file, "r+b") as file:
            file.seek(places[output.name].offset)
            for start in range(0, output.parameter.size, _BLOCK):
                count = min(_BLOCK, output.parameter.size - start)
                file.write((0.02 * generator.standard_normal(count, dtype=np.float32)).data)
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return sum(output.nbytes for output in outputs)
