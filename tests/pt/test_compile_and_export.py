"""The model as one graph: compiled without breaks, exported with dynamic shapes, same numbers."""

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig, DynamicCache, StaticCache

from idefics_pt.cpu import onednn
from idefics_pt.export import DecodeStep, unpack_cache
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def split(inputs, at):
    """The first `at` positions with their images, and the rest, whose images are in the cache."""
    ids, mask, image_mask = (inputs[name] for name in ("input_ids", "attention_mask", "image_attention_mask"))
    first = {
        "input_ids": ids[:, :at],
        "attention_mask": mask[:, :at],
        "pixel_values": inputs["pixel_values"],
        "image_attention_mask": image_mask,
    }
    rest = {"input_ids": ids[:, at:], "attention_mask": mask, "image_attention_mask": image_mask[:, at:]}
    return first, rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_forward_compiles_without_a_break(dtype):
    model = our_model(dtype=dtype)
    inputs = torch_batch(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    bound = FLOAT32_ACTIVATIONS if dtype is torch.float32 else 2**-5
    assert relative_error(compiled(**inputs).logits.float(), model(**inputs).logits.float()) < bound


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@torch.no_grad()
def test_decode_step_compiles_without_a_break(cache_class):
    model = our_model()
    inputs = torch_batch(model.config)
    kwargs = {"max_cache_len": 16} if cache_class is StaticCache else {}
    first, rest = split(inputs, 8)
    cache = cache_class(config=model.config, **kwargs)
    model(**first, past_key_values=cache)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits = compiled(**rest, past_key_values=cache).logits[:, -1]
    assert relative_error(logits, model(**inputs).logits[:, -1]) < FLOAT32_ACTIVATIONS


def test_generation_with_a_compiled_step_on_a_static_cache():
    model = our_model()
    inputs = torch_batch(model.config)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
    counter = torch._dynamo.testing.CompileCounter()
    model.forward = torch.compile(model.forward, backend=counter)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
    assert counter.frame_count <= 3  # the prefill and the step, not one graph for every token


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here, which Inductor needs for the CPU")
@torch.no_grad()
def test_steps_of_a_fused_model_compiled_by_inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(onednn, "_LEAST_TALL", 0)  # so that fused weights lie by columns, as large ones do
    model = our_model(num_hidden_layers=2)
    inputs = torch_batch(model.config)
    expected = [step.logits for step in steps(model, inputs)]
    model.fuse_projections()
    assert not model.model.layers[0].mlp.fused.weight.is_contiguous()
    compiled = torch.compile(model, fullgraph=True)
    for actual, reference in zip(steps(compiled, inputs), expected, strict=True):
        assert relative_error(actual.logits, reference) < FLOAT32_ACTIVATIONS


def steps(model, inputs):
    """Outputs for eight positions and their images, which are not compiled, and then for each of the others."""
    first, _ = split(inputs, 8)
    cache = DynamicCache(config=model.config)
    yield getattr(model, "_orig_mod", model)(**first, past_key_values=cache)
    for i in range(8, inputs["input_ids"].shape[1]):
        yield model(
            input_ids=inputs["input_ids"][:, i : i + 1],
            attention_mask=inputs["attention_mask"][:, : i + 1],
            image_attention_mask=inputs["image_attention_mask"][:, i : i + 1],
            past_key_values=cache,
        )


def test_a_step_on_a_static_cache_is_one_graph_that_cuda_graphs_can_replay():
    """What `mode="reduce-overhead"` wants: one graph for all steps and prompts, which changes no input but those that
    stay in their places, and has no large ones that do not."""
    graphs = []

    def keep(graph, inputs):
        graphs.append((torch._guards.TracingContext.get().fw_metadata, inputs))
        return make_boxed_func(graph.forward)

    def backend(graph, inputs, mode):
        assert mode == "reduce-overhead"
        return aot_autograd(fw_compiler=keep)(graph, inputs)

    model = our_model()
    compiled = CompileConfig(fullgraph=True, backend=backend)
    compiled._compile_all_devices = True
    for seed, length in ((0, 9), (1, 9), (2, 7)):
        inputs = torch_batch(model.config, seed=seed)
        inputs |= {name: inputs[name][:, -length:] for name in inputs if name != "pixel_values"}
        expected = model.generate(**inputs, **GREEDY)
        ids = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compiled)
        assert torch.equal(ids, expected)
        assert len(graphs) == 1, f"compiled again for prompt {seed}"
    ((metadata, inputs),) = graphs
    static = set(metadata.static_input_indices)
    changed = {i for i, info in enumerate(metadata.input_info) if info.mutates_data}
    assert len(changed) == 3 * model.config.num_hidden_layers + 1  # keys, values, their number; what was seen
    assert changed <= static
    copied = [x for i, x in enumerate(inputs) if i not in static]
    assert not any(x.is_floating_point() for x in copied), [x.shape for x in copied]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_step_looks_at_whatever_images_it_is_told_to():
    model = our_model()
    inputs = torch_batch(model.config)
    first, rest = split(inputs, 8)

    def arguments(image_mask):
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
        return rest["input_ids"], rest["attention_mask"], image_mask, *unpack_cache(cache)

    class Logits(DecodeStep):
        def forward(self, *args):
            return super().forward(*args)[0]

    one, both = torch.zeros_like(rest["image_attention_mask"]), torch.ones_like(rest["image_attention_mask"])
    one[..., 0] = 1
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model), arguments(one), check_trace=False)
        assert relative_error(traced(*arguments(both)), Logits(model)(*arguments(both))) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_forward_exports_with_dynamic_shapes():
    model = our_model()
    inputs = torch_batch(model.config)
    rows, length, images = (torch.export.Dim(name, min=2, max=32) for name in ("rows", "length", "images"))
    shapes = {
        "input_ids": {0: rows, 1: length},
        "attention_mask": {0: rows, 1: length},
        "pixel_values": {0: rows, 1: images},
        "image_attention_mask": {0: rows, 1: length, 2: images},
        "use_cache": None,
    }
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes).module()
    other = torch_batch(model.config, seed=1)
    other = {name: torch.cat((value, value))[:5] for name, value in other.items()}
    for batch in (inputs, other):
        actual = program(**batch, use_cache=False).logits
        assert relative_error(actual, model(**batch).logits) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_decode_step_exports_with_dynamic_shapes():
    model = our_model()
    inputs = torch_batch(model.config)
    rows, past = torch.export.Dim("rows", min=2, max=32), torch.export.Dim("past", min=2, max=64)

    def arguments(at):
        first, rest = split(inputs, at)
        cache = model(**first, use_cache=True).past_key_values
        step = (value[:, : at + 1 if name == "attention_mask" else 1].contiguous() for name, value in rest.items())
        return (*step, *unpack_cache(cache))

    blocks = len(model.model.gated_cross_attn_layers)
    shapes = (
        {0: rows},
        {0: rows, 1: past + 1},
        {0: rows},
        [({0: rows, 2: past},) * 2] * model.config.num_hidden_layers,
        [({0: rows},) * 2] * blocks,
        {0: rows},
    )
    program = torch.export.export(DecodeStep(model), arguments(6), dynamic_shapes=shapes).module()
    expected = model(**inputs).logits
    for at in (6, 4, 8):
        logits, key_values = program(*arguments(at))
        assert relative_error(logits[:, 0], expected[:, at]) < FLOAT32_ACTIVATIONS
        assert key_values[0][0].shape[2] == at + 1


def test_a_cache_without_images_cannot_be_unpacked():
    with pytest.raises(ValueError, match="has seen no image"):
        unpack_cache(DynamicCache())
