"""`model.weights.h5`: what Keras's own `save_weights` writes and `load_weights` reads, in shards or not.

How it is read, `idefics_common.checkpoint.keras_file` says: the Keras room reads it too.
"""

from collections.abc import Iterable, Mapping, Sequence

import h5py

from conversion.formats.base import Output, Place
from conversion.formats.hdf5_format import H5Format
from conversion.formats.hdf5_writer import add_dataset
from idefics_common.checkpoint import keras_file
from idefics_common.parameters import Parameter
from idefics_common.parameters.layouts import KERAS_LAYOUTS, Layout


class KerasFormat(H5Format):
    """See `conversion.formats.base.Format`."""

    name = keras_file.FORMAT
    stem, ending, index_ending = keras_file.STEM, keras_file.ENDING, keras_file.INDEX_ENDING
    hub_patterns = keras_file.HUB_PATTERNS
    stored_name = staticmethod(keras_file.stored_name)
    open = staticmethod(keras_file.open_keras_weights)

    def file_names(self, count: int) -> list[str]:
        return ["model.weights.h5"] if count == 1 else [f"model_{number:05d}.weights.h5" for number in range(count)]

    def layout(self, parameter: Parameter) -> Layout:
        return KERAS_LAYOUTS[parameter.kind]

    def add_tensors(self, file: h5py.File, outputs: Sequence[Output], is_whole: bool) -> Iterable[tuple[str, int]]:
        for output in outputs:
            yield output.name, add_dataset(file, output.name, output.shape, output.dtype)
            layer = output.name.rpartition("/")[0]
            file[layer].attrs["name"] = output.parameter.keras_path.split("/")[-2]

    def weight_map(self, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> dict[str, object]:
        files: dict[str, list[str]] = {}
        for name, place in places.items():
            of_layer = files.setdefault(keras_file.entry_of(name), [])
            if place.file not in of_layer:
                of_layer.append(place.file)
        return {layer: names if len(names) > 1 else names[0] for layer, names in files.items()}
