"""`tf_model.h5`: what transformers 4 wrote from TensorFlow; 4.57.6 was the last to.

A whole file and a shard have nothing in common but HDF5. In a whole file, as Keras 2 wrote it, the layers `model` and
`lm_head` are groups, and an attribute of each lists its weights by their names in TensorFlow, which start with the
name of the model. In a shard, as transformers wrote it, the weights lie at the root without that first name. Both are
read by where the weights lie; the lists, from which a damaged file can make HDF5 allocate gigabytes, are only written.

Quirks kept, since the loader of 4.57.6 looks for them: the base matrix of the language head is stored as in PyTorch,
though its added rows are turned; a gate that was to start at random has the name `alpha_type`; lists of names above
64,512 bytes come in parts.

Source: tf_keras/src/saving/legacy/hdf5_format.py (2.19); transformers/modeling_tf_utils.py (4.57.6).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from conversion.formats.base import Output, Place
from conversion.formats.hdf5_format import H5Format
from conversion.formats.hdf5_writer import add_dataset, set_names
from idefics_common.checkpoint import Checkpoint, CheckpointError
from idefics_common.checkpoint.errors import quote
from idefics_common.checkpoint.hdf5_file import open_h5
from idefics_common.checkpoint.index import WeightMap, read_index
from idefics_common.parameters import HEAD, Parameter, Part
from idefics_common.parameters.layouts import IDENTITY, KERAS_LAYOUTS, Layout

MODEL_NAME = "tf_idefics_for_vision_text2_text"
"""The first part of every name in TensorFlow; readers leave it out."""

BASE_MODEL_NAME = "tf_idefics_model"
"""The same for the model without its language head."""

_KERAS_VERSION = b"2.19.0"


class LegacyFormat(H5Format):
    """See `conversion.formats.base.Format`."""

    name = "tf-h5"
    stem, ending, index_ending = "tf_model", ".h5", ".h5.index.json"
    hub_patterns = ("tf_model*.h5", "tf_model.h5.index.json")
    stores_tied = True

    def stored_name(self, parameter: Parameter, with_head: bool = True) -> str:
        return parameter.legacy_name

    def layout(self, parameter: Parameter) -> Layout:
        return IDENTITY if parameter.name == f"{HEAD.name}.weight" else KERAS_LAYOUTS[parameter.kind]

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        notes = [
            "the from_pretrained of transformers 4.57.6 drops of a tf_model.h5 what it has not built yet, most of the "
            "vision tower and the resampler; all is in the file, and docs/converting.md says how it can be loaded"
        ]
        if any(output.dtype.name == "bfloat16" for output in outputs):
            notes.append("transformers 4 cannot load bfloat16 from HDF5; --dtype float32 gives a file that it loads")
        return notes

    def open(self, path: Path) -> Checkpoint:
        return open_h5(path, self.name, self.ending, _tensor_name, _read_index)

    def add_tensors(self, file: h5py.File, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        return (_lay_out_whole_file if is_whole else _lay_out_shard)(file, outputs)

    def weight_map(self, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> dict[str, object]:
        model_name = _model_name(output for shard in shards for output in shard)
        return {f"{model_name}/{name}": place.file for name, place in places.items()}


def _tensor_name(path: str, is_whole: bool) -> str:
    """In a whole file, the path without layer and name of the model; of a dataset elsewhere, its path."""
    parts = path.split("/", 2)
    return parts[2] if is_whole and len(parts) == 3 else path


def _read_index(path: Path) -> WeightMap:
    weight_map, _ = read_index(path)
    shards = {name.partition("/")[2]: shard_names for name, shard_names in weight_map.items()}
    if len(shards) != len(weight_map) or "" in shards:
        raise CheckpointError(path, f"expected different names such as {quote(f'{MODEL_NAME}/lm_head/weight:0')}")
    return shards


def _model_name(outputs: Iterable[Output]) -> str:
    has_head = any(output.parameter.part == Part.HEAD for output in outputs)
    return MODEL_NAME if has_head else BASE_MODEL_NAME


def _lay_out_whole_file(file: h5py.File, outputs: Sequence[Output]) -> Iterable[tuple[str, int]]:
    model_name = _model_name(outputs)
    layers: dict[str, list[Output]] = {}
    for output in outputs:
        layers.setdefault(output.name.partition("/")[0], []).append(output)
    set_names(file, "/", "layer_names", layers)
    file.attrs.update({"backend": b"tensorflow", "keras_version": _KERAS_VERSION})
    for layer, members in layers.items():
        set_names(file, layer, "weight_names", [f"{model_name}/{output.name}" for output in members])
        for output in members:
            yield output.name, add_dataset(file, f"{layer}/{model_name}/{output.name}", output.shape, output.dtype)
    file.create_group("top_level_model_weights").attrs["weight_names"] = np.empty(0)


def _lay_out_shard(file: h5py.File, outputs: Sequence[Output]) -> Iterable[tuple[str, int]]:
    outputs = sorted(outputs, key=lambda output: output.name)
    for output in outputs:
        yield output.name, add_dataset(file, output.name, output.shape, output.dtype)
    set_names(file, "/", "layer_names", [output.name for output in outputs])
