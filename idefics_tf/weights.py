"""State in and out by canonical name: Keras variables from checkpoint files in PyTorch's layout, and back.

Unusual: names and layouts come from the parameter table, nowhere else. Tensors are read one at a time through a memory
map and turned one at a time; pages of the file are given back as soon as they are copied.

Mirrors `idefics_pt/weights.py`, which leaves loading itself to transformers.
"""

from collections import Counter
from typing import NamedTuple

import keras
import numpy as np
from tqdm.auto import tqdm

from idefics_common.checkpoint import Checkpoint, compare_names_and_shapes
from idefics_common.layouts import KERAS_LAYOUTS, Layout
from idefics_common.parameters import MODEL, Parameter, Part, expand, stale_buffer_names

_LARGE = 2**30  # bytes from which loading shows its progress


class Weight(NamedTuple):
    """A variable of a model, its row of the parameter table, and how its axes are ordered."""

    parameter: Parameter
    variable: keras.Variable
    layout: Layout


def parameters(config, with_head: bool) -> tuple[Parameter, ...]:
    """The parameters of a model, all named as in a checkpoint with a head. Tied ones are among them."""
    return tuple(parameter for parameter in expand(config) if with_head or parameter.part != Part.HEAD)


def weights_by_name(model) -> dict[str, Weight]:
    """The weights of a model by canonical name, which starts with "model." with and without a head; tied ones aside."""
    prefix = f"{model.path}/"
    variables = {variable.path.removeprefix(prefix): variable for variable in model.weights}
    start = "" if model.has_head else f"{MODEL.keras}/"
    return {
        parameter.name: Weight(
            parameter, variables[parameter.keras_path.removeprefix(start)], KERAS_LAYOUTS[parameter.kind]
        )
        for parameter in parameters(model.config, model.has_head)
        if parameter.tied_to is None
    }


def names_in_file(checkpoint: Checkpoint, config, with_head: bool) -> dict[str, str]:
    """The canonical name of each tensor that a model wants from a checkpoint, by its name there.

    A checkpoint of the model without a head may leave out the "model." of all names, as transformers writes it.

    Raises:
        CheckpointError: listing missing, unexpected and mismatched tensors with their shapes.
    """
    prefix = f"{MODEL.name}."
    wanted = parameters(config, with_head)
    is_bare = not with_head and not any(name.startswith(prefix) for name in checkpoint.names)
    file_names = {parameter.name: parameter.name.removeprefix(prefix if is_bare else "") for parameter in wanted}
    ignorable = {name.removeprefix(prefix if is_bare else "") for name in stale_buffer_names(config)}
    if not with_head:
        ignorable |= {parameter.name for parameter in expand(config) if parameter.part == Part.HEAD}
    compare_names_and_shapes(
        checkpoint.infos,
        {file_names[parameter.name]: parameter.shape for parameter in wanted},
        ignorable=ignorable,
        optional={file_names[parameter.name] for parameter in wanted if parameter.tied_to is not None},
    ).raise_if_bad(checkpoint.path)
    return {file_names[parameter.name]: parameter.name for parameter in wanted if parameter.tied_to is None}


def dtype_of(checkpoint: Checkpoint) -> str:
    """The dtype of most bytes of a checkpoint; a model keeps it unless told otherwise."""
    nbytes = Counter()
    for info in checkpoint.infos.values():
        nbytes[info.dtype.name] += info.nbytes
    dtype = nbytes.most_common(1)[0][0]
    return "float32" if dtype == "float64" else dtype


def read_weights(model, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    """Assign every weight of a model from a checkpoint, in the order of the file.

    Args:
        names: result of `names_in_file`.
    """
    weights = weights_by_name(model)
    with tqdm(
        total=checkpoint.nbytes, unit="B", unit_scale=True, desc="Loading weights", disable=checkpoint.nbytes < _LARGE
    ) as progress:
        for file_name in checkpoint.names:
            if file_name in names:
                _, variable, layout = weights.pop(names[file_name])
                array = layout.apply(checkpoint.map(file_name))
                variable.assign(np.ascontiguousarray(array, dtype=np.dtype(variable.dtype)))
                del array
                checkpoint.release(file_name)
            progress.update(checkpoint.info(file_name).nbytes)
    assert not weights, f"no values were read for {sorted(weights)}"
