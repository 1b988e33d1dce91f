"""`linear` has one result, whichever library computes it, and fused projections are the same function.

The tests lower the size from which oneDNN is used, so that the small models use it everywhere.
"""

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F
from transformers.activations import ACT2FN

import idefics_pt.layers as layers_module
import idefics_pt.linear as module
from idefics_pt.linear import Linear, activated, lay_side_by_side, linear, side_by_side
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.tolerances import relative_error

TOLERANCE = 1e-5


@pytest.fixture
def onednn_everywhere(monkeypatch):
    calls = []
    product = module._product
    monkeypatch.setattr(module, "_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(args) or product(*args))
    return calls


def lay(monkeypatch, order):
    """Let weights side by side lie row by row or column by column, whatever is faster at their size."""
    for user in (module, layers_module):
        monkeypatch.setattr(user, "by_columns", lambda x: x if order == "rows" else x.t().contiguous().t())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (2, 3, 24), (2, 1, 5, 24)])
def test_values_and_first_and_second_gradients(onednn_everywhere, shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, (16, 24), (16,)))
    results = []
    for function in (F.linear, linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, *([bias] if with_bias else []))]
        out = function(*leaves)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), leaves)
        results.append([out, *first, *second])
    assert onednn_everywhere, "oneDNN was not used, so nothing was compared"
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual.detach(), expected.detach()) < TOLERANCE


@pytest.mark.parametrize("rows", ["apart", "transposed"])
def test_rows_that_are_not_contiguous_are_copied_in_blocks(onednn_everywhere, monkeypatch, rows):
    whole = torch.randn(21, 26) if rows == "apart" else torch.randn(24, 21)
    x, weight = whole[:, :24] if rows == "apart" else whole.t(), torch.randn(24, 16).t()
    bias = torch.randn(16)
    monkeypatch.setattr(module, "_MOST_COPIED", 64)
    actual = linear(x, weight, bias)
    _, *blocks = onednn_everywhere
    assert [len(block[0]) for block in blocks] == 10 * [2] + [1]
    assert relative_error(actual, F.linear(x, weight, bias)) < TOLERANCE


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_gelu_in_one_pass(onednn_everywhere, monkeypatch, dtype, most):
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 for oneDNN")
    torch.manual_seed(0)
    layer, gelu = Linear(24, 16).to(dtype), ACT2FN["gelu"]
    x = 3 * torch.randn(5, 24, dtype=dtype)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double())).detach()
    calls = []
    apart = layer.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: calls.append("apart") or apart(x))
    with torch.no_grad():
        fused = activated(layer, gelu, x)
        assert not calls, "the product and the activation were two passes"
        assert fused.dtype is dtype
        assert relative_error(fused.double(), exact) < most
        assert relative_error(activated(layer, ACT2FN["quick_gelu"], x).double(), exact) > 1e-3
        heard = []
        for module in (layer, gelu):
            hook = module.register_forward_hook(lambda module, args, out: heard.append(type(module)))
            assert relative_error(activated(layer, gelu, x).double(), exact) < 2 * most
            hook.remove()
        assert heard == [Linear, type(gelu)]
    assert activated(layer, gelu, x).grad_fn is not None


def test_what_needs_no_gradient_is_neither_kept_nor_given(onednn_everywhere):
    x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(16, 24)
    out = linear(x, weight)
    assert out.grad_fn.saved_tensors[0] is None
    out.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 24))


@pytest.mark.parametrize(
    "way",
    [
        "half",
        "float64",
        "compiled",
        "autocast",
        "vmap",
        "switched_off",
        "counted",
        "traced",
        "vector",
        "gaps",
        "forward_mode",
    ],
)
def test_everything_else_goes_to_torch(onednn_everywhere, way):
    x, weight = torch.randn(4, 24), torch.randn(16, 24)
    expected = F.linear(x, weight)
    tolerance = TOLERANCE
    if way in ("half", "float64"):
        dtype = torch.bfloat16 if way == "half" else torch.float64
        actual, tolerance = linear(x.to(dtype), weight.to(dtype)), 0.05
    elif way == "compiled":
        actual = torch.compile(linear, backend="aot_eager", fullgraph=True)(x, weight)
    elif way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            actual, tolerance = linear(x, weight), 0.05
        assert actual.dtype == torch.bfloat16
    elif way == "vmap":
        actual = torch.vmap(lambda row: linear(row, weight))(x)
    elif way == "switched_off":
        with torch.backends.mkldnn.flags(enabled=False):
            actual = linear(x, weight)
    elif way == "counted":
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            actual = linear(x, weight)
        assert counter.get_total_flops() == 2 * 4 * 24 * 16
    elif way == "gaps":  # as a part of weights side by side is, column by column
        parted = torch.cat((weight, weight)).t().contiguous().t()[:16]
        actual = linear(x, parted)
    elif way == "vector":
        actual = torch.stack([linear(row, weight) for row in x])
    elif way == "forward_mode":
        with torch.autograd.forward_ad.dual_level():
            dual = linear(torch.autograd.forward_ad.make_dual(x, x), weight)
            actual = torch.autograd.forward_ad.unpack_dual(dual).tangent
    else:
        actual = torch.jit.trace(linear, (x, weight), check_trace=False)(x, weight)
    assert not onednn_everywhere
    assert relative_error(actual.float(), expected) < tolerance


