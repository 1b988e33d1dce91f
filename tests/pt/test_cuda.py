"""What a GPU would be asked to do, shown without one: no step of decoding makes the host wait, no devices are mixed."""

from itertools import pairwise

import pytest
import torch
import transformers.masking_utils
from accelerate import dispatch_model
from transformers import DynamicCache, StaticCache

from idefics_pt.cache import recall_images, select_images
from idefics_pt.cpu import onednn
from idefics_pt.cpu.int8 import Int8Linear
from idefics_pt.cpu.onednn import project
from idefics_pt.growing_cache import GrowingCache
from idefics_pt.transfers import to_device
from tests.pt.fake_cuda import CUDA, FakeCuda
from tests.pt.pairs import our_model, torch_batch

STOP_TEST = "StopCheck.__call__"


@pytest.fixture(autouse=True)
def fakes_are_no_graph(monkeypatch):
    """transformers takes a fake tensor for a captured graph, and then leaves out what would make a host wait."""
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda tensor=None: False)


def on_cuda(cuda, **kwargs):
    """A model on a fake GPU and its inputs, with image states in place of pixels."""
    model = our_model(**kwargs)
    inputs = torch_batch(model.config)
    states = inputs.pop("pixel_values").new_empty((4, 2, 6, 20)).to(model.dtype)
    model = cuda.model(model)
    return model, {name: cuda.tensor(value) for name, value in {**inputs, "perceiver_embeddings": states}.items()}


def step_inputs(cuda, past: int):
    shapes = {"input_ids": (4, 1), "attention_mask": (4, past + 1), "image_attention_mask": (4, 1, 2)}
    with cuda:
        return {name: torch.empty(shape, dtype=torch.long, device=CUDA) for name, shape in shapes.items()}


