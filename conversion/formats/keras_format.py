"""`model.weights.h5`: what Keras's own `save_weights` writes and `load_weights` reads, in shards or not.

A path in the file follows attributes, classes and order of creation of the layers (`Parameter.h5_path`). In shards,
`model.weights.json` says which files hold the variables of each layer; the files are numbered from 0.

What the training of a compiled model adds (the state of the optimizer, of metrics and of random generators) is no part
of the model and left aside, by the names that Keras gives it.

Source: keras/src/saving/saving_lib.py (3.15), `H5IOStore` and `ShardedH5IOStore`.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from conversion.formats.base import Output, Place
from conversion.formats.hdf5_checkpoint import H5Format
from conversion.formats.hdf5_writer import H5Layout
from idefics_common.checkpoint import CheckpointError
from idefics_common.checkpoint.errors import quote
from idefics_common.checkpoint.index import read_index_object
from idefics_common.parameters import MODEL, Parameter
from idefics_common.parameters.layouts import KERAS_LAYOUTS, Layout

_TRAINING_STATE = frozenset({"optimizer", "metrics", "loss", "seed_generator", "_metrics"})


class KerasFormat(H5Format):
    """See `conversion.formats.base.Format`."""

    name = "keras"
    directory_files = ("model.weights.h5", "model.weights.json")
    shard_ending = ".weights.h5"
    index_entries = "layers"

    def stored_name(self, parameter: Parameter, with_head: bool = True) -> str:
        return parameter.h5_path if with_head else parameter.h5_path.removeprefix(f"{MODEL.h5}/")

    def layout(self, parameter: Parameter) -> Layout:
        return KERAS_LAYOUTS[parameter.kind]

    def recognises(self, file_name: str) -> bool:
        return file_name.endswith((".weights.h5", ".weights.json"))

    def file_names(self, count: int) -> list[str]:
        return ["model.weights.h5"] if count == 1 else [f"model_{number:05d}.weights.h5" for number in range(count)]

    def tensor_name(self, path: str, is_whole: bool) -> str | None:
        """A variable is named by its path; what belongs to training is none of the model's."""
        return None if _is_training_state(path) else path

    def entry_of(self, name: str) -> str:
        return f"/{name.rpartition('/')[0]}"

    def read_index(self, path: Path) -> dict[str, list[str]]:
        weight_map = read_index_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(path, f"weight_map must map layers to shard names, got {quote(weight_map)}")
        shards = {layer: _shard_names(path, layer, names) for layer, names in weight_map.items()}
        index = {layer: names for layer, names in shards.items() if not _is_training_state(layer)}
        if not index:
            raise CheckpointError(path, "weight_map has nothing but the state of training")
        return index

    def lay_out_file(self, file: H5Layout, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        for output in outputs:
            yield output.name, file.add_dataset(output.name, output.shape, output.dtype)
            layer = output.name.rpartition("/")[0]
            file.set_attributes(layer, {"name": output.parameter.keras_path.split("/")[-2]})

    def write_index(self, path: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> None:
        files_of_layer: dict[str, list[str]] = defaultdict(list)
        for name, place in places.items():
            if place.file not in files_of_layer[self.entry_of(name)]:
                files_of_layer[self.entry_of(name)].append(place.file)
        total = sum(output.nbytes for shard in shards for output in shard)
        weight_map = {layer: names if len(names) > 1 else names[0] for layer, names in files_of_layer.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path.write_text(json.dumps(index, indent=4), encoding="utf-8")


def _is_training_state(path: str) -> bool:
    return not _TRAINING_STATE.isdisjoint(path.split("/"))


def _shard_names(index_path: Path, layer: str, names: object) -> list[str]:
    """The files that hold variables of a layer; Keras writes one name, or a list of several."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(index_path, f"expected the names of shards, got {quote(names)}", layer)
    return names