@pytest.mark.parametrize("fused", [None, "rows", "columns"])
def test_a_model_on_onednn_agrees_with_transformers(onednn_everywhere, monkeypatch, fused):
    ours, reference = our_model(), reference_model()
    if fused:
        lay(monkeypatch, fused)
        ours.fuse_projections()
    inputs = torch_batch(ours.config)
    with torch.inference_mode():
        actual, expected = ours(**inputs).logits, reference(**inputs).logits
    assert len(onednn_everywhere) > 50
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_fused_projections_are_one_product_until_a_weight_moves(onednn_everywhere, monkeypatch, order):
    lay(monkeypatch, order)

    def number_of_products():
        onednn_everywhere.clear()
        with torch.inference_mode():
            model(**inputs)
        return len(onednn_everywhere)

    model = our_model()
    inputs = torch_batch(model.config)
    names, before = list(model.state_dict()), number_of_products()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        logits = model(**inputs).logits
    model.fuse_projections()
    for weight in (model.model.layers[0].mlp.up_proj.weight, model.lm_head.weight):
        assert weight.is_contiguous() == (order == "rows")
    layers, blocks = len(model.model.layers), len(model.model.gated_cross_attn_layers)
    assert number_of_products() == before - 3 * layers - blocks
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    with torch.inference_mode():
        assert relative_error(model(**inputs).logits, logits) < TOLERANCE
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    apart = 2 if order == "rows" else -1  # three products instead of one; parts of columns are for torch to multiply
    assert number_of_products() == before - 3 * layers - blocks + apart
    hook.remove()
    model.model.layers[0].self_attn.k_proj.weight.data = model.model.layers[0].self_attn.k_proj.weight.data.t()
    assert number_of_products() == before - 3 * layers - blocks + apart
    model.to(torch.float64).to(torch.float32)
    assert number_of_products() == before


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_fused_projections_train_and_save_as_before(monkeypatch, tmp_path, order):
    lay(monkeypatch, order)
    plain, fused = our_model(), our_model()
    for model in (plain, fused):
        inputs = torch_batch(model.config, with_labels=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before the projections are fused
        if model is fused:
            model.fuse_projections()
        model(**inputs).loss.backward()
        optimizer.step()
    for name, parameter in plain.named_parameters():
        assert relative_error(fused.get_parameter(name).detach(), parameter.detach()) < TOLERANCE, name
    with torch.inference_mode():  # the one product reads what the optimiser changed
        inputs.pop("labels")
        assert relative_error(fused(**inputs).logits, plain(**inputs).logits) < TOLERANCE
    fused.save_pretrained(tmp_path)
    assert all(parameter.is_contiguous() for parameter in fused.parameters())
    assert not any(getattr(module, "is_beside", False) for module in fused.modules())
    loaded = type(fused).from_pretrained(tmp_path)
    for name, value in fused.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    loaded.fuse_projections()
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().nbytes() == 3 * attention.q_proj.weight.nbytes
    loaded.train()  # undoes it
    assert attention.q_proj.weight.untyped_storage().nbytes() == attention.q_proj.weight.nbytes


def test_an_adapter_or_another_memory_makes_products_separate():
    layers = [Linear(24, 16, bias=False) for _ in range(2)]
    x = torch.randn(3, 24)
    lay_side_by_side(*layers)
    with torch.inference_mode():
        assert side_by_side(x, *layers)[0].stride() == (32, 1)
        layers[1].weight.data = layers[1].weight.data.clone()
        first, second = side_by_side(x, *layers)
        assert first.stride() == (16, 1)
        layers[1] = torch.nn.Sequential(layers[1], torch.nn.ReLU())
        assert torch.equal(side_by_side(x, *layers)[1], second.relu())


def test_mistakes_are_named_as_torch_names_them(onednn_everywhere):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 5), torch.randn(4, 6))


def test_tall_weights_lie_by_columns():
    for rows, is_tall in ((2050, True), (3072, True), (4096, False), (6144, False), (1030, False)):
        layers = [Linear(8, rows // 2, bias=False) for _ in range(2)]
        lay_side_by_side(*layers)
        assert layers[0].weight.stride() == ((1, rows) if is_tall else (8, 1))


def test_weights_that_are_neighbours_by_accident_are_apart():
    memory = np.ones(2 * 16 * 24, np.float32)
    layers = [Linear(24, 16, bias=False) for _ in range(2)]
    for layer, part in zip(layers, np.split(memory, 2), strict=True):
        layer.weight.data = torch.from_numpy(part).view(16, 24)
        layer.is_beside = True
    x = torch.ones(3, 24)
    with torch.inference_mode():
        assert all(torch.equal(out, layer(x)) for out, layer in zip(side_by_side(x, *layers), layers, strict=True))
    assert layers[1].weight.data_ptr() == layers[0].weight.data_ptr() + 4 * 16 * 24


def test_a_head_tied_to_the_embedding_stays_as_it_is(monkeypatch):
    lay(monkeypatch, "columns")
    model = our_model(tie_word_embeddings=True)
    model.fuse_projections()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_contiguous()


def test_no_weight_is_left_by_columns(monkeypatch, tmp_path):
    """Not those that an adapter has wrapped meanwhile, nor those of a state that was taken and given away."""
    lay(monkeypatch, "columns")
    model, other = our_model(), our_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.fuse_projections()
    state = model.state_dict()
    assert not state["model.layers.0.self_attn.q_proj.weight"].is_contiguous()
    other.load_state_dict(state, assign=True)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
    other.train()
    assert all(parameter.is_contiguous() for parameter in other.parameters())
    model.fuse_projections()
    wrapped = inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), model)
    wrapped.train()
    assert all(parameter.is_contiguous() for parameter in wrapped.parameters())
