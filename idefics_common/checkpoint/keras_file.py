"""`model.weights.h5`: what Keras's own `save_weights` writes and `load_weights` reads, in shards or not.

A path in the file follows attributes, classes and order of creation of the layers (`Parameter.h5_path`). In shards,
`model.weights.json` says which files hold the variables of each layer; the files are numbered from 0.

What the training of a compiled model adds (the state of the optimizer, of metrics and of random generators) is no part
of the model and left aside, by the names that Keras gives it.

Source: keras/src/saving/saving_lib.py (3.15), `H5IOStore` and `ShardedH5IOStore`.
"""

from pathlib import Path

from idefics_common.checkpoint.checkpoint import Checkpoint
from idefics_common.checkpoint.errors import CheckpointError
from idefics_common.checkpoint.hdf5_file import open_h5
from idefics_common.checkpoint.index import WeightMap, read_index
from idefics_common.parameters import MODEL, Parameter
from idefics_common.parameters.layouts import KERAS_LAYOUTS

FORMAT = "keras"
STEM, ENDING, INDEX_ENDING = "model", ".weights.h5", ".weights.json"
DIRECTORY_FILES = (f"{STEM}{ENDING}", f"{STEM}{INDEX_ENDING}")
"""Names looked for in a directory, best first."""
HUB_PATTERNS = (f"{STEM}*{ENDING}", f"{STEM}{INDEX_ENDING}")
"""Patterns of the files in a repository of the hub."""

_TRAINING_STATE = frozenset({"optimizer", "metrics", "loss", "seed_generator", "_metrics"})


def stored_name(parameter: Parameter, with_head: bool = True) -> str:
    """The path of a parameter in a file of the whole model, or of the model below its head."""
    return parameter.h5_path if with_head else parameter.h5_path.removeprefix(f"{MODEL.h5}/")


def stored_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter as Keras orders its axes."""
    return KERAS_LAYOUTS[parameter.kind].shape(parameter.shape)


def entry_of(name: str) -> str:
    """The entry of the index, a layer, under which a variable stands."""
    return f"/{name.rpartition('/')[0]}"


def open_keras_weights(path: Path) -> Checkpoint:
    """Open and check the file, or the shards of the index, at `path`. Raises CheckpointError."""
    return open_h5(path, FORMAT, ENDING, _tensor_name, _read_index, entry_of)


def _tensor_name(path: str, is_whole: bool) -> str | None:
    return None if _is_training_state(path) else path


def _read_index(path: Path) -> WeightMap:
    weight_map, _ = read_index(path, of_layers=True)
    weight_map = {layer: names for layer, names in weight_map.items() if not _is_training_state(layer)}
    if not weight_map:
        raise CheckpointError(path, "weight_map has nothing but the state of training")
    return weight_map


def _is_training_state(path: str) -> bool:
    return not _TRAINING_STATE.isdisjoint(path.split("/"))
