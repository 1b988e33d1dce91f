"""What is recomputed has the values and gradients of what is kept, and is not kept.

The tests lower the size from which oneDNN is used, so that small tensors take the same way as large ones.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idefics_pt.cpu.recomputed as module
from idefics_pt.cpu import onednn
from idefics_pt.cpu.recomputed import project_gated, rms_norm
from idefics_pt.layers import GatedMLP, RMSNorm
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.tolerances import FLOAT32_GRADIENTS, relative_error

TOLERANCE = 1e-5
WIDTH, HIDDEN = 24, 40
WAYS = ["float64", "compiled", "autocast", "vmap", "forward_mode", "traced"]


@pytest.fixture(autouse=True)
def onednn_everywhere(monkeypatch):
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 0)


@pytest.fixture
def recomputations(monkeypatch):
    """Names of the functions that took the way of this module, in order."""
    calls = []
    for name in ("_RMSNorm", "_GatedLinear"):
        apply = getattr(module, name).apply
        monkeypatch.setattr(
            getattr(module, name), "apply", lambda *args, name=name, apply=apply: calls.append(name) or apply(*args)
        )
    return calls


def gated(gate, up):
    return F.silu(gate) * up


def norms():
    return (lambda x, weight: module._rms_norm(x, weight, 1e-6)), (lambda x, weight: rms_norm(x, weight, 1e-6))


def products():
    """``F.linear(gated(gate, up), weight)``, the second by `project_gated`."""
    layer = nn.Linear(HIDDEN, WIDTH, bias=False)

    def by_layer(gate, up, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (gated(gate, up),))

    def recomputed(gate, up, weight):
        return module._GatedLinear.apply(F.silu, weight, gate, up)

    return by_layer, recomputed


CASES = {
    "norm": (norms, [(3, 5, WIDTH), (WIDTH,)]),
    "norm of one axis": (norms, [(WIDTH,), (WIDTH,)]),
    "norm of heads": (norms, [(2, 3, 5, WIDTH), (WIDTH,)]),
    "product": (products, [(3, 5, HIDDEN), (3, 5, HIDDEN), (WIDTH, HIDDEN)]),
    "product of rows": (products, [(7, HIDDEN), (7, HIDDEN), (WIDTH, HIDDEN)]),
}


def leaves_of(shapes, frozen=()):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.requires_grad_(i not in frozen) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_first_and_second_gradients(case):
    functions, shapes = CASES[case]
    results = []
    for function in functions():
        leaves = leaves_of(shapes)
        # of another layout in memory, as heads and parts of a side-by-side product are, and no leaves
        inputs = [leaf.transpose(0, -2).clone().transpose(0, -2) if leaf.dim() > 2 else leaf * 1 for leaf in leaves]
        out = function(*inputs)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), leaves)
        results.append([out, *first, *second])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual.detach(), expected.detach()) < TOLERANCE


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e15], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_torchs(dtype, scale):
    x, weight = (leaf.detach().to(dtype) for leaf in leaves_of([(3, 5, WIDTH), (WIDTH,)]))
    x = x.transpose(0, 1) * scale
    expected = weight * F.rms_norm(x.float(), weight.shape, eps=1e-6).to(dtype)
    normed = rms_norm(x, weight, 1e-6)
    assert normed.dtype is dtype
    assert normed.isfinite().all()
    # a float32 result may differ in its last bit, which may turn a bfloat16 one to the next number
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_several_outputs_at_once(case):
    functions, shapes = CASES[case]
    results = []
    for function in functions():
        leaves = leaves_of(shapes)
        out = function(*leaves)
        directions = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(1))
        results.append(torch.autograd.grad(out, leaves, directions, is_grads_batched=True))
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("case", ["norm", "product"])
def test_only_what_trains_has_a_gradient(case):
    functions, shapes = CASES[case]
    for trained in range(len(shapes)):
        results = []
        for function in functions():
            leaves = leaves_of(shapes, frozen=set(range(len(shapes))) - {trained})
            function(*leaves).pow(2).sum().backward()
            results.append(leaves)
        expected, actual = results
        assert [leaf.grad is None for leaf in actual] == [i != trained for i in range(len(shapes))]
        assert relative_error(actual[trained].grad, expected[trained].grad) < TOLERANCE


def kept_for_backward(run):
    """Distinct tensors that the graph of `run` keeps, but for parameters."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    return out, list(kept.values())


