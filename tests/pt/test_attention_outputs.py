"""Attention weights, gates, hidden states and precision: what can be looked at, and no NaN in half precision."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import HALF_PRECISION, relative_error

LOOK = {"output_attentions": True}


@torch.no_grad()
def test_d5_every_attention_is_returned():
    model = our_model(attention="eager")
    inputs = torch_batch(model.config)
    outputs = model(**inputs, **LOOK)
    rows, length, images, latents = 4, 9, 2, 6
    assert [a.shape for a in outputs.attentions] == [(rows, 3, length, length)] * 4
    assert [a.shape for a in outputs.cross_attentions] == [(rows, 3, length, images * latents)] * 2
    seen = 1 + 2 + 2  # images of rows 2, 0 and 3: padding is not encoded
    assert [a.shape for a in outputs.vision_attentions] == [(seen, 2, 5, 5)] * 2
    assert [a.shape for a in outputs.perceiver_attentions] == [(seen, 3, latents, 5 + latents)] * 2
    image_side = (*outputs.vision_attentions, *outputs.perceiver_attentions)
    for weights in (*outputs.attentions, *outputs.cross_attentions, *image_side):
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)


@torch.no_grad()
def test_cross_attentions_are_zero_outside_the_mask():
    model = our_model(attention="eager")
    inputs = torch_batch(model.config)
    mask = inputs["image_attention_mask"].bool().repeat_interleave(6, dim=-1)
    sees = mask.any(dim=-1)
    for weights in model(**inputs, **LOOK).cross_attentions:
        outside = weights.masked_fill(mask.unsqueeze(1), 0.0)
        assert outside.transpose(1, 2)[sees].max() == 0.0


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
@torch.no_grad()
def test_d5_gates_are_returned(alpha_type):
    model = our_model(attention="eager", alpha_type=alpha_type)
    inputs = torch_batch(model.config)
    sees = inputs["image_attention_mask"].bool().any(dim=-1)
    gates = model(**inputs, **LOOK).cross_attention_gates
    assert [g.shape for g in gates] == [(4, 9, 1 if alpha_type == "float" else 24)] * 2
    for gate, block in zip(gates, model.model.gated_cross_attn_layers, strict=True):
        assert gate[~sees].abs().max() == 0.0
        assert torch.equal(gate[sees][0], block.alpha_cross_attn.tanh().flatten())


def test_d5_sdpa_says_what_to_switch():
    model = our_model(attention="sdpa")
    inputs = torch_batch(model.config)
    with pytest.warns(UserWarning, match=r"'sdpa' does not compute .*set_attn_implementation\(\"eager\"\)"):
        assert model(**inputs, **LOOK).attentions is None
    model.set_attn_implementation("eager")
    assert len(model(**inputs, **LOOK).attentions) == 4


def test_attentions_while_generating_in_beams():
    model = our_model(attention="eager")
    outputs = model.generate(
        **torch_batch(model.config),
        **LOOK,
        num_beams=2,
        max_new_tokens=2,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert outputs.attentions[1][0].shape == (8, 3, 1, 10)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_rotary_frequencies_are_never_rounded(convert):
    model = our_model()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    convert(model)
    assert model.dtype != torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(model.float().model.rotary_emb.original_inv_freq, frequencies)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype, attention, device):
    inputs = torch_batch(our_model().config, device)
    with torch.no_grad():
        expected = our_model(device)(**inputs).logits
        actual = our_model(device, attention, dtype=dtype)(**inputs).logits
    assert actual.dtype == dtype
    real = inputs["attention_mask"].bool()
    tolerance = HALF_PRECISION[str(dtype).removeprefix("torch.")]
    assert relative_error(actual[real].float().cpu(), expected[real].cpu()) < tolerance


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d12_no_nan_gradients_where_no_image_is_seen(dtype, attention, device):
    """A position that may see no image and scores all of them below -16 is what gave NaN gradients in float16."""
    model = our_model(device, attention, dtype=dtype, qk_layer_norms=False)
    inputs = torch_batch(model.config, device, with_labels=True)
    with torch.no_grad():
        for block in model.model.gated_cross_attn_layers:
            block.cross_attn.q_proj.weight.mul_(8)
            block.cross_attn.k_proj.weight.mul_(8)
    scores = []
    first = model.model.gated_cross_attn_layers[0].cross_attn
    first.q_proj.register_forward_hook(lambda module, args, out: scores.append(out))
    first.k_proj.register_forward_hook(lambda module, args, out: scores.append(out))
    outputs = model(**inputs)
    outputs.loss.backward()
    key, query = (x.detach().unflatten(-1, (3, 8)).float() for x in scores)
    highest = torch.einsum("bthk,bmhk->bthm", query, key).amax(dim=-1) * 8**-0.5
    blind = ~inputs["image_attention_mask"].bool().any(dim=-1)
    assert highest[blind].min() < -16, "the test has lost its point: no position scores its images low enough"
    assert torch.isfinite(outputs.logits).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("which", "kept"), [(True, {0, 1, 2, 3, 4}), (0, {0}), (-1, {4}), ([1, -2, 9], {1, 3})])
@torch.no_grad()
def test_hidden_states_can_be_chosen(which, kept):
    model = our_model()
    inputs = torch_batch(model.config)
    assert model(**inputs).hidden_states is None
    every, chosen = (model(**inputs, output_hidden_states=asked).hidden_states for asked in (True, which))
    assert {i for i, state in enumerate(chosen) if state is not None} == kept
    assert all(torch.equal(chosen[i], every[i]) for i in kept)


def test_a_registered_attention_is_used_for_every_token(monkeypatch):
    lengths, registered = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noted(module, query, *args, **kwargs):
        lengths.append(query.shape[2])
        return registered(module, query, *args, **kwargs)

    model = our_model(attention="sdpa")
    inputs = torch_batch(model.config)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noted)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, expected)
    assert 1 in lengths
