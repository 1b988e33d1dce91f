"""What `idefics_common.scaling` says of memory and operations is what this room's models take."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.utils import check_device_map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.distributed import DistributedConfig

from benchmarks.kernel_times import KernelTimes
from idefics_common.parameters import iterate
from idefics_common.scaling import (
    PRECISIONS,
    Workload,
    decode_kernels,
    decode_multiply_adds,
    first_token_kernels,
    image_bytes,
    image_key_value_multiply_adds,
    inference_memory,
    is_trainable,
    pipeline_plan,
    prefill_multiply_adds,
    resampler_multiply_adds,
    tensor_parallel_bytes,
    tensor_parallel_shards,
    text_cache_bytes_per_token,
    training_memory,
    vision_multiply_adds,
    weight_bytes,
)
from idefics_common.scaling.kernels import LAYER_NORM, RMS_NORM, SILU, SUM, Attention, Pass, Product
from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text
from idefics_pt.cache import recall_images
from tests.models import MATRIX, small_config
from tests.pt.live_bytes import LiveBytes
from tests.pt.pairs import our_model

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
SHIPPED = ROOT / "examples" / "fashion" / "checkpoint"
FROZEN = {"freeze_text_layers": True, "freeze_vision_layers": True}


def model_without_memory(file: str) -> IdeficsForVisionText2Text:
    """A published size on the meta device, where tensors have shapes only."""
    config = IdeficsConfig(**json.loads((CONFIGS / file).read_text()))
    with torch.device("meta"):
        return IdeficsForVisionText2Text(config).eval().requires_grad_(False)


def inputs_of(config, workload: Workload, device="cpu") -> dict[str, torch.Tensor]:
    """Prompts of a workload; each row sees its images one after the other."""
    size, channels = config.vision_config.image_size, config.vision_config.num_channels
    rows, length, images = workload.batch, workload.text_tokens, workload.images
    current_T = torch.arange(length) * max(images, 1) // length
    mask_TI = current_T.unsqueeze(1) == torch.arange(images)
    return {
        "input_ids": torch.full((rows, length), 5, device=device),
        "pixel_values": torch.zeros((rows, images, channels, size, size), device=device),
        "image_attention_mask": mask_TI.expand(rows, -1, -1).to(device),
    }


def multiply_adds(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def saved_bytes(model, call) -> int:
    """Bytes that autograd keeps in a forward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("file", ["config-9b.json", "config-80b.json", "config-370m.json"])
def test_weight_bytes_are_those_of_the_model(file, precision):
    model = model_without_memory(file).to(getattr(torch, precision))
    expected = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(weight_bytes(model.config, PRECISIONS[precision]).values()) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", MATRIX)
def test_cache_bytes_are_those_of_real_caches(variant, precision):
    model = our_model("cpu", "sdpa", **MATRIX[variant]).to(getattr(torch, precision))
    check_caches(model, PRECISIONS[precision])


def test_cache_bytes_of_the_shipped_model():
    check_caches(IdeficsForVisionText2Text.from_pretrained(SHIPPED), PRECISIONS["float32"])


def check_caches(model, precision):
    workload = Workload(batch=2, images=3, text_tokens=7)
    with torch.no_grad():
        cache = model(**inputs_of(model.config, workload), use_cache=True).past_key_values
    layers = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert sum(x.nbytes for x in layers) == workload.positions * text_cache_bytes_per_token(model.config, precision)
    memory, expected = recall_images(cache), image_bytes(model.config, precision)
    count = workload.batch * workload.images
    assert sum(x.nbytes for pair in memory.key_values for x in pair) == count * expected.key_values
    assert memory.hidden_states_BILE.nbytes == count * expected.features
    assert sum(images.nbytes for _, images in memory.sources) == count * expected.pixels
    held = inference_memory(model.config, precision, workload)
    assert held.prompt_cache == sum(x.untyped_storage().nbytes() for x in layers)
    assert held.images == count * expected.total


