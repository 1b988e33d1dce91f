"""Checkpoints that several processes wrote together, each its own pieces of the tensors.

This is what ``save_pretrained(..., distributed_checkpoint=True)`` of the PyTorch room leaves: safetensors files whose
metadata say where in its tensor each piece begins. Only descriptions are read here; PyTorch puts the pieces together.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from idefics_common.checkpoint.errors import CheckpointError
from idefics_common.checkpoint.safetensors_file import SafetensorsFile
from idefics_common.checkpoint.tensor_source import TensorInfo

_PLACES = "DCP_SHARDING_INFO"


def whole_tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """What the tensors would be that these files hold in pieces, by name; the place in a file is that of one piece.

    Raises CheckpointError for a file that is damaged, and where the pieces of a tensor do not make up a whole.
    """
    wholes, present = {}, {}
    for path in files:
        with SafetensorsFile(path) as file:
            places = _places(file)
            for name, info in file.infos.items():
                end = tuple(begin + size for begin, size in zip(places[name], info.shape, strict=True))
                shape = tuple(map(max, wholes[name].shape, end)) if name in wholes else end
                wholes[name] = replace(info, shape=shape, nbytes=math.prod(shape) * info.dtype.itemsize)
                present[name] = present.get(name, 0) + info.nbytes
    for name, info in wholes.items():
        if present[name] != info.nbytes:
            problem = (
                f"its pieces hold {present[name]} of {info.nbytes} bytes: files are missing, or left from another save"
            )
            raise CheckpointError(info.file.parent, problem, name)
    return wholes


def _places(file: SafetensorsFile) -> dict[str, list[int]]:
    """Where in its tensor each piece of a file begins."""
    try:
        places = {name: place["saved_offsets"] for name, place in json.loads(file.metadata[_PLACES]).items()}
        if all(len(places[name]) == len(info.shape) for name, info in file.infos.items()):
            return places
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise CheckpointError(file.path, f"its metadata do not say where in its tensor each piece begins ({_PLACES})")
