"""Dropout: nothing outside training, and in training at every place that is to have it."""

import copy

import pytest
import torch

from tests.models import SMALL
from tests.pt.pairs import our_model, torch_batch

RATE = 0.3
DROPPING = {"dropout": RATE, "vision_config": {**SMALL["vision_config"], "attention_dropout": RATE}}
SITES = (
    "attention branch of the text",
    "MLP branch of the text",
    "attention branch of the gated block",
    "MLP branch of the gated block",
    "attention weights of the text",
    "attention weights of the gated block",
    "attention weights of the vision tower",
)


def logits(model, inputs, seed: int = 0):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def keep_only(model, site: str | None) -> None:
    """Set the rate to zero everywhere but at one site. Of the two branches that share a rate, the other adds zeros."""
    silent = copy.copy(model.config)
    silent.dropout = 0.0
    blocks = {"text": model.model.layers, "gated block": model.model.gated_cross_attn_layers}
    for name, layers in blocks.items():
        for layer in layers:
            attention = layer.self_attn if name == "text" else layer.cross_attn
            if site == f"attention branch of the {name}":
                layer.mlp.down_proj.weight.data.zero_()
            elif site == f"MLP branch of the {name}":
                attention.o_proj.weight.data.zero_()
            else:
                layer.dropout = 0.0
            if site != f"attention weights of the {name}":
                attention.config = silent
    if site != "attention weights of the vision tower":
        for layer in model.model.vision_model.encoder.layers:
            layer.self_attn.attention_dropout = 0.0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_there_is_none_outside_training(attention):
    model, without = our_model(attention=attention, **DROPPING), our_model(attention=attention)
    inputs = torch_batch(model.config)
    assert torch.equal(logits(model, inputs), logits(without, inputs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("site", SITES)
def test_each_site_drops_in_training(site, attention):
    model = our_model(attention=attention, **DROPPING)
    inputs = torch_batch(model.config)
    keep_only(model, site)
    whole = logits(model, inputs)
    model.train()
    first, again, other = (logits(model, inputs, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, whole, atol=1e-2)
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_there_are_no_other_sites(attention):
    model = our_model(attention=attention, **DROPPING)
    inputs = torch_batch(model.config)
    keep_only(model, None)
    whole = logits(model, inputs)
    assert torch.equal(logits(model.train(), inputs), whole)
