"""Any checkpoint, opened: its format, its configuration, and every parameter of the model in one layout.

Unusual: whatever the format, tensors come out as blocks of rows in PyTorch's layout, through buffers of a fixed size,
so that two checkpoints can be copied or compared without either being in memory, or even one tensor of it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion.errors import ConversionError
from conversion.formats import FORMAT_NAMES, Format, format_of
from conversion.hub import download, looks_like_hub_id
from conversion.streaming import Buffers, transpose_into
from idefics_common.checkpoint import CheckpointError, TensorInfo, TensorSource, compare_names_and_shapes
from idefics_common.checkpoint.index import refuse_outside
from idefics_common.configuration.fields import IdeficsFields, read_config
from idefics_common.parameters import MODEL, Parameter, Part, expand, stale_buffer_names

MAX_LAYERS = 10_000
"""A configuration with more of anything is not expanded into names."""


@dataclass(frozen=True)
class OpenModel:
    """An open checkpoint whose tensors are exactly those of its configuration.

    Attributes:
        path: the file, or for shards the index.
        config: what its config.json says.
        parameters: all tensors of the model in the order of its modules, tied ones included, whether stored or not.
        has_head: whether it is the model with its language head, or the model below it alone.
        ignored: names of stored tensors that are no parameters: stale buffers.
        notes: what is odd and yet no obstacle, a sentence each.
    """

    path: Path
    format: Format
    config: IdeficsFields
    source: TensorSource
    parameters: tuple[Parameter, ...]
    has_head: bool
    ignored: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return self.source.files

    @property
    def own(self) -> tuple[Parameter, ...]:
        """The parameters that are not tied to another."""
        return tuple(parameter for parameter in self.parameters if parameter.tied_to is None)

    @property
    def stored_ties(self) -> tuple[Parameter, ...]:
        """The parameters that are tied to another, and stored all the same."""
        return tuple(p for p in self.parameters if p.tied_to is not None and self._stored_name(p) in self.source)

    def info(self, parameter: Parameter) -> TensorInfo:
        """How a parameter is stored."""
        return self.source.info(self._stored_name(parameter))

    def read_rows(self, parameter: Parameter, rows: range, buffers: Buffers, role: str) -> np.ndarray:
        """Consecutive rows of a parameter, in PyTorch's layout and the stored dtype.

        Args:
            buffers: where they are put; they are good until the next are read. role: name of the buffer.
        """
        info, layout = self.info(parameter), self.format.layout(parameter)
        block = buffers.array(role, (len(rows), *parameter.shape[1:]), info.dtype)
        if layout.axes is None:
            return self.source.read_rows(info.name, rows.start, rows.stop, block)
        stored = buffers.array("stored", layout.shape(block.shape), info.dtype)
        self.source.read_block(info.name, layout.axes.index(0), rows.start, rows.stop, stored)
        transpose_into(block, layout.inverse(stored))
        return block

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> "OpenModel":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _stored_name(self, parameter: Parameter) -> str:
        return self.format.stored_name(parameter, self.has_head)


def open_model(source: str | os.PathLike) -> OpenModel:
    """Open a checkpoint and check it as a whole, from its headers alone.

    Args:
        source: a directory, a file beside its config.json, or the id of a repository on the hub.

    Raises:
        CheckpointError: for files that are damaged, or tensors that are not those of the configuration.
        ConversionError: for a source that is not there.
    """
    path = locate(source)
    format = format_at(path)
    config = read_config_beside(path)
    opened = format.open(path)
    try:
        parameters, notes, stale = expand(config), opened.notes, stale_buffer_names(config)
        has_head = _has_head(format, parameters, opened)
        if not has_head:
            parameters = tuple(parameter for parameter in parameters if parameter.part != Part.HEAD)
            notes = (*notes, "it is the model without its language head, as IdeficsModel is saved")
            stale = {name.removeprefix(f"{MODEL.name}.") for name in stale}
        names = {parameter: format.stored_name(parameter, has_head) for parameter in parameters}
        report = compare_names_and_shapes(
            {name: opened.info(name) for name in opened},
            {name: format.layout(parameter).shape(parameter.shape) for parameter, name in names.items()},
            ignorable=stale,
            optional={name for parameter, name in names.items() if parameter.tied_to is not None},
        )
        report.raise_if_bad(path)
    except BaseException:
        opened.close()
        raise
    return OpenModel(path, format, config, opened, parameters, has_head, report.ignored, notes)


def _has_head(format: Format, parameters: Sequence[Parameter], opened: TensorSource) -> bool:
    """Whether a file is of the model with its language head.

    The model below the head, saved alone, has names of its own in most formats. In tf-h5 the names are the same, and
    the head is just not there; one that is tied may be missing in a file of the whole model.
    """
    embedding = parameters[0]
    if format.stored_name(embedding, with_head=False) not in opened:
        return True
    if format.stored_name(embedding) not in opened:
        return False
    head = [parameter for parameter in parameters if parameter.part == Part.HEAD]
    return any(format.stored_name(parameter) in opened or parameter.tied_to is not None for parameter in head)


def locate(source: str | os.PathLike) -> Path:
    """The file to open for a source: see `open_model`."""
    path = Path(source)
    if not os.path.lexists(path):
        if not looks_like_hub_id(str(source)):
            raise ConversionError(f"{source}: no such file or directory")
        path = download(str(source))
    if not path.is_dir():
        return path
    # the order of transformers, then the formats of Keras
    for name in ("safetensors", "bin", "keras", "tf-h5"):
        for file_name in format_of(name).directory_files:
            if os.path.lexists(path / file_name):
                return refuse_outside(path, file_name)
    looked_for = ", ".join(name for format_name in FORMAT_NAMES for name in format_of(format_name).directory_files)
    raise CheckpointError(path, f"holds no checkpoint: looked for {looked_for}")


def format_at(path: Path) -> Format:
    """The format of a file, by its name. Raises CheckpointError where no format has such names."""
    for name in FORMAT_NAMES:
        if format_of(name).recognises(path.name):
            return format_of(name)
    raise CheckpointError(
        path, "is no checkpoint by its name: expected *.safetensors, *.bin, *.h5, or the index of shards"
    )


def read_config_beside(path: Path) -> IdeficsFields:
    """The configuration beside a file of tensors. Raises CheckpointError where there is none or an impossible one."""
    config_path = path.parent / "config.json"
    if not os.path.lexists(config_path):
        raise CheckpointError(config_path, "is missing; names and shapes of the tensors are checked against it")
    refuse_outside(path.parent, "config.json")
    try:
        config = read_config(config_path)
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error).removeprefix(str(config_path)).lstrip(": ")
        raise CheckpointError(config_path, problem or type(error).__name__) from error
    layers = (
        config.num_hidden_layers,
        config.vision_config.num_hidden_layers,
        config.perceiver_config.resampler_depth,
    )
    if max(layers) > MAX_LAYERS:
        raise CheckpointError(config_path, f"numbers of layers must be {MAX_LAYERS} or less, got {layers}")
    return config
