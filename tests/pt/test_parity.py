"""Ours computes what transformers' IDEFICS computes: logits, hidden states, loss and every gradient.

The reference's loss cannot be had with an additional vocabulary, so the loss and its gradients are compared with the
cross entropy of the reference's logits, `tests.pt.pairs.oracle_loss`.
"""

import pytest
import torch

from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text, IdeficsModel
from idefics_pt.transformers_versions import CACHE
from tests.models import MATRIX, UNUSUAL, small_config
from tests.pt.pairs import (
    CALLS,
    oracle_loss,
    our_model,
    parity_call,
    reference_image_states,
    reference_model,
    torch_batch,
)
from tests.tolerances import FLOAT32_ACTIVATIONS, FLOAT32_GRADIENTS, relative_error

ATTENTIONS = ("eager", "sdpa")


def differences(ours, reference, inputs, **kwargs):
    """Relative differences by name: hidden states of each layer, image states and logits."""
    with torch.no_grad():
        actual = ours(**inputs, output_hidden_states=True, **kwargs)
        expected = reference(**inputs, output_hidden_states=True, **kwargs)
        image_states = reference_image_states(reference, inputs["pixel_values"], **kwargs)
    seen = inputs["image_attention_mask"].bool().any(dim=1)
    pairs = zip(actual.hidden_states, expected.hidden_states, strict=True)
    named = {f"hidden state {i}": pair for i, pair in enumerate(pairs)}
    named["image states"] = actual.image_hidden_states[seen], image_states[seen]
    named["logits"] = actual.logits, expected.logits
    return {name: relative_error(a.cpu(), e.cpu()) for name, (a, e) in named.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", MATRIX)
def test_activations(variant, attention, call, device):
    ours = our_model(device, attention, **MATRIX[variant])
    reference = reference_model(device, attention, **MATRIX[variant])
    inputs, kwargs = parity_call(call, ours.config, device)
    del inputs["labels"]
    for place, error in differences(ours, reference, inputs, **kwargs).items():
        assert error < FLOAT32_ACTIVATIONS, f"{place} differs by {error:.1e}"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", UNUSUAL)
def test_e16_what_transformers_builds_and_runs(variant, attention):
    ours = our_model(attention=attention, **UNUSUAL[variant])
    reference = reference_model(attention=attention, **UNUSUAL[variant])
    inputs = torch_batch(ours.config)
    for place, error in differences(ours, reference, inputs).items():
        assert error < FLOAT32_ACTIVATIONS, f"{place} differs by {error:.1e}"
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(**inputs, **settings), reference.generate(**inputs, **settings))


def test_e16_what_cannot_run_is_refused_when_it_is_built():
    config = IdeficsConfig(**small_config(num_hidden_layers=3))
    for cls in (IdeficsModel, IdeficsForVisionText2Text):
        with pytest.raises(
            ValueError, match="num_hidden_layers must be a multiple of cross_layer_interval, got 3 and 2"
        ):
            cls(config)


def test_a_swapped_transpose_is_noticed():
    ours, reference = our_model(), reference_model()
    with torch.no_grad():
        kernel = ours.model.layers[1].self_attn.q_proj.weight
        kernel.copy_(kernel.T.clone())
    errors = differences(ours, reference, torch_batch(ours.config))
    assert errors["hidden state 1"] < FLOAT32_ACTIVATIONS
    assert errors["hidden state 2"] > 1e-3
    assert errors["logits"] > 1e-3


@pytest.mark.parametrize("module", ["gated_cross_attn_layers.1.cross_attn", "perceiver_resampler", "vision_model"])
def test_every_part_matters(module):
    """The negative control of the fixtures: silencing a part of the model changes its logits."""
    model = our_model()
    inputs = torch_batch(model.config)
    with torch.no_grad():
        before = model(**inputs).logits
        for parameter in model.model.get_submodule(module).parameters():
            parameter.zero_()
        after = model(**inputs).logits
    assert relative_error(after, before) > 1e-2


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", MATRIX)
def test_loss_and_gradients(variant, attention, call, device):
    ours = our_model(device, attention, **MATRIX[variant])
    reference = reference_model(device, attention, **MATRIX[variant])
    inputs, kwargs = parity_call(call, ours.config, device)
    labels = inputs.pop("labels")
    loss = ours(**inputs, labels=labels, **kwargs).loss
    expected_loss = oracle_loss(reference(**inputs, **kwargs).logits, labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=FLOAT32_ACTIVATIONS)
    loss.backward()
    expected_loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    # a key bias shifts all scores of a query alike, so its gradient is rounding; it gets the scale of its model
    least_scale = 1e-3 * max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for name, parameter in ours.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        error = relative_error(parameter.grad.cpu(), expected[name].cpu(), least_scale)
        assert error < FLOAT32_GRADIENTS, f"gradient of {name} differs by {error:.1e}"


def test_d2_labels_with_added_vocabulary():
    model = our_model()
    inputs = torch_batch(model.config, with_labels=True)
    inputs["labels"][0, 3] = model.config.vocab_size + 2
    outputs = model(**inputs)
    expected = oracle_loss(outputs.logits, inputs["labels"])
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not torch.isclose(outputs.loss, model(**{**inputs, "labels": inputs["labels"].clamp(max=96)}).loss)


def test_loss_is_a_mean_over_num_items_in_batch():
    model = our_model()
    inputs = torch_batch(model.config, with_labels=True)
    count = (inputs["labels"][:, 1:] != -100).sum()
    mean = model(**inputs).loss
    assert model(**inputs, num_items_in_batch=2 * count).loss.item() == pytest.approx(mean.item() / 2, rel=1e-6)


def test_logits_to_keep():
    model = our_model()
    inputs = torch_batch(model.config)
    with torch.no_grad():
        every = model(**inputs).logits
        assert torch.equal(model(**inputs, logits_to_keep=2).logits, every[:, -2:])
        assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])


def test_outputs_as_tuple_and_by_name():
    model = our_model(attention="eager")
    inputs = torch_batch(model.config, with_labels=True)
    kwargs = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        named, plain = model(**inputs, **kwargs), model(**inputs, **kwargs, return_dict=False)
    names = list(named)
    assert names[:6] == ["loss", "logits", CACHE, "hidden_states", "attentions", "image_hidden_states"]
    assert torch.equal(plain[names.index("logits")], named.logits)
    assert len(named.hidden_states) == 5
    assert torch.equal(plain[names.index("image_hidden_states")], named.image_hidden_states)
