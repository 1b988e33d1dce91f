"""Cross-attention mapped back to patches: against a hand-made case, and against changes of the image."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from examples.attention_map import overlay
from idefics_pt.attention_maps import cross_attention_map, latent_reach
from tests.pt.pairs import our_model, torch_batch


def one_prompt(row=3, **overrides):
    model = our_model(attention="eager", **overrides)
    return model, {name: value[row : row + 1] for name, value in torch_batch(model.config).items()}


@pytest.mark.parametrize("use_resampler", [True, False])
def test_maps_are_shares_of_attention_on_the_images_a_token_sees(use_resampler):
    model, inputs = one_prompt(use_resampler=use_resampler)
    last = cross_attention_map(model, inputs)
    assert last.shape == (2, 2, 2)
    assert (last > 0).all()
    assert 0.5 < last.sum().item() <= 1.0
    earlier = cross_attention_map(model, inputs, position=5)
    assert earlier[0].sum() > 0.5
    assert earlier[1].abs().max() == 0.0  # the second image is seen from position 6 on


def test_without_a_resampler_the_map_is_the_attention_itself():
    model, inputs = one_prompt(use_resampler=False)
    weights = model(**inputs, output_attentions=True).cross_attentions[1][0, :, -1].mean(dim=0)
    expected = weights.detach().unflatten(0, (2, 5))[:, 1:].unflatten(1, (2, 2))
    assert torch.allclose(cross_attention_map(model, inputs, block=1), expected)


def test_a_token_that_sees_no_image_has_an_empty_map():
    model, inputs = one_prompt(row=0)
    assert cross_attention_map(model, inputs, position=0).abs().max() == 0.0
    assert cross_attention_map(model, inputs, position=3)[0].sum() > 0.5
    dark = {**inputs, "image_attention_mask": torch.zeros_like(inputs["image_attention_mask"])}
    assert cross_attention_map(model, dark).shape == (2, 2, 2)


def test_rollout_of_two_blocks_by_hand():
    # one latent, two vision tokens; the last column is the latent itself
    first = torch.tensor([[[[0.6, 0.2, 0.2]]]])
    second = torch.tensor([[[[0.1, 0.5, 0.4]]]])
    after_first = torch.tensor([0.75, 0.25])
    mixed = 0.5 * after_first + 0.5 * (torch.tensor([0.1, 0.5]) + 0.4 * after_first)
    assert torch.allclose(latent_reach((first, second), 2)[0, 0], mixed / mixed.sum())


def test_more_than_one_prompt_is_refused():
    model = our_model(attention="eager")
    with pytest.raises(ValueError, match="one prompt"):
        cross_attention_map(model, torch_batch(model.config))


def test_without_a_mask_the_map_is_that_of_the_models_own_mask():
    model, inputs = one_prompt()
    del inputs["image_attention_mask"]
    all_seen = {**inputs, "image_attention_mask": torch.ones(1, inputs["input_ids"].shape[1], 2)}
    assert torch.equal(cross_attention_map(model, inputs), cross_attention_map(model, all_seen))
    model.config.image_token_id = inputs["input_ids"][0, 4].item()
    seen = cross_attention_map(model, inputs)
    assert seen[0].sum() > 0.5
    assert seen[1].abs().max() == 0.0
    assert cross_attention_map(model, inputs, position=0).abs().max() == 0.0


@pytest.mark.parametrize(
    ("attention", "size", "message"),
    [("sdpa", 28, "needs attention weights, and 'sdpa' gives none.*\"eager\""), ("eager", 56, "28 x 28.*got 56 x 56")],
)
def test_what_gives_no_map_is_refused(attention, size, message):
    model = our_model(attention=attention)
    inputs = {name: value[3:] for name, value in torch_batch(model.config).items()}
    inputs["pixel_values"] = torch.randn(1, 2, 3, size, size)
    with pytest.raises(ValueError, match=message):
        cross_attention_map(model, inputs)


def test_a_map_of_zeros_can_be_drawn():
    shares = np.zeros((4, 4), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = np.asarray(overlay(Image.new("RGB", (28, 28), (90, 90, 90)), shares))
    assert (picture == 90).all()