def check_operations(model, workload, device):
    """Vision, resampler, keys and values, prompt and one new token, each to the last multiply-add."""
    config, inputs = model.config, inputs_of(model.config, workload, device)
    flat = inputs["pixel_values"].flatten(0, 1)
    assert multiply_adds(lambda: model.model.vision_model(flat)) == len(flat) * vision_multiply_adds(config)
    encoding = vision_multiply_adds(config) + resampler_multiply_adds(config)
    assert multiply_adds(lambda: model.encode_images(inputs["pixel_values"])) == len(flat) * encoding
    outputs = []
    counted = multiply_adds(lambda: outputs.append(model(**inputs, use_cache=True, logits_to_keep=1)))
    of_images = len(flat) * (encoding + image_key_value_multiply_adds(config))
    assert counted == of_images + prefill_multiply_adds(config, workload)
    step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": outputs[0].past_key_values}
    assert multiply_adds(lambda: model(**step)) == decode_multiply_adds(config, workload)
    text = Workload(workload.batch, 0, workload.text_tokens)
    counted = multiply_adds(lambda: model(input_ids=inputs["input_ids"], logits_to_keep=1))
    assert counted == prefill_multiply_adds(config, text)


@pytest.mark.parametrize("variant", ["base", "no_resampler", "every_fourth_layer", "no_added_vocabulary", "tied"])
def test_operations_of_small_models(variant):
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**small_config(**MATRIX[variant])))
    check_operations(model.eval().requires_grad_(False), Workload(2, 3, 11), "meta")


def test_a_new_token_reads_the_one_image_it_sees():
    """On the CPU; counted as products of matrices, which is how eager attention would do it, without softmax."""
    model, workload = our_model(), Workload(2, 3, 11, attended_images=1)
    with torch.no_grad():
        cache = model(**inputs_of(model.config, workload), use_cache=True).past_key_values
    step = {"input_ids": torch.full((2, 1), 5), "past_key_values": cache}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert multiply_adds(lambda: model(**step)) == decode_multiply_adds(model.config, workload)


@pytest.mark.parametrize("file", ["config-9b.json", "config-80b.json"])
def test_operations_of_published_sizes(file):
    check_operations(model_without_memory(file), Workload(2, 2, 130), "meta")


