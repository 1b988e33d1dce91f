"""`project` gives what the layer gives, by whichever library, below and above the size from which oneDNN is used."""

import functools
import importlib

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from idefics_pt import torch_internals
from idefics_pt.cpu import onednn
from idefics_pt.cpu.onednn import linear, project, project_and_activate
from idefics_pt.layers import DecoupledLinear, GatedMLP
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.tolerances import relative_error

TOLERANCE = 1e-5
SIZES = {"small": ((2, 5), 24, 16), "large": ((2, 64), 64, 96)}  # of x but for the last axis, columns, rows
assert 10 * 24 * 16 < onednn._LEAST_PRODUCTS <= 128 * 64 * 96
both_sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture
def products(monkeypatch):
    """Arguments of oneDNN's products, in order."""
    calls, product = [], onednn._product
    monkeypatch.setattr(onednn, "_product", lambda *args: calls.append(args) or product(*args))
    return calls


@pytest.fixture
def onednn_everywhere(monkeypatch, products):
    monkeypatch.setattr(onednn, "_LEAST_PRODUCTS", 0)
    return products


def layer_and_input(size, bias=True, shape=None):
    torch.manual_seed(0)
    front, columns, rows = SIZES[size]
    return nn.Linear(columns, rows, bias=bias), torch.randn(*(shape or front), columns)


def called(layer, x):
    return layer(x)


@both_sizes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [None, (128,), (2, 1, 64), (1, 64)])
def test_values_and_first_and_second_gradients(products, size, bias, shape):
    layer, x = layer_and_input(size, bias, shape)
    results = []
    for function in (called, project):
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        out = function(layer, leaves[0])
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), leaves)
        results.append([out, *first, *second])
    assert bool(products) == (size == "large")
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual.detach(), expected.detach()) < TOLERANCE


@both_sizes
@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_what_needs_no_gradient_is_neither_kept_nor_given(size, trained):
    results = []
    for function in (called, project):
        layer, x = layer_and_input(size)
        layer.requires_grad_(False)
        leaves = {"x": x, **dict(layer.named_parameters())}
        leaves[trained].requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda x: x
        ):
            function(layer, x).pow(2).sum().backward()
        results.append(leaves)
        assert len(kept) == (1 if trained == "bias" else 2)  # the result, for its square, and the other factor
    for name in leaves:
        assert (results[1][name].grad is None) == (name != trained)
    assert relative_error(results[1][trained].grad, results[0][trained].grad) < TOLERANCE


@both_sizes
@pytest.mark.parametrize("module", ["linear", "gated MLP", "AdaLoRA", "head", "joined head"])
def test_e3_a_result_may_be_changed_in_place(size, module):
    """Directly, and by a hook, as tools for ablation and steering do; while training and afterwards."""
    results = []
    for way in ("out of place", "in place", "by a hook"):
        layer, x = layer_and_input(size, bias=False)
        function = project
        if module == "gated MLP":
            layer, function = GatedMLP(x.shape[-1], 96 if size == "large" else 16, "silu"), called
            torch.manual_seed(1)
            for weight in layer.parameters():
                nn.init.normal_(weight)
        elif "head" in module:
            layer, function = DecoupledLinear(x.shape[-1], layer.out_features, 3), called
            if module == "joined head":
                layer.join()
        elif module == "AdaLoRA":
            config = AdaLoraConfig(target_modules=["0"], init_r=4, total_step=9, init_lora_weights=False)
            layer = inject_adapter_in_model(config, nn.Sequential(layer))[0]
        x.requires_grad_()
        if way == "by a hook":
            layer.register_forward_hook(lambda layer, args, out: out.mul_(0.5))
        out = function(layer, x)
        if way == "in place":
            out.mul_(0.5)
        elif way == "out of place":
            out = out * 0.5
        out.pow(2).sum().backward()
        gradients = [weight.grad for weight in layer.parameters() if weight.requires_grad]
        results.append([out.detach(), x.grad, *gradients])
        with torch.no_grad():
            constant = function(layer, x)
        constant.add_(x.sum())  # a view made without gradients would refuse
    for changed in results[1:]:
        for expected, actual in zip(results[0], changed, strict=True):
            assert relative_error(actual, expected) < TOLERANCE