def test_what_is_recomputed_is_not_kept():
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    _, kept = kept_for_backward(lambda: RMSNorm(WIDTH, 1e-6)(x))
    assert len(kept) == 1
    assert kept[0] is x
    mlp = GatedMLP(WIDTH, HIDDEN, "silu")
    out, kept = kept_for_backward(lambda: mlp(x))  # `out` keeps the graph, and thereby memory apart, until the count
    assert sorted(tensor.shape[-1] for tensor in kept) == [WIDTH, HIDDEN, HIDDEN]
    mlp.down_proj.register_forward_hook(lambda *_: None)
    other, kept = kept_for_backward(lambda: mlp(x))
    assert sorted(tensor.shape[-1] for tensor in kept) == [WIDTH, HIDDEN, HIDDEN, HIDDEN, HIDDEN]
    assert torch.equal(out, other)


def result_by(way, layers, x):
    def function(x):
        for layer in layers:
            x = layer(x)
        return x

    if way == "float64":
        return function(x.double())
    if way == "compiled":
        return torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            return function(x)
    if way == "vmap":
        return torch.vmap(function)(x)
    if way == "forward_mode":
        with torch.autograd.forward_ad.dual_level():
            return function(torch.autograd.forward_ad.make_dual(x, x))
    return torch.jit.trace(nn.Sequential(*layers), (x,), check_trace=False)(x)


@pytest.mark.parametrize("way", WAYS)
def test_everything_else_is_computed_as_ever(recomputations, way):
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    norm = RMSNorm(WIDTH, 1e-6)
    mlp = GatedMLP(WIDTH, HIDDEN, "silu")
    expected = mlp(norm(x))
    assert recomputations == ["_RMSNorm", "_GatedLinear"]
    if way == "float64":
        norm.double()
        mlp.double()
    actual = result_by(way, [norm, mlp], x)
    assert recomputations == ["_RMSNorm", "_GatedLinear"]
    assert relative_error(actual.detach().float(), expected.detach()) < (0.05 if way == "autocast" else TOLERANCE)


@pytest.mark.parametrize("listener", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("listened", ["down_proj", "act_fn"])
def test_who_listens_to_a_layer_hears_it_once(recomputations, listener, listened):
    mlp = GatedMLP(WIDTH, HIDDEN, "silu")
    heard = []
    getattr(mlp.get_submodule(listened), f"register_{listener}_hook")(lambda *_: heard.append(listener))
    mlp(torch.randn(3, WIDTH, requires_grad=True)).sum().backward()
    assert heard == [listener]
    assert not recomputations


def test_hooks_on_what_is_kept_run_once(recomputations):
    torch.manual_seed(0)
    mlp, x = GatedMLP(WIDTH, HIDDEN, "silu"), torch.randn(3, 5, WIDTH)
    doubled = []

    def double_gradient(layer, args, out):
        out.register_hook(lambda gradient: 2 * gradient)

    for is_recomputed in (False, True):
        hooks = [mlp.gate_proj.register_forward_hook(double_gradient)]
        hooks += [] if is_recomputed else [mlp.down_proj.register_forward_hook(lambda *_: None)]
        mlp.zero_grad()
        mlp(x).pow(2).sum().backward()
        doubled.append(mlp.gate_proj.weight.grad)
        for hook in hooks:
            hook.remove()
    assert recomputations == ["_GatedLinear"]
    assert relative_error(*doubled) < TOLERANCE


def test_who_listens_to_all_modules_hears_every_layer():
    mlp, x, heard = GatedMLP(WIDTH, HIDDEN, "silu"), torch.randn(3, 5, WIDTH), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: heard.append(module))
    try:
        mlp(x)
        with torch.no_grad():
            mlp.fuse_projections()
            mlp(x)
    finally:
        hook.remove()
    assert all(heard.count(child) == 2 for child in mlp.children())


def test_another_kind_of_layer_is_called_as_ever(recomputations):
    gate, up = torch.randn(3, HIDDEN, requires_grad=True), torch.randn(3, HIDDEN)
    for layer in (nn.Linear(HIDDEN, WIDTH), nn.Sequential(nn.Linear(HIDDEN, WIDTH, bias=False))):
        actual, expected = project_gated(layer, nn.SiLU(), gate, up), layer(gated(gate, up))
        assert relative_error(actual.detach(), expected.detach()) < TOLERANCE
    assert not recomputations


def test_an_activation_with_parameters_trains():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.factor * x

    mlp = GatedMLP(WIDTH, HIDDEN, "silu")
    mlp.act_fn = Scale()
    mlp(torch.randn(3, WIDTH)).sum().backward()
    assert mlp.act_fn.factor.grad.abs() > 0


def test_gradients_of_a_model_agree_with_transformers(recomputations):
    ours, reference = our_model(), reference_model()
    batch = torch_batch(ours.config)
    labels = batch["input_ids"]
    for model in (ours, reference):
        logits = model(**batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert len(recomputations) > 10
    expected = {name: weight.grad for name, weight in reference.named_parameters() if weight.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        actual = ours.get_parameter(name).grad
        assert relative_error(actual, gradient, least_scale=1e-2 * largest) < FLOAT32_GRADIENTS, name
