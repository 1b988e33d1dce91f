"""What `benchmarks.planning` says of memory is what PyTorch's models take; plans cover it once; the page agrees."""

import itertools
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.utils import check_device_map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.distributed import DistributedConfig

from benchmarks.planning.__main__ import with_tables
from benchmarks.planning.devices import pipeline_plan, tensor_parallel_bytes, tensor_parallel_shards
from benchmarks.planning.memory import image_bytes, inference_memory, text_cache_bytes_per_token, weight_bytes
from benchmarks.planning.sizes import PRECISIONS, Workload
from benchmarks.planning.training import is_trainable, training_memory
from idefics_common.configuration.fields import fields_from_dict, read_config
from idefics_common.parameters import Part, expand
from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text
from idefics_pt.cache import recall_images
from tests.models import MATRIX, small_config
from tests.pt.pairs import our_model

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
SHIPPED = ROOT / "examples" / "fashion" / "checkpoint"
BFLOAT16 = PRECISIONS["bfloat16"]
FROZEN = {"freeze_text_layers": True, "freeze_vision_layers": True}
PARAMETERS = {"config-370m.json": 371_121_544, "config-9b.json": 8_929_679_632, "config-80b.json": 79_967_843_624}


def fields(**overrides):
    return fields_from_dict(small_config(**overrides))