class Recorded(TorchDispatchMode):
    """The operators that a model calls, in the terms of `idefics_common.scaling.kernels`.

    Attributes:
        kernels: a Counter, without sums. sums: values that sums, products with gates and copies make, all together.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.sums = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "linear":
            self.kernels[Product(math.prod(args[0].shape[:-1]), args[0].shape[-1], len(args[1]))] += 1
        elif name == "conv2d":
            self.kernels[Product(out.numel() // len(args[1]), args[1][0].numel(), len(args[1]))] += 1
        elif name == "scaled_dot_product_attention":
            batch, heads, queries, width = args[0].shape
            mask, _, is_causal = (*args[3:6], *(None, 0.0, False)[len(args) - 3 :])
            shape = (batch, heads, queries, args[1].shape[2], width)
            self.kernels[Attention(*shape, is_causal=is_causal, has_mask=mask is not None)] += 1
        elif name == "layer_norm" or name == "silu" or (name == "mul" and args[0].dim() == 1):
            kind = {"layer_norm": LAYER_NORM, "silu": SILU, "mul": RMS_NORM}[name]  # its product with the weight
            self.kernels[Pass(kind, out.numel() // out.shape[-1], out.shape[-1])] += 1
        elif name in ("add", "mul", "addcmul", "roll", "copy_", "cat", "where", "masked_fill", "embedding", "relu"):
            is_in_norm = name == "mul" and args[0].shape[-1:] == (1,)
            self.sums += 0 if is_in_norm or not out.is_floating_point() else out.numel()
        return out


def check_kernels(call, expected):
    """All products, attentions and norms with their shapes; sums within 2 %: tables of angles are not counted."""
    with (
        torch.inference_mode(),
        Recorded() as recorded,
        torch.backends.mkldnn.flags(enabled=False),
    ):  # the operators that torch documents
        call()
    sums = sum(count * kernel.rows * kernel.width for kernel, count in expected.items() if kernel[0] == SUM)
    others = Counter()
    for kernel, count in expected.items():
        if kernel[0] != SUM:
            plain = kernel._replace(with_gelu=False, is_fused=False) if isinstance(kernel, Product) else kernel
            others[plain] += count
    assert recorded.kernels == others
    assert recorded.sums == pytest.approx(sums, rel=0.02)


@pytest.mark.parametrize("variant", ["shipped", "no resampler, no norms", "no added vocabulary"])
def test_kernels_are_the_operators_that_a_model_calls(variant):
    overrides = {
        "shipped": {},
        "no resampler, no norms": {"use_resampler": False, "qk_layer_norms": False},
        "no added vocabulary": {"additional_vocab_size": 0},
    }
    config = IdeficsConfig.from_pretrained(SHIPPED)
    config.update(overrides[variant])
    model = IdeficsForVisionText2Text(config).eval()
    model.fuse_projections()
    workload, caches = Workload(2, 3, 36, attended_images=1), []
    inputs = inputs_of(config, workload)
    check_kernels(
        lambda: caches.append(model(**inputs, use_cache=True, logits_to_keep=1).past_key_values),
        first_token_kernels(config, workload),
    )
    step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": caches[0], "use_cache": True}
    check_kernels(lambda: model(**step), decode_kernels(config, workload))
    text = Workload(1, 0, 20)
    ids = torch.full((1, 20), 5)
    check_kernels(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True), first_token_kernels(config, text))


@pytest.mark.parametrize(
    "kernel",
    [
        Product(3, 128, 48),
        Product(3, 128, 64, with_gelu=True),
        Product(1, 8, 3000, is_fused=True),
        Attention(2, 4, 5, 7, 16, has_mask=True),
        Attention(2, 4, 5, 5, 16, is_causal=True),
        Attention(1, 2, 1, 9, 16),
        *(Pass(kind, 6, 32) for kind in (LAYER_NORM, RMS_NORM, SILU, SUM)),
    ],
)
def test_what_the_benchmark_times_is_the_kernel(kernel):
    timer = KernelTimes(torch.ones(2**16), IdeficsConfig.from_pretrained(SHIPPED))
    expected = Counter({kernel: 1})
    check_kernels(lambda: timer.make(kernel)(0), expected)
    assert min(timer.seconds(kernel)) > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "workload",
    [Workload(2, 2, 500), Workload(1, 0, 900), Workload(1, 12, 60), Workload(3, 1, 300, is_padded=True)],
    ids=["text", "no images", "images", "padded"],
)
def test_peak_of_a_prompt(workload, precision):
    """All tensors that are alive at once, within 15 %: views and temporaries of some operators are not modelled."""
    model = IdeficsForVisionText2Text.from_pretrained(SHIPPED, dtype=getattr(torch, precision)).eval()
    inputs = inputs_of(model.config, workload)
    if workload.images == 0:
        inputs = {"input_ids": inputs["input_ids"]}
    if workload.is_padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :10] = 0
    given = inputs["pixel_values"].nbytes if workload.images else 0
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        model(**inputs, use_cache=True, logits_to_keep=1)
    predicted = inference_memory(model.config, PRECISIONS[precision], workload)
    assert live.peak + given == pytest.approx(predicted.peak - predicted.weights, rel=0.15)


@pytest.mark.parametrize("flags", [{}, FROZEN, {**FROZEN, "freeze_lm_head": True}, {"freeze_text_layers": True}])
@pytest.mark.parametrize("exceptions", [[], ["LayerNorm"], ["RMSNorm", "Embedding"], ["Linear"]])
def test_what_trains(flags, exceptions):
    names = ("freeze_text_module_exceptions", "freeze_vision_module_exceptions")
    flags = {"freeze_text_layers": False, "freeze_vision_layers": False} | flags | dict.fromkeys(names, exceptions)
    model = IdeficsForVisionText2Text(IdeficsConfig(**small_config(**flags)))
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {p.name for p in iterate(model.config) if is_trainable(p, model.config)} == expected


@pytest.fixture
def nothing_recomputed(monkeypatch):
    """What layers keep everywhere but for float32 on the CPU, see `idefics_pt.cpu.recomputed`."""
    monkeypatch.setattr("idefics_pt.cpu.recomputed.is_plain", lambda *args: False)
    monkeypatch.setattr("idefics_pt.cpu.recomputed.suits_onednn", lambda *args: False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [{}, FROZEN, {"freeze_vision_layers": True}, {"qk_layer_norms": False, "use_resampler": False}],
    ids=["all trains", "frozen", "vision frozen", "no norms, no resampler"],
)
def test_saved_activations(nothing_recomputed, overrides, precision):
    """Within 5 %: positions, masks and statistics of small norms are not modelled."""
    config = IdeficsConfig.from_pretrained(SHIPPED)
    config.update({"freeze_text_layers": False, "freeze_vision_layers": False, **overrides})
    model = IdeficsForVisionText2Text(config).to(getattr(torch, precision)).train()
    workload = Workload(batch=2, images=2, text_tokens=96)
    inputs = inputs_of(config, workload)
    labels = inputs["input_ids"]
    predicted = training_memory(config, PRECISIONS[precision], workload)
    log_probabilities = 4 * workload.positions * (config.vocab_size + config.additional_vocab_size)
    measured = saved_bytes(model, lambda: model(**inputs, labels=labels, use_cache=False))
    assert measured == pytest.approx(predicted.activations + log_probabilities, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_training_step(nothing_recomputed, checkpointing):
    config = IdeficsConfig.from_pretrained(SHIPPED)
    model = IdeficsForVisionText2Text(config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    workload = Workload(batch=4, images=2, text_tokens=256)
    inputs = inputs_of(config, workload)
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    predicted = training_memory(config, PRECISIONS["float32"], workload, checkpointing)
    assert live.peak == pytest.approx(predicted.peak - predicted.weights - predicted.optimizer, rel=0.15)


@pytest.mark.parametrize("variant", ["base", "no_resampler", "tied"])
def test_a_pipeline_plan_is_a_device_map(variant):
    model = our_model(**MATRIX[variant])
    stages = pipeline_plan(model.config, PRECISIONS["float32"], Workload(), 3)
    devices = {module: device for device, stage in enumerate(stages) for module in stage.modules}
    check_device_map(model, devices)
    with pytest.raises(ValueError, match="does not give any device"):
        check_device_map(model, {module: device for module, device in devices.items() if device})


@pytest.fixture
def rank_of_two():
    """One process that takes itself for the first of two; collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_parallel_shards_are_those_of_the_model(tied, tmp_path, rank_of_two):
    perceiver = {**small_config()["perceiver_config"], "resampler_n_heads": 4}
    overrides = {"num_attention_heads": 4, "perceiver_config": perceiver, "vocab_size": 96, "tie_word_embeddings": tied}
    config = IdeficsConfig(**small_config(**overrides))
    IdeficsForVisionText2Text(config).save_pretrained(tmp_path)
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_size=2))
    axes = tensor_parallel_shards(config, 2)
    local = {}
    for name, parameter in model.named_parameters():
        placed = parameter.placements[0] if hasattr(parameter, "placements") else None
        split = placed is not None and placed.is_shard()
        assert axes[name] == (placed.dim % parameter.dim() if split else None), name
        local[name] = (parameter.to_local() if placed is not None else parameter).nbytes
    plan = tensor_parallel_bytes(config, PRECISIONS["float32"], 2)
    assert sum(local.values()) == plan.device_bytes
