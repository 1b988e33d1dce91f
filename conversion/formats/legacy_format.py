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

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from conversion.formats.base import Output, Place, shard_names
from conversion.formats.hdf5_checkpoint import H5Checkpoint, close_all
from conversion.formats.hdf5_reader import H5File
from conversion.formats.hdf5_writer import H5Layout, lay_out_h5
from conversion.formats.safetensors_format import write_index
from idefics_common.checkpoint import CheckpointError
from idefics_common.checkpoint.errors import quote
from idefics_common.checkpoint.index import check_shard_name, compare_with_index, read_index, refuse_outside
from idefics_common.layouts import IDENTITY, KERAS_LAYOUTS, Layout
from idefics_common.parameters import HEAD, Parameter

MODEL_NAME = "tf_idefics_for_vision_text2_text"
"""The first part of every name in TensorFlow; readers leave it out."""

_SINGLE = "tf_model.h5"
_INDEX = "tf_model.h5.index.json"
_KERAS_VERSION = b"2.19.0"


class LegacyFormat:
    """See `conversion.formats.base.Format`."""

    name = "tf-h5"
    directory_files = (_SINGLE, _INDEX)
    stores_tied = True

    def stored_name(self, parameter: Parameter) -> str:
        return parameter.legacy_name

    def layout(self, parameter: Parameter) -> Layout:
        return IDENTITY if parameter.name == f"{HEAD.name}.weight" else KERAS_LAYOUTS[parameter.kind]

    def recognises(self, file_name: str) -> bool:
        return file_name.endswith((".h5", ".h5.index.json"))

    def open(self, path: Path) -> H5Checkpoint:
        if path.suffix == ".json":
            return _open_sharded(path)
        return H5Checkpoint(path, [H5File(path, self.name, _weight_of_whole_file)])

    def file_names(self, count: int) -> list[str]:
        return shard_names("tf_model", ".h5", count)

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        notes = [
            "transformers 4.57.6 drops the attention and MLP weights of the vision tower when it loads any "
            "tf_model.h5; they are in the file"
        ]
        if any(output.dtype.name == "bfloat16" for output in outputs):
            notes.append("transformers 4 cannot load bfloat16 from HDF5; --dtype float32 gives a file that it loads")
        return notes

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        lay_out_file = _lay_out_whole_file if len(shards) == 1 else _lay_out_shard
        for file_name, shard in zip(self.file_names(len(shards)), shards, strict=True):
            with lay_out_h5(directory / file_name) as file:
                places |= {name: Place(file_name, offset) for name, offset in lay_out_file(file, shard)}
        if len(shards) > 1:
            with_model = {f"{MODEL_NAME}/{name}": place for name, place in places.items()}
            write_index(directory / _INDEX, shards, with_model)
        return places

    def finish(
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        """Nothing: no byte outside the values depends on them."""


def _lay_out_whole_file(file: H5Layout, outputs: Sequence[Output]) -> Iterable[tuple[str, int]]:
    layers: dict[str, list[Output]] = {}
    for output in outputs:
        layers.setdefault(output.name.partition("/")[0], []).append(output)
    file.set_names("/", "layer_names", layers)
    file.set_attributes("/", {"backend": b"tensorflow", "keras_version": _KERAS_VERSION})
    for layer, members in layers.items():
        file.set_names(layer, "weight_names", [f"{MODEL_NAME}/{output.name}" for output in members])
        for output in members:
            yield output.name, file.add_dataset(f"{layer}/{MODEL_NAME}/{output.name}", output.shape, output.dtype)
    file.set_attributes("top_level_model_weights", {"weight_names": np.empty(0)})


def _lay_out_shard(file: H5Layout, outputs: Sequence[Output]) -> Iterable[tuple[str, int]]:
    outputs = sorted(outputs, key=lambda output: output.name)
    for output in outputs:
        yield output.name, file.add_dataset(output.name, output.shape, output.dtype)
    file.set_names("/", "layer_names", [output.name for output in outputs])


def _weight_of_whole_file(path: str) -> str:
    """The name of a weight without its layer and the name of the model; of a dataset elsewhere, its path."""
    parts = path.split("/", 2)
    return parts[2] if len(parts) == 3 else path


def _weight_of_shard(path: str) -> str:
    return path


def _open_sharded(index_path: Path) -> H5Checkpoint:
    weight_map, _ = read_index(index_path)
    by_name = {name.partition("/")[2]: shard_name for name, shard_name in weight_map.items()}
    if len(by_name) != len(weight_map) or "" in by_name:
        raise CheckpointError(index_path, f"expected different names such as {quote(f'{MODEL_NAME}/lm_head/weight:0')}")
    shards: list[H5File] = []
    try:
        for shard_name in sorted(set(by_name.values())):
            check_shard_name(index_path, shard_name, ".h5")
            if not os.path.lexists(index_path.parent / shard_name):
                raise CheckpointError(index_path, f"shard {shard_name} is missing")
            shards.append(H5File(refuse_outside(index_path.parent, shard_name), "tf-h5", _weight_of_shard))
        compare_with_index(index_path, by_name, shards)
        return H5Checkpoint(index_path, shards)
    except BaseException:
        close_all(shards)
        raise