def inputs_of(config, workload: Workload) -> dict[str, torch.Tensor]:
    """Prompts of a workload; each row sees its images one after the other."""
    size, channels = config.vision_config.image_size, config.vision_config.num_channels
    rows, length, images = workload.batch, workload.text_tokens, workload.images
    inputs = {"input_ids": torch.full((rows, length), 5)}
    if images:
        mask_TI = (torch.arange(length) * images // length).unsqueeze(1) == torch.arange(images)
        inputs["pixel_values"] = torch.zeros((rows, images, channels, size, size))
        inputs["image_attention_mask"] = mask_TI.expand(rows, -1, -1)
    return inputs


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, bytes of tensors that operators allocate: `now`, and at most so far, `peak`.

    Args:
        known: tensors that were there before, whose memory and views do not count.
    """

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage.nbytes())
        return out

    def _forget(self, nbytes):
        self.now -= nbytes


@pytest.mark.parametrize(("file", "count"), PARAMETERS.items())
def test_weight_bytes_are_those_of_the_published_sizes(file, count):
    """A model on the meta device has shapes and no memory."""
    config = read_config(CONFIGS / file)
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**json.loads((CONFIGS / file).read_text())))
    total = {name: sum(weight_bytes(config, precision).values()) for name, precision in PRECISIONS.items()}
    assert total["float32"] == sum(parameter.nbytes for parameter in model.parameters()) == 4 * count
    assert total["bfloat16"] == total["float16"] == 2 * count
    linear = [
        layer.weight.shape
        for stack in (model.model.layers, model.model.gated_cross_attn_layers)
        for layer in stack.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    linear.append((config.vocab_size, config.hidden_size))
    values, scales = sum(rows * columns for rows, columns in linear), sum(rows for rows, _ in linear)
    assert total["int8"] == 2 * (count - values) + values + 4 * scales


def test_a_tied_head_is_counted_once():
    untied, tied = (weight_bytes(fields(tie_word_embeddings=is_tied), BFLOAT16) for is_tied in (False, True))
    assert untied[Part.HEAD] > 0
    assert tied == untied | {Part.HEAD: 0}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [*MATRIX, "shipped"])
def test_cache_bytes_are_those_of_real_caches(variant, precision):
    shipped = variant == "shipped"
    model = IdeficsForVisionText2Text.from_pretrained(SHIPPED) if shipped else our_model(**MATRIX[variant])
    model.to(getattr(torch, precision))
    workload, precision = Workload(batch=2, images=3, text_tokens=7), PRECISIONS[precision]
    with torch.no_grad():
        cache = model(**inputs_of(model.config, workload), use_cache=True).past_key_values
    layers = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert sum(x.nbytes for x in layers) == workload.positions * text_cache_bytes_per_token(model.config, precision)
    memory, expected = recall_images(cache), image_bytes(model.config, precision)
    assert sum(x.nbytes for pair in memory.key_values for x in pair) == workload.num_images * expected.key_values
    assert memory.hidden_states_BILE.nbytes == workload.num_images * expected.features
    held = inference_memory(model.config, precision, workload)
    assert held.prompt_cache == sum(x.untyped_storage().nbytes() for x in layers)
    assert held.images == workload.num_images * expected.total


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "workload",
    [Workload(2, 2, 500), Workload(1, 0, 900), Workload(1, 12, 60), Workload(3, 1, 300)],
    ids=["text", "no images", "images", "rows"],
)
def test_peak_of_a_prompt(workload, precision):
    """All tensors that are alive at once, within 15 %: views and temporaries of some operators are not modelled."""
    model = IdeficsForVisionText2Text.from_pretrained(SHIPPED, dtype=getattr(torch, precision)).eval()
    inputs = inputs_of(model.config, workload)
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        model(**inputs, use_cache=True, logits_to_keep=1)
    given = inputs["pixel_values"].nbytes if workload.images else 0
    predicted = inference_memory(model.config, PRECISIONS[precision], workload)
    assert live.peak + given == pytest.approx(predicted.peak - predicted.weights, rel=0.15)


def test_a_text_cache_grows_in_steps():
    """A prompt of 100 positions has 64 to spare, and the buffer after that holds 165 and 64 more."""
    per_token = text_cache_bytes_per_token(fields(), BFLOAT16)
    for new, expected in ((0, 164), (64, 164), (65, 229), (129, 229), (130, 294)):
        memory = inference_memory(fields(), BFLOAT16, Workload(text_tokens=100, new_tokens=new))
        assert (memory.prompt_cache, memory.full_cache) == (164 * per_token, expected * per_token)


@pytest.mark.parametrize("flags", [{}, FROZEN, {**FROZEN, "freeze_lm_head": True}, {"freeze_text_layers": True}])
@pytest.mark.parametrize("exceptions", [[], ["LayerNorm"], ["RMSNorm", "Embedding"], ["Linear"]])
def test_what_trains(flags, exceptions):
    names = ("freeze_text_module_exceptions", "freeze_vision_module_exceptions")
    flags = {"freeze_text_layers": False, "freeze_vision_layers": False} | flags | dict.fromkeys(names, exceptions)
    model = IdeficsForVisionText2Text(IdeficsConfig(**small_config(**flags)))
    expected = {name: parameter.nbytes for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {p.name for p in expand(model.config) if is_trainable(p, model.config)} == set(expected)
    memory = training_memory(model.config, PRECISIONS["float32"])
    assert (memory.gradients, memory.optimizer) == (sum(expected.values()), 2 * sum(expected.values()))
    assert memory.total == sum(parameter.nbytes for parameter in model.parameters()) + 3 * memory.gradients
    with pytest.raises(ValueError, match="weights in int8 do not train"):
        training_memory(model.config, PRECISIONS["int8"])


@pytest.mark.parametrize("variant", MATRIX)
@pytest.mark.parametrize("devices", [1, 3, 4])
def test_a_pipeline_plan_is_a_device_map_that_holds_everything_once(variant, devices):
    model, workload = our_model(**MATRIX[variant]), Workload(text_tokens=40)
    config = model.config
    stages = pipeline_plan(config, BFLOAT16, workload, devices)
    places = {module: device for device, stage in enumerate(stages) for module in stage.modules}
    check_device_map(model, places)
    with pytest.raises(ValueError, match="does not give any device"):
        check_device_map(model, {module: device for module, device in places.items() if device})
    assert [i for stage in stages for i in stage.layers] == list(range(config.num_hidden_layers))
    blocks = config.num_hidden_layers // config.cross_layer_interval
    assert [i for stage in stages for i in stage.blocks] == list(range(blocks))
    held = inference_memory(config, BFLOAT16, workload)
    again = sum(BFLOAT16.parameter_bytes(p) for p in expand(config) if p.tied_to) if devices > 1 else 0
    assert sum(stage.weight_bytes for stage in stages) == held.weights + again
    assert sum(stage.cache_bytes for stage in stages) == held.full_cache + held.images
    assert [stage.sent_bytes > 0 for stage in stages] == [True] * (devices - 1) + [False]


def test_a_pipeline_is_balanced_as_well_as_can_be():
    """Every other way to cut the layers has a fuller device; a long prompt, so that its cache counts."""
    config, workload = fields(num_hidden_layers=8), Workload(batch=2, images=3, text_tokens=300)
    stages = pipeline_plan(config, BFLOAT16, workload, 3)
    totals = [stage.total_bytes for stage in pipeline_plan(config, BFLOAT16, workload, 8)]
    every_cut = [
        max(sum(totals[:first]), sum(totals[first:second]), sum(totals[second:]))
        for first, second in itertools.combinations(range(1, 8), 2)
    ]
    assert max(stage.total_bytes for stage in stages) == min(every_cut)
    with pytest.raises(ValueError, match="a pipeline of 8 layers needs 1 to 8 devices, got 9"):
        pipeline_plan(config, BFLOAT16, workload, 9)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_tensor_parallel_shares_add_up(precision):
    config = read_config(CONFIGS / "config-9b.json")
    plan, whole = tensor_parallel_bytes(config, precision, 4), sum(weight_bytes(config, precision).values())
    scales_of_whole_outputs = sum(
        3 * 4 * parameter.shape[0]
        for parameter in expand(config)
        if precision.quantizes(parameter) and parameter.name.endswith(("o_proj.weight", "down_proj.weight"))
    )
    shares = 4 * (plan.device_bytes - plan.replicated_bytes)
    assert shares + plan.replicated_bytes == whole + scales_of_whole_outputs
    assert plan.all_reduces == 2 * 32 + 2 * 8 + 1
    assert plan.all_reduce_bytes == plan.all_reduces * 4096 * precision.bytes_per_value
    alone = tensor_parallel_bytes(config, precision, 1)
    assert (alone.all_reduce_bytes, alone.device_bytes) == (0, whole)
    with pytest.raises(ValueError, match=r"vision_config.num_attention_heads must be .* devices, got 10 and 4"):
        tensor_parallel_shards(read_config(CONFIGS / "config-370m.json"), 4)


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


def test_no_framework_is_imported():
    code = (
        "import sys, benchmarks.planning.__main__; assert not {'torch', 'keras', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_tables_of_the_page_are_made_from_the_formulae():
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert with_tables(page) == page
