"""Row E9: what wraps, copies, replicates, compiles in part or traces a model leaves its values as they are."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from idefics_pt.image_encoding import compute_device
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, FLOAT32_GRADIENTS, relative_error

GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}


def replica(model):
    """A copy as `torch.nn.parallel.replicate` makes for each GPU: no parameters, but views of them as attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = copies.get(child)
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.view_as(parameter))
    assert not list(copies[model].parameters())
    return copies[model]


def rows(inputs, *chosen):
    return {name: tensor[list(chosen)] for name, tensor in inputs.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("overrides", [{}, {"use_resampler": False, "tie_word_embeddings": True}])
def test_e9_replicas_compute_their_rows_and_gradients(overrides, attention):
    model = our_model(attention=attention, **overrides)
    inputs = torch_batch(model.config)
    logits = model(**inputs).logits
    logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for form in (dict, model.encode_images):  # images as pixels, and encoded before
        if form is not dict:
            name = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
            inputs[name] = form(inputs.pop("pixel_values")).detach()
        outputs = [replica(model)(**rows(inputs, *chosen)) for chosen in ((0, 1), (2, 3))]  # row 1 has no image
        # as DataParallel puts dictionaries together: entry by entry
        gathered = type(outputs[0])((name, [output[name] for output in outputs]) for name in outputs[0])
        assert list(gathered) == ["logits", "image_hidden_states"]
        assert relative_error(torch.cat(gathered.logits).detach(), logits.detach()) < FLOAT32_ACTIVATIONS
        if form is dict:
            torch.cat(gathered.logits).square().mean().backward()
            actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert actual.keys() == expected.keys()
            largest = max(gradient.abs().max() for gradient in expected.values())
            for name, gradient in expected.items():
                assert relative_error(actual[name], gradient, 1e-2 * largest) < FLOAT32_GRADIENTS, name


def test_e9_replicas_of_a_fused_model_are_exact():
    model = our_model()
    inputs = torch_batch(model.config)
    model.fuse_projections()
    with torch.no_grad():
        assert torch.equal(replica(model)(**inputs, use_cache=False).logits, model(**inputs).logits)


def test_e9_replicas_refuse_caches_that_would_lose_their_images():
    model = our_model()
    inputs = torch_batch(model.config)
    with pytest.raises(
        ValueError, match=r"nn.DataParallel puts the caches .* without their images: leave out use_cache"
    ):
        replica(model)(**inputs, use_cache=True)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert replica(model)(**text, use_cache=True).past_key_values.get_seq_length() == 9


def test_e9_replicas_know_device_and_dtype():
    model = replica(our_model(dtype=torch.bfloat16).to("meta"))
    inputs = {name: tensor.to("meta") for name, tensor in torch_batch(model.config).items()}
    del inputs["attention_mask"]  # whose values transformers asks for
    assert compute_device(model.model, inputs["pixel_values"]).type == "meta"
    logits = model(**inputs).logits
    assert (logits.device.type, logits.dtype) == ("meta", torch.bfloat16)


PARTS = {
    "head": lambda model: [(model, "lm_head")],
    "vision": lambda model: [(model.model, "vision_model")],
    "resampler": lambda model: [(model.model, "perceiver_resampler")],
    "layers": lambda model: [(model.model.layers, "1"), (model.model.gated_cross_attn_layers, "0")],
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_e9_a_part_is_compiled(part, in_place):
    model = our_model()
    inputs = torch_batch(model.config)
    logits, ids = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    for owner, name in PARTS[part](model):
        if in_place:
            getattr(owner, name).compile(backend="aot_eager")
        else:
            owner._modules[name] = torch.compile(getattr(owner, name), backend="aot_eager")
    assert relative_error(model(**inputs).logits, logits) < FLOAT32_ACTIVATIONS
    assert torch.equal(model.generate(**inputs, **GREEDY), ids)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: _saved(model),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("state", ["plain", "fused", "tied"])
@torch.no_grad()
def test_e9_copies_are_models_of_their_own(how, state):
    model = our_model(tie_word_embeddings=state == "tied")
    inputs = torch_batch(model.config)
    if state == "fused":
        model.fuse_projections()
    expected = model(**inputs).logits
    other = COPIES[how](model)
    assert torch.equal(other(**inputs).logits, expected)
    other.unfuse_projections()
    for parameter in other.parameters():
        parameter.mul_(2.0)
    assert not torch.equal(other(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == (state == "tied")


@torch.no_grad()
def test_e9_a_model_with_a_hook_and_a_warm_cache_is_copied():
    model = our_model()
    inputs = torch_batch(model.config)
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append(module))
    step = {name: inputs[name][:, 8:] for name in ("input_ids", "image_attention_mask")}
    step["attention_mask"] = inputs["attention_mask"]
    first = {name: tensor if name == "pixel_values" else tensor[:, :8] for name, tensor in inputs.items()}
    cache = model(**first, use_cache=True).past_key_values
    other, kept = copy.deepcopy((model, cache))
    expected = model(**step, past_key_values=cache).logits
    assert torch.equal(other(**step, past_key_values=kept).logits, expected)
    assert calls == [model.lm_head, model.lm_head, other.lm_head]


def test_e9_functional_calls_and_gradients_by_torch_func():
    model = our_model()
    inputs = torch_batch(model.config)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, **inputs):
        logits = functional_call(model, parameters, kwargs={**inputs, "use_cache": False}).logits
        return F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())

    doubled = {name: 2 * parameter for name, parameter in parameters.items()}
    other = our_model()
    other.load_state_dict(doubled)
    with torch.no_grad():
        expected = other(**inputs).logits
        assert relative_error(functional_call(model, doubled, kwargs=inputs).logits, expected) < FLOAT32_ACTIVATIONS
    gradients = grad(lambda parameters: loss(parameters, **inputs))(parameters)
    loss(dict(model.named_parameters()), **inputs).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(gradients[name], parameter.grad, 1e-3) < FLOAT32_GRADIENTS, name


@torch.no_grad()
def test_e9_ensembles_by_vmap():
    models = [our_model(attention="eager", seed=seed) for seed in (0, 1)]
    inputs = torch_batch(models[0].config)
    embeddings = models[0].encode_images(inputs.pop("pixel_values"))
    stacked, _ = torch.func.stack_module_state(models)
    inputs["perceiver_embeddings"] = embeddings

    def call(parameters):
        return functional_call(models[0], parameters, kwargs={**inputs, "use_cache": False}).logits

    actual = vmap(call)(stacked)
    for model, logits in zip(models, actual, strict=True):
        assert relative_error(logits, model(**inputs).logits) < FLOAT32_ACTIVATIONS


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_e9_a_traced_model_reads_other_text_and_images():
    model = our_model()
    model.config.return_dict, model.config.use_cache = False, False
    names = ("input_ids", "attention_mask", "pixel_values", "image_attention_mask")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *tensors):
            return self.model(**dict(zip(names, tensors, strict=True)))[0]

    inputs = torch_batch(model.config)
    inputs["image_attention_mask"] = torch.ones_like(inputs["image_attention_mask"])
    traced = torch.jit.trace(Logits(), tuple(inputs[name] for name in names))
    other = torch_batch(model.config, seed=1)
    other["image_attention_mask"][:, 4:] = 1
    expected = model(**other)[0]
    assert relative_error(traced(*(other[name] for name in names)), expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_e9_parts_that_were_replaced_by_compiled_ones_are_saved_under_their_names(tmp_path):
    model = our_model()
    inputs = torch_batch(model.config)
    expected = model(**inputs).logits
    for owner, name in ((model.model, "vision_model"), (model.model.layers, "1"), (model.model, "embed_tokens")):
        setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, expected)