CACHES = {
    "growing": lambda config: GrowingCache(),
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


@torch.no_grad()
@pytest.mark.parametrize("given", [("attention_mask", "image_attention_mask"), ("attention_mask",), ()])
@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("kind", CACHES)
def test_no_step_waits_for_the_gpu(kind, with_images, given):
    cuda = FakeCuda()
    model, inputs = on_cuda(cuda)
    if not with_images:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with cuda:
        cache = CACHES[kind](model.config)
        model(**inputs, past_key_values=cache)
    for past in (9, 10):
        step = step_inputs(cuda, past)
        kept = [name for name in given if with_images or name != "image_attention_mask"]
        cuda.waits.clear()
        with cuda:
            logits = model(step["input_ids"], **{name: step[name] for name in kept}, past_key_values=cache).logits
        assert cuda.waits == []
        assert (logits.device, logits.shape) == (CUDA, (4, 1, 100))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("with_images", [True, False])
def test_generate_waits_once_for_each_token(cache, with_images):
    """That is transformers' question whether all texts have ended."""
    asked = iter([False] * 4 + [True])
    cuda = FakeCuda(answers={STOP_TEST: lambda: next(asked)})
    model, inputs = on_cuda(cuda)
    if not with_images:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with cuda:
        ids = model.generate(
            **inputs,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
    assert ids.shape == (4, 9 + 5)
    questions = [i for i, (_, asker) in enumerate(cuda.waits) if asker == STOP_TEST]
    assert len(questions) == 5
    assert [later - earlier for earlier, later in pairwise(questions)] == [1] * 4
    assert questions[-1] == len(cuda.waits) - 1


WAITS = {
    "bool": bool,
    "int": int,
    "item": lambda x: x.item(),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "from the host": lambda x: torch.zeros(1).to(x.device),
    "made of a number": lambda x: torch.tensor(1.0, device=x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_watch_notices(name):
    cuda = FakeCuda()
    with cuda:
        x = torch.empty(1, device=CUDA)
        assert cuda.waits == []
        WAITS[name](x)
    assert len(cuda.waits) == 1


def test_the_watch_refuses_two_devices():
    with FakeCuda(), pytest.raises(RuntimeError, match="at least two devices"):
        torch.empty(2) + torch.empty(2, device=CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_attention_is_asked_for_such_that_flash_kernels_serve(dtype, monkeypatch):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **kwargs):
        calls.append((query, key, value, kwargs))
        return attention(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    cuda = FakeCuda(answers={"_ignore_causal_mask_sdpa": lambda: True})  # the prompts have no padding
    model, inputs = on_cuda(cuda, dtype=dtype)
    with cuda:
        cache = model(**inputs, use_cache=True).past_key_values
        text, calls[:] = [call for call in calls if call[0].shape[2] == call[1].shape[2]], []
        model(cuda.tensor(inputs["input_ids"][:, :1]), past_key_values=cache)
    steps = [call for call in calls if call[1].shape[2] == 10]
    assert len(text) == len(steps) == model.config.num_hidden_layers
    assert [call[3]["is_causal"] for call in text + steps] == [True] * len(text) + [False] * len(steps)
    for query, key, value, kwargs in text + steps:
        assert kwargs["attn_mask"] is None
        for x in (query, key, value):
            assert x.dtype == dtype
            assert x.dim() == 4
            assert x.stride(-1) == 1


HALVES = {
    "cuda:0": ["embed_tokens", "vision_model", "layers.0", "layers.1", "gated_cross_attn_layers.0", "rotary_emb"],
    "cuda:1": ["perceiver_resampler", "layers.2", "layers.3", "gated_cross_attn_layers.1", "norm"],
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by accelerate
@pytest.mark.parametrize("kind", CACHES)
def test_a_model_on_two_gpus_keeps_memory_where_each_layer_is(kind):
    devices = {f"model.{part}": device for device, parts in HALVES.items() for part in parts} | {"lm_head": "cuda:1"}
    cuda = FakeCuda()
    model = our_model()
    inputs = {name: cuda.tensor(value) for name, value in torch_batch(model.config).items()}
    cuda.model(model, lambda name: next(devices[part] for part in devices if f"{name}.".startswith(f"{part}.")))
    with cuda:
        dispatch_model(model, devices, main_device="cuda:0", skip_keys=model._skip_keys_device_placement)
        cache = CACHES[kind](model.config)
        model(**inputs, past_key_values=cache)
        for past in (9, 10):
            logits = model(**step_inputs(cuda, past), past_key_values=cache).logits
            assert logits.shape == (4, 1, 100)
        select_images(cache, torch.empty(3, dtype=torch.long, device=CUDA))
    text = [str(layer.keys.device) for layer in cache.layers]
    images = [str(key.device) for key, _ in recall_images(cache).key_values]
    assert (text, images) == (["cuda:0"] * 2 + ["cuda:1"] * 2, ["cuda:0", "cuda:1"])


def test_inputs_travel_from_pinned_memory():
    cuda = FakeCuda()
    batch = torch_batch(our_model().config)
    batch = {name: cuda.tensor(value, "cpu") for name, value in batch.items()}
    with cuda:
        moved = to_device({**batch, "max_new_tokens": 3}, CUDA)
    assert cuda.waits == []
    assert moved.pop("max_new_tokens") == 3
    assert {name: (value.shape, value.dtype) for name, value in moved.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }
    assert {value.device for value in moved.values()} == {CUDA}
    with cuda:
        batch["input_ids"].new_empty(2).to(CUDA, non_blocking=True)
    assert cuda.waits == [("to", "")]  # not from pinned memory


def test_inputs_that_stay_on_the_host_are_not_pinned():
    batch = torch_batch(our_model().config)
    moved = to_device(batch, "cpu")
    assert all(moved[name] is batch[name] for name in batch)


def test_linear_layers_and_caches_elsewhere_are_not_the_processors(monkeypatch):
    """On another device, `meta` for want of one: no oneDNN, and int8 is refused."""

    def refuse(*args):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(onednn, "_product", refuse)
    x, layer = torch.empty(2, 3, 24, device="meta"), torch.nn.Linear(24, 16, device="meta")
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert project(layer, x).shape == (2, 3, 16)
    cache = GrowingCache()
    with torch.no_grad():
        for length in (5, 6, 75):
            keys, _ = cache.update(*[torch.empty(2, 3, length - cache.get_seq_length(), 4, device="meta")] * 2, 0)
            assert (keys.shape, keys.device.type) == ((2, 3, length, 4), "meta")
    with pytest.raises(RuntimeError, match="int8 for the CPU; got inputs on meta"):
        Int8Linear(torch.ones(16, 24))(x)
    with pytest.raises(ValueError, match="for the CPU; the model is on meta"):
        our_model().to("meta").quantize_int8()
