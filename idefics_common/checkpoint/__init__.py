"""Checkpoint files, read without a framework: safetensors and torch ``.bin``, single or sharded.

Every tensor is a named range of bytes in a file; reading one never loads another, and nothing here imports
transformers, tensorflow or keras. torch is imported only to unpickle the tensor list of a ``.bin`` file.
"""

from idefics_common.checkpoint.checkpoint import Checkpoint, open_checkpoint
from idefics_common.checkpoint.errors import CheckpointError
from idefics_common.checkpoint.report import LoadReport, compare_names_and_shapes
from idefics_common.checkpoint.safetensors_file import SafetensorsFile
from idefics_common.checkpoint.tensor_source import TensorInfo, TensorSource
from idefics_common.checkpoint.torch_bin_file import TorchBinFile

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "SafetensorsFile",
    "TensorInfo",
    "TensorSource",
    "TorchBinFile",
    "compare_names_and_shapes",
    "open_checkpoint",
]
