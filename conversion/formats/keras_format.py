"""`model.weights.h5`: what Keras's own `save_weights` writes and `load_weights` reads, in shards or not.

A path in the file follows attributes, classes and order of creation of the layers (`Parameter.h5_path`). In shards,
`model.weights.json` says which files hold the variables of each layer; the files are numbered from 0.

What the training of a compiled model adds (the state of the optimizer, of metrics and of random generators) is no part
of the model and left aside, by the names that Keras gives it.

Source: keras/src/saving/saving_lib.py (3.15), `H5IOStore` and `ShardedH5IOStore`.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from conversion.formats.base import Output, Place
from conversion.formats.hdf5_checkpoint import H5Checkpoint, close_all
from conversion.formats.hdf5_reader import H5File
from conversion.formats.hdf5_writer import lay_out_h5
from idefics_common.checkpoint import CheckpointError
from idefics_common.checkpoint.errors import quote
from idefics_common.checkpoint.index import check_shard_name, read_index_object, refuse_outside
from idefics_common.layouts import KERAS_LAYOUTS, Layout
from idefics_common.parameters import Parameter

_SINGLE = "model.weights.h5"
_INDEX = "model.weights.json"
_TRAINING_STATE = frozenset({"optimizer", "metrics", "loss", "seed_generator", "_metrics"})


class KerasFormat:
    """See `conversion.formats.base.Format`."""

    name = "keras"
    directory_files = (_SINGLE, _INDEX)
    stores_tied = False

    def stored_name(self, parameter: Parameter) -> str:
        return parameter.h5_path

    def layout(self, parameter: Parameter) -> Layout:
        return KERAS_LAYOUTS[parameter.kind]

    def recognises(self, file_name: str) -> bool:
        return file_name.endswith((".weights.h5", ".weights.json"))

    def open(self, path: Path) -> H5Checkpoint:
        if path.suffix == ".json":
            return _open_sharded(path)
        return H5Checkpoint(path, [H5File(path, self.name, _variable_name)])

    def file_names(self, count: int) -> list[str]:
        return [_SINGLE] if count == 1 else [f"model_{number:05d}.weights.h5" for number in range(count)]

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        return []

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        files_of_layer: dict[str, list[str]] = defaultdict(list)
        for file_name, shard in zip(self.file_names(len(shards)), shards, strict=True):
            with lay_out_h5(directory / file_name) as file:
                for output in shard:
                    offset = file.add_dataset(output.name, output.shape, output.dtype)
                    places[output.name] = Place(file_name, offset)
                    layer = output.name.rpartition("/")[0]
                    file.set_attributes(layer, {"name": output.parameter.keras_path.split("/")[-2]})
                    if file_name not in files_of_layer[f"/{layer}"]:
                        files_of_layer[f"/{layer}"].append(file_name)
        if len(shards) > 1:
            total = sum(output.nbytes for shard in shards for output in shard)
            weight_map = {layer: names if len(names) > 1 else names[0] for layer, names in files_of_layer.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / _INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")
        return places

    def finish(
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        """Nothing: no byte outside the values depends on them."""


def _variable_name(path: str) -> str | None:
    """A variable is named by its path; what belongs to training has no name."""
    return path if _TRAINING_STATE.isdisjoint(path.split("/")) else None


def _open_sharded(index_path: Path) -> H5Checkpoint:
    weight_map = read_index_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index_path, f"weight_map must map layers to shard names, got {quote(weight_map)}")
    files_of_layer = {layer: _shard_names(index_path, layer, names) for layer, names in weight_map.items()}
    shards: list[H5File] = []
    try:
        for file_name in sorted({name for names in files_of_layer.values() for name in names}):
            check_shard_name(index_path, file_name, ".weights.h5")
            if not os.path.lexists(index_path.parent / file_name):
                raise CheckpointError(index_path, f"shard {file_name} is missing")
            shards.append(H5File(refuse_outside(index_path.parent, file_name), "keras", _variable_name))
        _compare_with_index(index_path, files_of_layer, shards)
        return H5Checkpoint(index_path, shards)
    except BaseException:
        close_all(shards)
        raise


def _shard_names(index_path: Path, layer: str, names: object) -> list[str]:
    """The files that hold variables of a layer; Keras writes one name, or a list of several."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(index_path, f"expected the names of shards, got {quote(names)}", layer)
    return names


def _compare_with_index(index_path: Path, files_of_layer: Mapping[str, list[str]], shards: Sequence[H5File]) -> None:
    """Every variable lies in a shard that the index names for its layer, and in one only; or CheckpointError."""
    found: dict[str, Path] = {}
    found_layers = set()
    for shard in shards:
        for name in shard:
            layer = f"/{name.rpartition('/')[0]}"
            found_layers.add((layer, shard.path.name))
            if shard.path.name not in files_of_layer.get(layer, ()):
                raise CheckpointError(
                    shard.path, f"is in this shard, where {index_path.name} does not look for it", name
                )
            if name in found:
                raise CheckpointError(shard.path, f"is also in {found[name].name}", name)
            found[name] = shard.path
    for layer, names in files_of_layer.items():
        for file_name in names:
            is_state = not _TRAINING_STATE.isdisjoint(layer.split("/"))
            if (layer, file_name) not in found_layers and not is_state:
                raise CheckpointError(index_path, f"nothing of it is in {file_name}, where the index puts it", layer)
