"""Fused projections are the same function, and are given back to whoever saves, loads, trains or quantises."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from idefics_pt import fused as module
from idefics_pt import layers as layers_module
from idefics_pt.cpu import onednn
from idefics_pt.cpu.onednn import by_columns
from idefics_pt.fused import FusedPart
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.tolerances import relative_error

TOLERANCE = 1e-5


@pytest.fixture(params=["rows", "columns"])
def order(request, monkeypatch):
    """Weights lie row by row or column by column, whatever is faster at their size."""
    for user in (module, layers_module):
        monkeypatch.setattr(user, "by_columns", lambda x: x if request.param == "rows" else x.t().contiguous().t())
    return request.param


def fused_model(**overrides):
    model = our_model(**overrides)
    model.fuse_projections()
    return model


def logits(model):
    with torch.inference_mode():
        return model(**torch_batch(model.config)).logits


def attention(model):
    return model.model.layers[0].self_attn


def test_one_weight_stands_in_for_several(order, monkeypatch):
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 0)
    calls, product = [], onednn._product
    monkeypatch.setattr(onednn, "_product", lambda *args: calls.append(args) or product(*args))
    plain, model = our_model(), our_model()
    expected = logits(plain)
    before = len(calls)
    model.fuse_projections()
    assert relative_error(logits(model), expected) < TOLERANCE
    blocks = len(model.model.layers), len(model.model.gated_cross_attn_layers)
    assert len(calls) == 2 * before - 3 * blocks[0] - blocks[1]
    assert attention(model).fused.weight.is_contiguous() == model.lm_head.weight.is_contiguous() == (order == "rows")
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() == plain.get_memory_footprint()


def test_its_state_is_that_of_the_layers(order, tmp_path):
    plain, model = our_model(), fused_model()
    expected, state = plain.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert attention(model).fused is not None
    plain.load_state_dict(state, assign=True)
    plain.train()
    assert all(parameter.is_contiguous() for parameter in plain.parameters())
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())


def test_a_state_is_loaded_into_the_layers(order):
    model, other = fused_model(), our_model(seed=1)
    model.load_state_dict(other.state_dict())
    assert attention(model).fused is None
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("way", ["train", "save_pretrained", "unfuse_projections", "quantize_int8"])
def test_the_layers_come_back_as_they_were(order, way, tmp_path):
    model = our_model()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    layers = dict(model.named_modules())
    model.fuse_projections()
    if way == "quantize_int8":
        other = our_model()
        other.quantize_int8()
        model.quantize_int8()
        assert torch.equal(logits(model), logits(other))
        return
    getattr(model, way)(*([tmp_path] if way == "save_pretrained" else []))
    assert dict(model.named_modules()) == layers
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert type(attention(model).q_proj) is nn.Linear


def test_it_trains_afterwards_with_an_optimizer_of_before(order):
    results = []
    for when in ("never", "before", "after"):
        model = our_model()
        inputs = torch_batch(model.config, with_labels=True)
        if when == "after":
            model.fuse_projections()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if when == "before":
            model.fuse_projections()
        logits(model)
        model.train()
        model(**inputs).loss.backward()
        optimizer.step()
        results.append(dict(model.named_parameters()))
    for trained in results[1:]:
        for name, expected in results[0].items():
            assert relative_error(trained[name].detach(), expected.detach(), least_scale=1e-3) < 1e-3, name


def test_gradients_of_fused_weights_are_refused(order):
    model = fused_model()
    loss = model(**torch_batch(model.config, with_labels=True)).loss
    with pytest.raises(RuntimeError, match=r"call train\(\) or unfuse_projections\(\) before"):
        loss.backward()
    model.requires_grad_(False)
    inputs = torch_batch(model.config)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
    gradients = []
    for _ in range(2):
        gradients += torch.autograd.grad(model(inputs_embeds=embeddings, **inputs).logits.pow(2).sum(), embeddings)
        model.unfuse_projections()
    assert relative_error(*gradients) < TOLERANCE


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "float64", "half way"])
def test_copies_and_conversions_stay_fused(order, way, tmp_path):
    model, expected = fused_model(), logits(our_model())
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    elif way == "float64":
        model.to(torch.float64)
        model.to(torch.float32)
    else:
        model.to(torch.float64).unfuse_projections()
        model.to(torch.float32)
    assert (attention(model).fused is None) == (way == "half way")
    assert relative_error(logits(model), expected) < TOLERANCE
    model.unfuse_projections()
    assert all(torch.equal(value, our_model().state_dict()[name]) for name, value in model.state_dict().items())


def test_hooks_hear_the_parts(order):
    model, heard = fused_model(), []
    layer = attention(model).k_proj
    layer.register_forward_hook(lambda layer, args, out: heard.append(type(layer)) or out.mul_(0.0))
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda layer, args, out: out.add_(1.0))
    other = our_model()
    attention(other).k_proj.weight.data.zero_()
    other.model.layers[0].mlp.gate_proj.register_forward_hook(lambda layer, args, out: out + 1.0)
    assert relative_error(logits(model), logits(other)) < TOLERANCE
    model.unfuse_projections()
    assert relative_error(logits(model), logits(other)) < TOLERANCE
    assert heard == [FusedPart, nn.Linear]


def test_layers_that_are_not_plain_are_left_alone():
    model = our_model()
    get_peft_model(model, LoraConfig(target_modules=r".*layers\.0\.self_attn\.q_proj", init_lora_weights=False))
    attention(model).o_proj.register_forward_hook(lambda *args: None)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)
    expected = logits(model)
    model.fuse_projections()
    assert attention(model).fused is None
    assert model.model.layers[1].mlp.fused is None
    assert model.model.layers[1].self_attn.fused is not None
    assert relative_error(logits(model), expected) < TOLERANCE
    quantized = our_model()
    quantized.quantize_int8()
    quantized.fuse_projections()
    assert not any(isinstance(layer, FusedPart) for layer in quantized.modules())


@pytest.mark.parametrize("way", ["functional_call", "assigned", "data", "prune", "parametrize", "replaced"])
def test_layers_that_are_changed_while_fused_are_refused(way):
    """Such a change has no effect on what the fused weight gives, and would be lost."""
    model = fused_model()
    layer = attention(model).q_proj
    weight = torch.zeros(layer.out_features, layer.in_features)
    state = None
    if way == "functional_call":
        state = our_model(seed=1).state_dict()
    elif way == "assigned":
        layer.weight = nn.Parameter(weight)
    elif way == "data":
        layer.weight.data = weight
    elif way == "prune":
        prune.identity(layer, "weight")
    elif way == "parametrize":
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    else:
        attention(model).q_proj = nn.Linear(layer.in_features, layer.out_features, bias=False)
    with pytest.raises(ValueError, match=r"changed while it is fused .* call unfuse_projections\(\) before"):
        functional_call(model, state or {}, kwargs=torch_batch(model.config))
    if state is None:
        with pytest.raises(ValueError, match="changed while it is fused"):
            model.unfuse_projections()
        assert type(attention(model).k_proj) is FusedPart


def test_a_part_that_is_made_trainable_while_fused_is_refused_gradients():
    model = our_model().requires_grad_(False)
    model.fuse_projections()
    attention(model).q_proj.requires_grad_(True)
    loss = model(**torch_batch(model.config, with_labels=True)).loss
    with pytest.raises(RuntimeError, match="their weights would get no gradients"):
        loss.backward()


def test_others_save_a_fused_model_whole(order, tmp_path):
    model, expected = fused_model(), our_model().state_dict()
    Accelerator(cpu=True).save_model(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    for file in ("model.safetensors", "other.safetensors"):
        saved = load_file(tmp_path / file)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_it_trains_after_it_was_taken_apart_in_inference_mode(order):
    model = fused_model()
    with torch.inference_mode():
        model.unfuse_projections()
    model.train()
    model(**torch_batch(model.config, with_labels=True)).loss.backward()
    assert attention(model).q_proj.weight.grad is not None


def test_a_model_is_offloaded_before_it_is_fused():
    model = fused_model()
    attention(model).fused.to("meta")
    with pytest.raises(ValueError, match="offload a model first, and fuse"):
        model.unfuse_projections()


def test_adapters_are_refused_by_name():
    model = fused_model()
    with pytest.raises(ValueError, match=r"adapters and tools need unfuse_projections\(\) first"):
        get_peft_model(model, LoraConfig(target_modules=r".*layers\.0\.self_attn\.q_proj"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("is_fused", [False, True])
def test_e1_torchs_dynamic_quantisation_finds_the_layers(is_fused):
    model = fused_model() if is_fused else our_model()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    kinds = [type(layer).__name__ for layer in quantized.modules()]
    assert not any(type(layer) is nn.Linear for layer in quantized.modules())
    assert kinds.count("Linear") == sum(type(layer) is nn.Linear for layer in model.modules())
    reference = torch.ao.quantization.quantize_dynamic(reference_model(), {nn.Linear})
    # no nearer: other images share the scale of an activation, other rows that of a fused weight
    expected = logits(our_model())
    assert 0.0 < relative_error(logits(quantized), expected) < 1.5 * relative_error(logits(reference), expected)
    if is_fused:
        with pytest.raises(ValueError, match="fused layer of q_proj, k_proj, v_proj was replaced by a Linear"):
            quantized.train()


def test_tall_weights_lie_by_columns():
    for rows, is_tall in ((2050, True), (3072, True), (4096, False), (6144, False), (1030, False)):
        assert by_columns(torch.empty(rows, 8)).stride() == ((1, rows) if is_tall else (8, 1))


def test_a_head_tied_to_the_embedding_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(layers_module, "by_columns", lambda x: x.t().contiguous().t())
    model = fused_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_contiguous()