@both_sizes
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_hears_its_layer_once(products, size, hook):
    layer, x = layer_and_input(size)
    heard = []
    getattr(layer, f"register_{hook}_hook")(lambda *args: heard.append(hook))
    out = project(layer, x.requires_grad_())
    out.sum().backward()
    assert heard == [hook]
    assert bool(products) == (size == "large")  # in the layer that is called
    assert relative_error(out.detach(), F.linear(x, layer.weight, layer.bias).detach()) < TOLERANCE


@both_sizes
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointing(size, is_reentrant):
    layer, x = layer_and_input(size)
    x.requires_grad_()
    project(layer, x).pow(2).sum().backward()
    expected = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad = layer.weight.grad = layer.bias.grad = None
    checkpoint(project, layer, x, use_reentrant=is_reentrant).pow(2).sum().backward()
    for gradient, leaf in zip(expected, (x, layer.weight, layer.bias), strict=True):
        assert torch.equal(leaf.grad, gradient)


WAYS = {
    "float64": lambda layer, x: project(layer.double(), x.double()),
    "bfloat16": lambda layer, x: project(layer.bfloat16(), x.bfloat16()),
    "compiled": lambda layer, x: torch.compile(project, backend="aot_eager", fullgraph=True)(layer, x),
    "exported": lambda layer, x: torch.export.export(Projection(layer), (x,)).module()(x),
    "traced": lambda layer, x: torch.jit.trace(Projection(layer), (x,), check_trace=False)(x),
    "vmap": lambda layer, x: torch.vmap(lambda row: project(layer, row))(x),
    "one row": lambda layer, x: torch.stack([project(layer, row) for row in x.flatten(0, 1)]).view(*x.shape[:2], -1),
    "switched off": lambda layer, x: without_onednn(layer, x),
    "gaps": lambda layer, x: linear(x, with_gaps(layer.weight), layer.bias),
}


