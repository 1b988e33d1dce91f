"""What a model costs, on paper: bytes and multiply-adds from a configuration, and seconds from those and a machine.

- `sizes`: precisions, workloads, and the numbers of a configuration that costs depend on.
- `memory`: weights, caches and the peak of a prompt, in bytes.
- `training`: weights, gradients, optimiser and saved activations, in bytes.
- `kernels`: the operations of each step, with their shapes.
- `operations`: multiply-adds, bytes read per token, and the least time on a given machine.
- `timed`: the time to expect on a machine where each operation has been timed.
- `devices`: tensor-parallel and pipeline plans.

All formulae describe this library, not IDEFICS in general: image keys and values are made once, logits of a prompt are
made for its last position, and images that nobody may see are not encoded. `docs/scaling.md` applies them.

Nothing here imports a framework. `config` is always an `IdeficsConfig` or plain `IdeficsFields`. Axes: see
`idefics_common`.
"""

from idefics_common.scaling.devices import (
    PipelineStage,
    TensorParallelPlan,
    pipeline_plan,
    tensor_parallel_bytes,
    tensor_parallel_shards,
)
from idefics_common.scaling.kernels import decode_kernels
from idefics_common.scaling.memory import (
    ImageBytes,
    InferenceMemory,
    image_bytes,
    inference_memory,
    text_cache_bytes_per_token,
    weight_bytes,
)
from idefics_common.scaling.operations import (
    DecodeBytes,
    FirstTokenSeconds,
    Hardware,
    decode_bytes,
    decode_multiply_adds,
    decode_seconds,
    first_token_seconds,
    image_key_value_multiply_adds,
    prefill_multiply_adds,
    resampler_multiply_adds,
    vision_multiply_adds,
)
from idefics_common.scaling.sizes import PRECISIONS, Precision, Workload
from idefics_common.scaling.timed import (
    CallSeconds,
    Parts,
    expected_decode_seconds,
    expected_first_token_seconds,
    first_token_kernels,
    kernel_seconds,
)
from idefics_common.scaling.training import TrainingMemory, is_trainable, training_memory

__all__ = [
    "PRECISIONS",
    "CallSeconds",
    "DecodeBytes",
    "FirstTokenSeconds",
    "Hardware",
    "ImageBytes",
    "InferenceMemory",
    "Parts",
    "PipelineStage",
    "Precision",
    "TensorParallelPlan",
    "TrainingMemory",
    "Workload",
    "decode_bytes",
    "decode_kernels",
    "decode_multiply_adds",
    "decode_seconds",
    "expected_decode_seconds",
    "expected_first_token_seconds",
    "first_token_kernels",
    "first_token_seconds",
    "image_bytes",
    "image_key_value_multiply_adds",
    "inference_memory",
    "is_trainable",
    "kernel_seconds",
    "pipeline_plan",
    "prefill_multiply_adds",
    "resampler_multiply_adds",
    "tensor_parallel_bytes",
    "tensor_parallel_shards",
    "text_cache_bytes_per_token",
    "training_memory",
    "vision_multiply_adds",
    "weight_bytes",
]
