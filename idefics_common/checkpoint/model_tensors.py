"""Which tensors a checkpoint of a model may hold: bare names, an optional head, tied tensors, stale buffers.

A file is one of the whole model, whose names start with "model." below the language head, or of the model below the
head saved alone, whose names are bare. What is said here in canonical names holds for the names of any format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from idefics_common.checkpoint.report import compare_names_and_shapes
from idefics_common.checkpoint.tensor_source import TensorInfo
from idefics_common.parameters import MODEL, Parameter, Part, expand, stale_buffer_names


def canonical_name(parameter: Parameter, with_head: bool = True) -> str:
    """The name of a parameter in a file of the whole model, or of the model below its head."""
    return parameter.name if with_head else parameter.name.removeprefix(f"{MODEL.name}.")


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model, as a checkpoint stores them.

    Attributes:
        names: the stored name of every parameter in the order of the modules; tied ones are among them.
        has_head: whether the language head is one of them.
        ignored: stored tensors that are not wanted: stale buffers, and a head for a model without one.
    """

    names: Mapping[Parameter, str]
    has_head: bool
    ignored: tuple[str, ...]


def match_tensors(
    path: Path,
    found: Mapping[str, TensorInfo],
    config,
    with_head: bool | None = None,
    name_of: Callable[[Parameter, bool], str] = canonical_name,
    shape_of: Callable[[Parameter], tuple[int, ...]] = attrgetter("shape"),
) -> ModelTensors:
    """Hold the tensors of a checkpoint against those of a configuration.

    Args:
        path: of the checkpoint, for the error.
        found: the stored tensors by name.
        config: an `IdeficsConfig` or plain `IdeficsFields`.
        with_head: whether the model has a language head; None for whatever the checkpoint has. A model without leaves
            a stored head aside.
        name_of, shape_of: the name and the shape of a parameter in the format of the checkpoint.

    Raises:
        CheckpointError: listing missing, unexpected and mismatched tensors with their shapes. Tied tensors may be
            absent, and stale buffers present.
    """
    parameters = expand(config)
    whole = {parameter: name_of(parameter, True) for parameter in parameters}
    bare = {parameter: name_of(parameter, False) for parameter in parameters}
    is_bare = _count(bare, found) > _count(whole, found)
    names = bare if is_bare else whole
    heads = {parameter: name for parameter, name in names.items() if parameter.part == Part.HEAD}
    ignorable = stale_buffer_names(config)
    if is_bare:
        ignorable = {name.removeprefix(f"{MODEL.name}.") for name in ignorable}
    if with_head is None:
        # tf-h5 has the same names for both; there, the head of a whole model is stored or tied
        is_whole = whole != bare or any(name in found or head.tied_to is not None for head, name in heads.items())
        with_head = is_whole and not is_bare
    elif not with_head:
        ignorable = {*ignorable, *heads.values()}
    wanted = {parameter: name for parameter, name in names.items() if with_head or parameter not in heads}
    report = compare_names_and_shapes(
        found,
        {name: shape_of(parameter) for parameter, name in wanted.items()},
        ignorable=ignorable,
        optional={name for parameter, name in wanted.items() if parameter.tied_to is not None},
    )
    report.raise_if_bad(path)
    return ModelTensors(wanted, with_head, report.ignored)


def _count(names: Mapping[Parameter, str], found: Mapping[str, TensorInfo]) -> int:
    return sum(name in found for name in names.values())