class Projection(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return project(self.layer, x)


def without_onednn(layer, x):
    with torch.backends.mkldnn.flags(enabled=False):
        return project(layer, x)


def with_gaps(weight):
    """As a part of weights one below the other is, column by column."""
    return torch.cat((weight, weight)).t().contiguous().t()[: len(weight)]


@both_sizes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tracing
def test_everything_else_goes_to_torch(products, size, way):
    layer, x = layer_and_input(size)
    expected = F.linear(x, layer.weight, layer.bias).detach()
    actual = WAYS[way](layer, x).detach()
    assert not products
    assert relative_error(actual.float(), expected) < (0.02 if way == "bfloat16" else TOLERANCE)


@both_sizes
def test_autocast_chooses_the_precision(products, size):
    layer, x = layer_and_input(size)
    with torch.autocast("cpu", torch.bfloat16):
        out = project(layer, x)
    assert out.dtype is torch.bfloat16
    assert not products
    assert relative_error(out.detach().float(), layer(x).detach()) < 0.02


@both_sizes
@pytest.mark.parametrize("dual", ["x", "weight", "bias"])
@pytest.mark.parametrize("by", ["forward_ad", "jvp"])
def test_forward_mode(size, dual, by):
    layer, x = layer_and_input(size)
    primals = {"x": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
    tangent = torch.randn_like(primals[dual])

    def function(tensor):
        return linear(*{**primals, dual: tensor}.values())

    if by == "jvp":
        out, change = torch.func.jvp(function, (primals[dual],), (tangent,))
    else:
        with torch.autograd.forward_ad.dual_level():
            dual_out = function(torch.autograd.forward_ad.make_dual(primals[dual], tangent))
            out, change = torch.autograd.forward_ad.unpack_dual(dual_out)
    zero = dict.fromkeys(primals, None) | {dual: tangent}
    product = F.linear(zero["x"], primals["weight"]) if dual == "x" else 0.0
    product = F.linear(x, zero["weight"]) if dual == "weight" else product
    expected = tangent.expand_as(out) if dual == "bias" else product
    assert relative_error(out, F.linear(*primals.values())) < TOLERANCE
    assert relative_error(change, expected) < TOLERANCE


@both_sizes
def test_gradients_by_torch_func(size):
    layer, x = layer_and_input(size)
    layer.requires_grad_(False)
    by_project = torch.func.grad(lambda x: project(layer, x).pow(2).sum())(x)
    assert relative_error(by_project, 2 * (layer(x) @ layer.weight)) < TOLERANCE


@both_sizes
def test_operations_are_counted(size):
    layer, x = layer_and_input(size)
    counts = []
    for function in (called, project):
        with FlopCounterMode(display=False) as counter:
            function(layer, x.requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    (*front, columns), rows = x.shape, layer.out_features
    assert counts == 2 * [3 * 2 * torch.Size(front).numel() * columns * rows]


@both_sizes
def test_a_checkpoint_inside_a_layer_gives_the_gradients_of_the_layer(size):
    """Of a square frozen weight a transposed one would have the same shape."""

    class Checkpointed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    shape, width, _ = SIZES[size]
    width = 4 * width
    layer, x = nn.Linear(width, width, bias=False).requires_grad_(False), torch.randn(*shape, width, requires_grad=True)
    patched = nn.Linear(width, width, bias=False).requires_grad_(False)
    patched.load_state_dict(layer.state_dict())
    patched.forward = functools.partial(checkpoint, patched.forward, use_reentrant=False)
    (expected,) = torch.autograd.grad(F.linear(x, layer.weight).pow(2).sum(), x)
    for module in (Checkpointed(layer), patched):
        (actual,) = torch.autograd.grad(project(module, x).pow(2).sum(), x)
        assert relative_error(actual, expected) < TOLERANCE


@both_sizes
@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_a_bias_that_is_not_contiguous(size, bias):
    shape, columns, rows = SIZES[size]
    x, weight = torch.randn(*shape, columns), torch.randn(rows, columns)
    bias = torch.randn(2 * rows)[::2] if bias == "strided" else torch.randn(1).expand(rows)
    layer = nn.Linear(columns, rows).requires_grad_(False)
    layer.weight.data, layer.bias.data = weight, bias
    expected = F.linear(x.double(), weight.double(), bias.double()).float()
    assert relative_error(linear(x, weight, bias), expected) < TOLERANCE
    assert relative_error(project_and_activate(layer, ACT2FN["gelu"], x), F.gelu(expected)) < TOLERANCE


@both_sizes
def test_a_layer_may_name_the_arguments_of_the_product(size):
    class Named(nn.Linear):
        base_layer = None

        def forward(self, x):
            return F.linear(input=x, weight=self.weight, bias=self.bias)

    shape, columns, rows = SIZES[size]
    layer, x = Named(columns, rows), torch.randn(*shape, columns)
    assert relative_error(project(layer, x).detach(), F.linear(x, layer.weight, layer.bias).detach()) < TOLERANCE


@both_sizes
@pytest.mark.parametrize("kind", ["lora", "adalora", "weight norm", "subclass"])
def test_a_layer_of_another_kind_is_called(products, size, kind):
    """What an adapter is put around is multiplied as fast as without it."""
    layer, x = layer_and_input(size, bias=False)
    plain = layer
    if kind == "weight norm":
        layer = parametrizations.weight_norm(layer)
    elif kind == "subclass":
        layer = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)})(
            *x.shape[-1:], 96
        )
    else:
        from peft import AdaLoraConfig

        holder = nn.ModuleDict({"layer": layer})
        config = (
            LoraConfig(target_modules=["layer"], r=2)
            if kind == "lora"
            else AdaLoraConfig(target_modules=["layer"], init_r=2, target_r=1, total_step=100)
        )
        layer = inject_adapter_in_model(config, holder)["layer"]
        assert layer is not plain
    expected = layer(x)
    before = len(products)
    actual = project(layer, x.requires_grad_())
    assert before == 0
    assert bool(products) == (size == "large" and "lora" in kind)
    assert relative_error(actual.detach(), expected.detach()) < TOLERANCE
    actual.sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("rows", ["apart", "transposed"])
def test_rows_that_are_not_contiguous_are_copied_in_blocks(onednn_everywhere, monkeypatch, rows):
    whole = torch.randn(21, 26) if rows == "apart" else torch.randn(24, 21)
    x, weight = whole[:, :24] if rows == "apart" else whole.t(), torch.randn(24, 16).t()
    bias = torch.randn(16)
    monkeypatch.setattr(onednn, "_MOST_COPIED", 64)
    actual = linear(x, weight, bias)
    _, *blocks = onednn_everywhere
    assert [len(block[0]) for block in blocks] == 10 * [2] + [1]
    assert relative_error(actual, F.linear(x, weight, bias)) < TOLERANCE


