"""How a model lies on several devices: each layer split over all of them, or each device a run of layers.

Tensor parallelism follows `parallel_plans`. Every attention and every MLP ends in one sum over the
devices (all-reduce) of a vector of the decoder's width per position; heads stay whole. Pipeline stages follow the order
in which the model computes; a gated block stands with the decoder layer after it. Stages work in turns, so one token of
one row takes as long as on one device that could hold the model.
"""

import math
from dataclasses import dataclass

from benchmarks.planning.memory import InferenceMemory, image_bytes, inference_memory, text_cache_bytes_per_token
from benchmarks.planning.sizes import Precision, Workload, sizes_of
from idefics_common.parameters import HEAD, MODEL, expand
from idefics_common.parameters.parallel_plans import tensor_parallel_plan

_SPLIT_AXES = {"colwise": 0, "rowwise": 1, "decoupled_embedding": 0, "decoupled_linear": 0}


@dataclass(frozen=True)
class TensorParallelPlan:
    """What each of several devices holds, and what travels.

    Attributes:
        devices: how many.
        replicated_bytes: weights that every device has whole.
        device_bytes: weights of the device that has most.
        device_text_cache_bytes: per position of a row. device_image_bytes: per image; keys and values are split by
            heads, features are whole.
        all_reduces: sums over the devices per decoding step. all_reduce_bytes: of their vectors, per row; in a ring,
            each device sends 2 (devices - 1) / devices of them.
    """

    devices: int
    replicated_bytes: int
    device_bytes: int
    device_text_cache_bytes: int
    device_image_bytes: int
    all_reduces: int
    all_reduce_bytes: int

    def peak_bytes(self, memory: InferenceMemory, workload: Workload) -> int:
        """The most bytes that one device holds, its activations counted as if it had to make all of them alone.

        Args:
            memory: of the same model and workload on one device.
        """
        images = workload.num_images * self.device_image_bytes
        prompt, full = (cache // self.devices for cache in (memory.prompt_cache, memory.full_cache))
        return self.device_bytes + max(memory.encoding, prompt + images + memory.reading, full + images)


@dataclass(frozen=True)
class PipelineStage:
    """A run of the model on one device.

    Attributes:
        modules: names of all modules it holds; of all stages together, a `device_map` of the whole model.
        layers: numbers of its decoder layers. blocks: of its gated cross-attention blocks.
        weight_bytes: of its parameters.
        cache_bytes: of the text and the images of a workload, as far as its layers keep them.
        sent_bytes: hidden states that go to the next stage per position of a row; 0 from the last stage.
    """

    modules: tuple[str, ...]
    layers: range
    blocks: range
    weight_bytes: int
    cache_bytes: int
    sent_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and caches."""
        return self.weight_bytes + self.cache_bytes


def tensor_parallel_shards(config, devices: int) -> dict[str, int | None]:
    """The axis over which each parameter is split, by canonical name; None for those that every device has whole.

    Raises:
        ValueError: if the heads of a part are no multiple of the number of devices.
    """
    heads = {
        "num_attention_heads": config.num_attention_heads,
        "vision_config.num_attention_heads": config.vision_config.num_attention_heads,
    }
    if config.use_resampler:
        heads["perceiver_config.resampler_n_heads"] = config.perceiver_config.resampler_n_heads
    for field, count in heads.items():
        if devices < 1 or count % devices:
            raise ValueError(f"{field} must be a multiple of the number of devices, got {count} and {devices}.")
    sizes = sizes_of(config)
    styles = {
        f"{MODEL.name}.{module}".replace("*", str(i)): style
        for module, style in tensor_parallel_plan(config).items()
        for i in range(max(sizes.layers, sizes.vision_layers, sizes.depth))
    }
    styles[HEAD.name] = "decoupled_linear"
    axes = {}
    for parameter in expand(config):
        module, _, leaf = parameter.name.rpartition(".")
        axis = _SPLIT_AXES.get(styles.get(module))
        axes[parameter.name] = None if axis == 1 and leaf == "bias" else axis
    return axes


def tensor_parallel_bytes(config, precision: Precision, devices: int) -> TensorParallelPlan:
    """What tensor parallelism over `devices` costs; errors as `tensor_parallel_shards`."""
    sizes, axes = sizes_of(config), tensor_parallel_shards(config, devices)
    replicated = share = 0
    for parameter in expand(config):
        shape, axis = list(parameter.shape), axes[parameter.name]
        if parameter.tied_to is not None:
            continue
        if axis is None:
            replicated += precision.parameter_bytes(parameter)
        else:
            shape[axis] = math.ceil(shape[axis] / devices)
            share += precision.parameter_bytes(parameter, tuple(shape))
    image = image_bytes(config, precision)
    all_reduces = 2 * (sizes.layers + sizes.blocks) + 1 if devices > 1 else 0
    return TensorParallelPlan(
        devices=devices,
        replicated_bytes=replicated,
        device_bytes=share + replicated,
        device_text_cache_bytes=text_cache_bytes_per_token(config, precision) // devices,
        device_image_bytes=image.key_values // devices + image.features,
        all_reduces=all_reduces,
        all_reduce_bytes=all_reduces * sizes.D * precision.bytes_per_value,
    )


def pipeline_plan(config, precision: Precision, workload: Workload, devices: int) -> list[PipelineStage]:
    """The split into `devices` runs of layers whose fullest device, weights and caches together, is least full.

    The first stage has the embedding and everything that makes images, the last one the head; if the head is tied, its
    matrix counts on both.

    Raises:
        ValueError: if there are more devices than layers.
    """
    sizes = sizes_of(config)
    if not 1 <= devices <= sizes.layers:
        raise ValueError(f"a pipeline of {sizes.layers} layers needs 1 to {sizes.layers} devices, got {devices}.")
    before, units, after = _units(config)
    owned = {module: 0 for unit in (before, *units, after) for module in unit}
    for parameter in expand(config):
        module = next(module for module in owned if parameter.name.startswith(f"{module}."))
        if parameter.tied_to is None or devices > 1:
            owned[module] += precision.parameter_bytes(parameter)
    text = inference_memory(config, precision, workload).full_cache
    image = image_bytes(config, precision)

    def stage(start: int, stop: int) -> PipelineStage:
        interval = config.cross_layer_interval
        layers, blocks = range(start, stop), range(-(-start // interval), -(-stop // interval))
        modules = (
            *(before if start == 0 else ()),
            *(module for unit in units[start:stop] for module in unit),
            *(after if stop == sizes.layers else ()),
        )
        images = image.key_values * len(blocks) // sizes.blocks
        images += image.features if start == 0 else 0
        return PipelineStage(
            modules=modules,
            layers=layers,
            blocks=blocks,
            weight_bytes=sum(owned[module] for module in modules),
            cache_bytes=text * len(layers) // sizes.layers + workload.num_images * images,
            sent_bytes=sizes.D * precision.bytes_per_value if stop < sizes.layers else 0,
        )

    return [stage(*bounds) for bounds in _balance(sizes.layers, devices, lambda *bounds: stage(*bounds).total_bytes)]


def _units(config) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
    """Names of the modules before all layers, of each layer with the gated block in front of it, and after them."""
    name, interval = MODEL.name, config.cross_layer_interval
    before = [f"{name}.embed_tokens", f"{name}.vision_model"]
    if config.use_resampler:
        before.append(f"{name}.perceiver_resampler")
    units = [
        (*([f"{name}.gated_cross_attn_layers.{i // interval}"] if i % interval == 0 else []), f"{name}.layers.{i}")
        for i in range(config.num_hidden_layers)
    ]
    return (*before, f"{name}.rotary_emb"), units, (f"{name}.norm", HEAD.name)


def _balance(count: int, runs: int, cost) -> list[tuple[int, int]]:
    """Bounds of consecutive runs of `count` things whose largest `cost(start, stop)` is least."""
    costs = {(start, stop): cost(start, stop) for start in range(count) for stop in range(start + 1, count + 1)}
    best = {stop: (costs[0, stop], [(0, stop)]) for stop in range(1, count + 1)}
    for run in range(2, runs + 1):
        best = {
            stop: min(
                (max(best[start][0], costs[start, stop]), [*best[start][1], (start, stop)])
                for start in range(run - 1, stop)
            )
            for stop in range(run, count + 1)
        }
    return best[count][1]
