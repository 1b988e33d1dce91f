"""`model.weights.h5`: what Keras's own `save_weights` writes and `load_weights` reads, in shards or not.

A path in the file follows attributes, classes and order of creation of the layers (`Parameter.h5_path`). In shards,
`model.weights.json` says which files hold the variables of each layer; the files are numbered from 0.

What the training of a compiled model adds (the state of the optimizer, of metrics and of random generators) is no part
of the model and left aside, by the names that Keras gives it.

Source: keras/src/saving/saving_lib.py (3.15), `H5IOStore` and `ShardedH5IOStore`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py

from conversion.formats.base import Output, Place
from conversion.formats.hdf5_format import H5Format
from conversion.formats.hdf5_writer import add_dataset
from idefics_common.checkpoint import CheckpointError
from idefics_common.checkpoint.index import WeightMap, read_index
from idefics_common.parameters import MODEL, Parameter
from idefics_common.parameters.layouts import KERAS_LAYOUTS, Layout

_TRAINING_STATE = frozenset({"optimizer", "metrics", "loss", "seed_generator", "_metrics"})


class KerasFormat(H5Format):
    """See `conversion.formats.base.Format`."""

    name = "keras"
    stem, ending, index_ending = "model", ".weights.h5", ".weights.json"
    hub_patterns = ("model*.weights.h5", "model.weights.json")

    def file_names(self, count: int) -> list[str]:
        return ["model.weights.h5"] if count == 1 else [f"model_{number:05d}.weights.h5" for number in range(count)]

    def stored_name(self, parameter: Parameter, with_head: bool = True) -> str:
        return parameter.h5_path if with_head else parameter.h5_path.removeprefix(f"{MODEL.h5}/")

    def layout(self, parameter: Parameter) -> Layout:
        return KERAS_LAYOUTS[parameter.kind]

    def tensor_name(self, path: str, is_whole: bool) -> str | None:
        """A variable is named by its path; what belongs to training is none of the model's."""
        return None if _is_training_state(path) else path

    def entry_of(self, name: str) -> str:
        return f"/{name.rpartition('/')[0]}"

    def read_index(self, path: Path) -> WeightMap:
        weight_map, _ = read_index(path, of_layers=True)
        weight_map = {layer: names for layer, names in weight_map.items() if not _is_training_state(layer)}
        if not weight_map:
            raise CheckpointError(path, "weight_map has nothing but the state of training")
        return weight_map

    def add_tensors(self, file: h5py.File, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        for output in outputs:
            yield output.name, add_dataset(file, output.name, output.shape, output.dtype)
            layer = output.name.rpartition("/")[0]
            file[layer].attrs["name"] = output.parameter.keras_path.split("/")[-2]

    def weight_map(self, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> dict[str, object]:
        files: dict[str, list[str]] = {}
        for name, place in places.items():
            of_layer = files.setdefault(self.entry_of(name), [])
            if place.file not in of_layer:
                of_layer.append(place.file)
        return {layer: names if len(names) > 1 else names[0] for layer, names in files.items()}


def _is_training_state(path: str) -> bool:
    return not _TRAINING_STATE.isdisjoint(path.split("/"))
