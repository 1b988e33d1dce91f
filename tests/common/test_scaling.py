"""Costs on paper: they add up, plans cover the model once, and the page of them is the module's own."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import put_between_marks
from idefics_common.configuration.fields import fields_from_dict, read_config
from idefics_common.parameters import Kind, Part, iterate
from idefics_common.scaling import (
    PRECISIONS,
    CallSeconds,
    Hardware,
    Parts,
    Workload,
    decode_bytes,
    decode_kernels,
    decode_multiply_adds,
    decode_seconds,
    expected_decode_seconds,
    expected_first_token_seconds,
    first_token_kernels,
    first_token_seconds,
    inference_memory,
    pipeline_plan,
    tensor_parallel_bytes,
    tensor_parallel_shards,
    text_cache_bytes_per_token,
    training_memory,
    vision_multiply_adds,
    weight_bytes,
)
from tests.models import MATRIX, small_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
PARAMETERS = {"config-370m.json": 371_121_544, "config-9b.json": 8_929_679_632, "config-80b.json": 79_967_843_624}
BFLOAT16 = PRECISIONS["bfloat16"]


def fields(**overrides):
    return fields_from_dict(small_config(**overrides))


@pytest.mark.parametrize(("file", "count"), PARAMETERS.items())
def test_weight_bytes(file, count):
    config = read_config(CONFIGS / file)
    total = {name: sum(weight_bytes(config, precision).values()) for name, precision in PRECISIONS.items()}
    assert total["float32"] == 4 * count
    assert total["bfloat16"] == total["float16"] == 2 * count
    kernels = [
        parameter.shape
        for parameter in iterate(config)
        if parameter.name.startswith(("model.layers.", "model.gated_cross_attn_layers.")) and len(parameter.shape) == 2
    ]
    kernels.append((config.vocab_size, config.hidden_size))
    values, scales = sum(rows * columns for rows, columns in kernels), sum(rows for rows, _ in kernels)
    assert total["int8"] == 2 * (count - values) + values + 4 * scales


def test_a_tied_head_is_counted_once_and_read_whole():
    untied, tied = fields(), fields(tie_word_embeddings=True)
    head = weight_bytes(untied, BFLOAT16)[Part.HEAD]
    assert weight_bytes(tied, BFLOAT16) == weight_bytes(untied, BFLOAT16) | {Part.HEAD: 0}
    assert head > 0
    assert decode_bytes(tied, BFLOAT16, Workload()) == decode_bytes(untied, BFLOAT16, Workload())


def test_decoding_reads_what_the_benchmarks_call_its_limit():
    """Matrices of decoder, gated blocks and head without projections of images; norms, of one axis, come on top."""
    config = read_config(CONFIGS / "config-370m.json")
    width, hidden = config.hidden_size, config.intermediate_size
    mlp = 3 * width * hidden
    matrices = 16 * (4 * width**2 + mlp) + 4 * (2 * width**2 + mlp) + 32_002 * width
    norms = sum(
        p.size for p in iterate(config) if p.part in (Part.DECODER, Part.CROSS_ATTENTION) and p.kind is Kind.RMS_NORM
    )
    image_norms, gates = 4 * 64, 4 * 2
    found = decode_bytes(config, PRECISIONS["float32"], Workload(batch=3, images=2, text_tokens=9))
    assert found.weights == 4 * (matrices + norms - image_norms + gates)
    assert found.text_cache == 3 * 10 * 2 * 16 * width * 4
    assert found.images == 3 * 2 * 2 * 4 * 64 * width * 4
    assert found.total == found.weights + found.text_cache + found.images


def test_times_are_of_the_slower_limit():
    config = fields()
    slow_memory = Hardware("slow memory", bytes_per_second=1e3, multiply_adds_per_second=1e15)
    slow_arithmetic = Hardware("slow arithmetic", bytes_per_second=1e15, multiply_adds_per_second=1e3)
    workload = Workload(batch=2, images=2, text_tokens=5)
    expected = decode_bytes(config, BFLOAT16, workload).total / 1e3
    assert decode_seconds(config, BFLOAT16, workload, slow_memory) == pytest.approx(expected)
    expected = decode_multiply_adds(config, workload) / 1e3
    assert decode_seconds(config, BFLOAT16, workload, slow_arithmetic) == pytest.approx(expected)
    first = first_token_seconds(config, BFLOAT16, workload, slow_arithmetic)
    assert first.vision == pytest.approx(4 * vision_multiply_adds(config) / 1e3)
    assert first.total == first.vision + first.resampler + first.image_key_values + first.text


def test_expected_times_add_up():
    """Each operation takes its multiply-adds in nanoseconds, or a microsecond if it has none."""
    config, workload = fields(), Workload(batch=2, images=2, text_tokens=5)
    calls = CallSeconds(call=1.0, vision_layer=0.1, resampler_block=0.01, layer=0.001, block=0.0001)
    layers, blocks, vision_layers, resampler_blocks = 4, 2, config.vision_config.num_hidden_layers, 2
    assert config.perceiver_config.resampler_depth == resampler_blocks

    def seconds(kernels):
        return {kernel: 1e-9 * kernel.multiply_adds or 1e-6 for kernel in kernels}

    kernels = decode_kernels(config, workload)
    passes = sum(count for kernel, count in kernels.items() if not kernel.multiply_adds)
    expected = 1 + 0.001 * layers + 0.0001 * blocks + 1e-9 * decode_multiply_adds(config, workload) + 1e-6 * passes
    assert expected_decode_seconds(config, workload, seconds(kernels), calls) == pytest.approx(expected)

    kernels = first_token_kernels(config, workload)
    with_images = expected_first_token_seconds(config, workload, seconds(kernels), calls)
    of_kernels = sum(count * seconds(kernels)[kernel] for kernel, count in kernels.items())
    in_images = 0.1 * vision_layers + 0.01 * resampler_blocks
    assert with_images == pytest.approx(of_kernels + 1 + in_images + 0.001 * layers + 0.0001 * blocks)
    of_text = replace(workload, images=0)
    kernels = first_token_kernels(config, of_text)
    without = expected_first_token_seconds(config, of_text, seconds(kernels), calls)
    of_kernels = sum(count * seconds(kernels)[kernel] for kernel, count in kernels.items())
    assert without == pytest.approx(of_kernels + 1 + 0.001 * layers + 0.0001 * blocks)


def test_calls_are_told_apart_by_models_of_several_depths():
    known = CallSeconds(call=3.0, vision_layer=0.5, resampler_block=0.25, layer=2.0, block=1.0)
    depths = [Parts(1, 2, 1, 2, 2), Parts(1, 10, 1, 2, 2), Parts(1, 2, 9, 2, 2), Parts(1, 2, 1, 10, 2)]
    depths.append(Parts(1, 2, 1, 10, 10))
    assert known.of(depths[0]) == 3 + 2 * 0.5 + 0.25 + 2 * 2 + 2 * 1
    found = CallSeconds.fitted((parts, known.of(parts)) for parts in depths)
    assert vars(found) == pytest.approx(vars(known))
    step = CallSeconds.fitted((replace(parts, vision_layers=0, resampler_blocks=0), parts.layers) for parts in depths)
    assert vars(step) == pytest.approx(vars(CallSeconds(0, 0, 0, 1, 0)), abs=1e-9)


def test_padded_images_take_memory_but_no_time():
    config, hardware = fields(), Hardware("any", 1e6, 1e6)
    all_real = Workload(batch=4, images=4)
    padded = replace(all_real, encoded_images=7)
    real, some = (first_token_seconds(config, BFLOAT16, w, hardware) for w in (all_real, padded))
    assert some.vision < real.vision
    assert some.text == real.text
    held_real, held = (inference_memory(config, BFLOAT16, w) for w in (all_real, padded))
    assert held.images == held_real.images
    assert held.encoding < held_real.encoding
    none = first_token_seconds(config, BFLOAT16, Workload(images=0), hardware)
    assert none.total == none.text


def test_quantised_weights_do_not_train():
    with pytest.raises(ValueError, match="weights in int8 do not train"):
        training_memory(fields(), PRECISIONS["int8"], Workload())


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"text_tokens": 0}, {"images": -1}, {"new_tokens": -1}])
def test_impossible_workloads_are_refused(wrong):
    with pytest.raises(ValueError, match="a workload needs a row, a token, and no negative number"):
        Workload(**wrong)


def test_more_encoded_images_than_images_are_refused():
    with pytest.raises(ValueError, match=r"from 0 to batch \* images = 6, got 7"):
        Workload(batch=2, images=3, encoded_images=7)


def test_a_new_token_may_read_fewer_images():
    config, workload = fields(), Workload(batch=2, images=4)
    one = replace(workload, attended_images=1)
    assert decode_bytes(config, BFLOAT16, one).images * 4 == decode_bytes(config, BFLOAT16, workload).images
    assert inference_memory(config, BFLOAT16, one) == inference_memory(config, BFLOAT16, workload)
    with pytest.raises(ValueError, match="attended_images must be from 0 to images = 4, got 5"):
        replace(workload, attended_images=5)


def test_a_text_cache_grows_in_steps():
    """A prompt of 100 positions has 64 to spare, and the buffer after that holds 165 and 64 more."""
    config, per_token = fields(), text_cache_bytes_per_token(fields(), BFLOAT16)
    for new, expected in ((0, 164), (64, 164), (65, 229), (129, 229), (130, 294)):
        memory = inference_memory(config, BFLOAT16, Workload(text_tokens=100, new_tokens=new))
        assert memory.prompt_cache == 164 * per_token
        assert memory.full_cache == expected * per_token


@pytest.mark.parametrize("variant", MATRIX)
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_a_pipeline_holds_everything_once(variant, devices):
    config = fields(**MATRIX[variant])
    stages = pipeline_plan(config, BFLOAT16, Workload(text_tokens=40), devices)
    assert len(stages) == devices
    assert [i for stage in stages for i in stage.layers] == list(range(config.num_hidden_layers))
    blocks = config.num_hidden_layers // config.cross_layer_interval
    assert [i for stage in stages for i in stage.blocks] == list(range(blocks))
    modules = [module for stage in stages for module in stage.modules]
    for parameter in iterate(config):
        assert sum(parameter.name.startswith(f"{module}.") for module in modules) == 1
    held = inference_memory(config, BFLOAT16, Workload(text_tokens=40))
    again = sum(BFLOAT16.parameter_bytes(p) for p in iterate(config) if p.tied_to) if devices > 1 else 0
    assert sum(stage.weight_bytes for stage in stages) == held.weights + again
    assert sum(stage.cache_bytes for stage in stages) == held.full_cache + held.images
    assert [stage.sent_bytes > 0 for stage in stages] == [True] * (devices - 1) + [False]


def test_a_pipeline_is_balanced_as_well_as_can_be():
    """Every other way to cut the layers has a fuller device; a long prompt, so that its cache counts."""
    config, workload = fields(num_hidden_layers=8), Workload(batch=2, images=3, text_tokens=300)
    stages = pipeline_plan(config, BFLOAT16, workload, 3)
    singles = pipeline_plan(config, BFLOAT16, workload, 8)
    totals = [stage.total_bytes for stage in singles]
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
    plan = tensor_parallel_bytes(config, precision, 4)
    scales_of_whole_outputs = sum(
        3 * 4 * parameter.shape[0]
        for parameter in iterate(config)
        if precision.quantizes(parameter) and parameter.name.endswith(("o_proj.weight", "down_proj.weight"))
    )
    assert plan.split_bytes + plan.replicated_bytes == sum(weight_bytes(config, precision).values())
    shares = 4 * (plan.device_bytes - plan.replicated_bytes)
    assert shares == plan.split_bytes + scales_of_whole_outputs
    assert plan.all_reduces == 2 * 32 + 2 * 8 + 1
    assert plan.all_reduce_bytes == plan.all_reduces * 4096 * precision.bytes_per_value
    assert plan.traffic_bytes == plan.all_reduce_bytes * 3 // 2
    alone = tensor_parallel_bytes(config, precision, 1)
    assert (alone.traffic_bytes, alone.device_bytes) == (0, plan.split_bytes + plan.replicated_bytes)


def test_tensor_parallelism_needs_whole_heads():
    with pytest.raises(ValueError, match=r"vision_config.num_attention_heads must be .* devices, got 10 and 4"):
        tensor_parallel_shards(read_config(CONFIGS / "config-370m.json"), 4)


def test_no_framework_is_imported():
    code = "import sys, idefics_common.scaling; assert not {'torch', 'keras', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_tables_of_the_page_are_made_from_the_module():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert put_between_marks(page) == page


def test_measured_rows_are_as_close_as_the_page_says():
    """Within 15 % of the prediction, but for those that the page names before the table."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    prose = page.partition("## Held against measurement")[2].partition("<!-- measured:")[0]
    outside = [row["what"] for row in rows if not 0.85 <= row["measured"] / row["predicted"] <= 1.15]
    assert len(rows) == 26
    assert [what for what in outside if f"`{what}`" not in prose] == []