@both_sizes
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_gelu_in_one_pass(monkeypatch, size, dtype, most):
    if dtype is torch.bfloat16 and not torch_internals.supports_bfloat16():
        pytest.skip("this processor has no bfloat16 for oneDNN")
    layer, x = layer_and_input(size)
    layer, gelu, x = layer.to(dtype), ACT2FN["gelu"], 3 * x.to(dtype)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double())).detach()
    apart = []
    monkeypatch.setattr(onednn, "project", lambda *args: apart.append(args) or project(*args))
    with torch.no_grad():
        fused = project_and_activate(layer, gelu, x)
        assert bool(apart) == (size == "small")
        assert fused.dtype is dtype
        assert relative_error(fused.double(), exact) < (most if size == "large" else 2 * most)
        assert relative_error(project_and_activate(layer, ACT2FN["quick_gelu"], x).double(), exact) > 1e-3
        heard = []
        for module in (layer, gelu):
            hook = module.register_forward_hook(lambda module, args, out: heard.append(type(module)))
            assert relative_error(project_and_activate(layer, gelu, x).double(), exact) < 2 * most
            hook.remove()
        assert heard == [nn.Linear, type(gelu)]
    fused.mul_(torch.ones((), dtype=dtype, requires_grad=True))  # no view that autograd would refuse to be changed
    assert project_and_activate(layer, gelu, x).grad_fn is not None


def test_mistakes_are_named_as_torch_names_them(onednn_everywhere):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 5), torch.randn(4, 6))


def test_e1_linear_layers_are_torchs_own():
    model = our_model()
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    subclasses = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - names
    assert subclasses == {"lm_head"}
    reference = reference_model()
    expected = {name for name, module in reference.named_modules() if type(module) is nn.Linear}
    assert names == expected


def test_a_model_on_onednn_agrees_with_transformers(onednn_everywhere):
    ours, reference = our_model(), reference_model()
    inputs = torch_batch(ours.config)
    with torch.inference_mode():
        actual, expected = ours(**inputs).logits, reference(**inputs).logits
    assert len(onednn_everywhere) > 50
    assert relative_error(actual, expected) < TOLERANCE


NAMES = {
    "linear_pointwise": "products on the CPU are by MKL again: look for oneDNN's operator under its new name",
    "supports_bfloat16": "GELU in bfloat16 in one pass has nobody to ask whether this processor can do it",
    "is_transformed": "vmap, grad and jvp of torch.func cannot be told from plain calls",
    "has_global_hooks": "hooks on all modules cannot be told from none, and would not hear linear layers",
    "mark_static_address": "compiled steps on static caches copy image keys and values at every token on a GPU",
    "pack_int8": "quantize_int8 has no layout for weights",
    "multiply_int8": "quantize_int8 has no kernel",
}


@pytest.mark.parametrize("name", NAMES)
def test_torch_has_its_undocumented_names(name):
    assert getattr(torch_internals, name) is not None, f"torch {torch.__version__}: {NAMES[name]}."


def test_torch_keeps_hooks_and_versions_where_they_are_looked_for():
    layer = nn.Linear(2, 2)
    hooks = [layer.register_forward_pre_hook, layer.register_forward_hook, layer.register_full_backward_pre_hook]
    for register in (*hooks, layer.register_full_backward_hook):
        handle = register(lambda *args: None)
        assert not onednn.has_no_hooks(layer), f"torch {torch.__version__}: hooks would not be heard."
        handle.remove()
        assert onednn.has_no_hooks(layer)
    tensor = torch.zeros(2)
    before = torch_internals.version_of(tensor)
    tensor.add_(1)
    assert before is not None, "images that were given before are encoded again each time"
    assert torch_internals.version_of(tensor) != before
    with torch.inference_mode():
        assert torch_internals.version_of(torch.zeros(2)) is None


def test_a_torch_without_them_computes_by_its_own_ways(monkeypatch):
    try:
        with monkeypatch.context() as patch:
            patch.delattr(torch._C, "_are_functorch_transforms_active")
            assert not importlib.reload(torch_internals).is_complete
            model, reference = our_model(), reference_model()
            patch.setattr(onednn, "_product", None)
            patch.setattr(onednn, "_LEAST_PRODUCTS", 0)
            inputs = torch_batch(model.config)
            actual, expected = model(**inputs), reference(**inputs)
            assert relative_error(actual.logits.detach(), expected.logits.detach()) < TOLERANCE
            patch.setattr(torch_internals, "pack_int8", None)
            with pytest.raises(ValueError, match="no int8 kernels of oneDNN that are known here"):
                model.quantize_int8()
    finally:
        importlib.reload(torch_internals)
    assert torch_internals.is_complete
