"""int8 in PyTorch: what is quantised, how far it is from float32, and what it refuses."""

import copy
import io
import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from idefics_pt.cpu.int8 import Int8Linear, is_quantized
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import INT8_PT, relative_error


def quantized_model(**kwargs):
    model = our_model(**kwargs)
    model.quantize_int8()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_near_those_of_float32(dtype):
    quantized, plain = quantized_model(dtype=dtype), our_model()
    inputs = torch_batch(plain.config)
    with torch.inference_mode():
        error = relative_error(quantized(**inputs).logits.float(), plain(**inputs).logits)
    assert 1e-4 < error < INT8_PT  # if nothing was quantised, there would be no error


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_one_layer_is_rounded_to_its_own_grid(order):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 32, generator=generator), torch.randn(5, 32, generator=generator)
    weight[3] = 0.0
    x[1] *= 1000.0  # rows do not touch each other's precision
    bias = torch.randn(16, generator=generator)
    layer = Int8Linear(weight if order == "rows" else weight.t().contiguous().t(), bias)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (weight / scale).round() * scale, 0.0)
    low, high = x.aminmax(dim=1, keepdim=True)
    centre, step = (low + high) / 2, (high - low) / 254
    rounded_x = ((x - centre) / step).round() * step + centre
    for row in range(5):
        assert relative_error(layer(x)[row], rounded_x[row] @ rounded.T + bias) < 1e-5
    assert torch.equal(layer(x)[:, 3], bias[3].expand(5))
    assert torch.equal(layer(torch.zeros(2, 32)), bias.expand(2, 16))


def test_a_processor_that_would_be_wrong_is_refused():
    """oneDNN without VNNI saturates; the switch has to be set before oneDNN looks, so in another process."""
    code = (
        "import pytest\nfrom tests.pt.pairs import our_model\nmodel = our_model()\n"
        "with pytest.raises(ValueError, match='lacks VNNI'):\n    model.quantize_int8()\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_decoding_reads_is_quantised_and_nothing_else():
    model = quantized_model()
    names = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    layers, blocks = len(model.model.layers), len(model.model.gated_cross_attn_layers)
    assert len(names) == 7 * (layers + blocks) + 1
    assert not any("vision" in name or "perceiver" in name or "additional" in name for name in names)
    remaining = [name for name, _ in model.named_parameters() if "proj" in name]
    assert all("vision" in name or "perceiver" in name for name in remaining)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"additional_vocab_size": 0}])
def test_generates_with_and_without_a_cache_alike(overrides):
    model = quantized_model(**overrides)
    inputs = torch_batch(model.config)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(**inputs, **kwargs)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(copy.deepcopy(model).generate(**inputs, **kwargs, use_cache=False), ids)


def test_it_is_for_inference(tmp_path):
    model = quantized_model()
    inputs = torch_batch(model.config, with_labels=True)
    with pytest.raises(ValueError, match="quantised already"):
        model.quantize_int8()
    with pytest.raises(ValueError, match="is not saved"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        model(inputs_embeds=embeddings, **inputs)


@pytest.mark.parametrize("way", ["torch.save", "pickle", "spawn", "deepcopy"])
def test_e9_e10_a_quantised_model_can_be_pickled_and_copied(way):
    """As `torch.save` and processes that are given a model do; packed weights are not copied, but made again."""
    model = quantized_model(intermediate_size=45)  # odd, so that packing has something to fill up
    inputs, file = torch_batch(model.config), io.BytesIO()
    if way == "torch.save":
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        again = copy.deepcopy(model)
    else:
        again = pickle.loads(ForkingPickler.dumps(model))
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = our_model()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"down_proj has an adapter; merge adapters"):
        model.quantize_int8()
    assert not is_quantized(model)
