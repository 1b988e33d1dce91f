"""Opens a checkpoint of any format: its configuration, and every parameter of the model in one layout.

Unusual: whatever the format, tensors come out as blocks of rows in PyTorch's layout, through buffers of a fixed size,
so that two checkpoints can be copied or compared without either being in memory, or even one tensor of it.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion.companions import COMPANIONS
from conversion.formats import FORMAT_NAMES, Format, format_of
from conversion.streaming import Buffers, transpose_into
from idefics_common.checkpoint import Checkpoint, CheckpointError, TensorInfo
from idefics_common.checkpoint.files import find_file, refuse_outside
from idefics_common.checkpoint.hub import download
from idefics_common.checkpoint.model_tensors import ModelTensors, match_tensors
from idefics_common.checkpoint.quantization import declared_quantization, refuse_quantized
from idefics_common.configuration.fields import IdeficsFields, read_config
from idefics_common.parameters import Parameter

MAX_LAYERS = 10_000
"""A configuration with more of anything is not expanded into names."""


@dataclass(frozen=True)
class OpenModel(AbstractContextManager):
    """An open checkpoint whose tensors are exactly those of its configuration.

    Attributes:
        path: the file, or for shards the index.
        config: what its config.json says.
        checkpoint: the open files.
        tensors: the parameters in the order of the modules, tied ones included, and how the files name them.
    """

    path: Path
    format: Format
    config: IdeficsFields
    checkpoint: Checkpoint
    tensors: ModelTensors

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def has_head(self) -> bool:
        """Whether it is the model with its language head, or the model below it alone."""
        return self.tensors.has_head

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters, tied ones included, whether they are stored or not."""
        return tuple(self.tensors.names)

    @property
    def untied(self) -> tuple[Parameter, ...]:
        """The parameters that are not tied to another."""
        return tuple(parameter for parameter in self.parameters if parameter.tied_to is None)

    @property
    def stored_ties(self) -> tuple[Parameter, ...]:
        """The parameters that are tied to another, and stored all the same."""
        return tuple(p for p, name in self.tensors.names.items() if p.tied_to is not None and name in self.checkpoint)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd and yet no obstacle, a sentence each."""
        if self.has_head:
            return self.checkpoint.notes
        return (*self.checkpoint.notes, "it is the model without its language head, as IdeficsModel is saved")

    def original(self, parameter: Parameter) -> Parameter:
        """The parameter that this one is tied to; itself where it is not tied."""
        if parameter.tied_to is None:
            return parameter
        return next(other for other in self.parameters if other.name == parameter.tied_to)

    def info(self, parameter: Parameter) -> TensorInfo:
        """How a parameter is stored."""
        return self.checkpoint.info(self.tensors.names[parameter])

    def read_rows(self, parameter: Parameter, rows: range, buffers: Buffers, role: str) -> np.ndarray:
        """Consecutive rows of a parameter, in PyTorch's layout and the stored dtype.

        Args:
            buffers: where they are put; they are good until the next are read. role: name of the buffer.
        """
        info, layout = self.info(parameter), self.format.layout(parameter)
        block = buffers.array(role, (len(rows), *parameter.shape[1:]), info.dtype)
        if layout.axes is None:
            return self.checkpoint.read_rows(info.name, rows.start, rows.stop, block)
        stored = buffers.array("stored", layout.shape(block.shape), info.dtype)
        self.checkpoint.read_block(info.name, layout.axes.index(0), rows.start, rows.stop, stored)
        transpose_into(block, layout.inverse(stored))
        return block

    def __exit__(self, *exc_info) -> None:
        self.checkpoint.close()


def open_model(source: str | os.PathLike) -> OpenModel:
    """Open a checkpoint and check it as a whole, from its headers alone.

    Args:
        source: a directory, a file beside its config.json, or the id of a repository on the hub.

    Raises CheckpointError for a source that is not there, for files that are damaged, or tensors that are not those of
    the configuration.
    """
    path = find_checkpoint(source)
    format = format_at(path)
    config = read_config_beside(path)
    checkpoint = format.open(path)

    def stored_shape(parameter: Parameter) -> tuple[int, ...]:
        return format.layout(parameter).shape(parameter.shape)

    try:
        refuse_quantized(path, checkpoint.infos, declared_quantization(path.parent))
        tensors = match_tensors(path, checkpoint.infos, config, name_of=format.stored_name, shape_of=stored_shape)
    except BaseException:
        checkpoint.close()
        raise
    return OpenModel(path, format, config, checkpoint, tensors)


def find_checkpoint(source: str | os.PathLike) -> Path:
    """The file to open for a source: see `open_model`."""
    path = Path(source)
    formats = [format_of(name) for name in FORMAT_NAMES]
    if not os.path.lexists(path):
        path = download(str(source), COMPANIONS, [format.hub_patterns for format in formats])
    if not path.is_dir():
        return path
    return find_file(path, [name for format in formats for name in format.directory_files])


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
    config_path = refuse_outside(path.parent, "config.json")
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
