"""Cross-attention mapped back to patches: the same numbers in both rooms, and the same refusals."""

import numpy as np
import pytest
import torch

import idefics_pt.attention_maps as pt_maps
import idefics_tf.attention_maps as tf_maps
from idefics_tf.weights import weights_by_name
from tests.equivalence.pairs import model_pair, to_numpy, to_torch
from tests.models import batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

SHALLOW = {"num_hidden_layers": 4, "cross_layer_interval": 2}


def one_prompt(config, row):
    return {name: value[row : row + 1] for name, value in batch(config).items()}


@pytest.mark.parametrize("use_resampler", [True, False])
def test_maps_are_equal(use_resampler):
    pt, keras_model = model_pair(use_resampler=use_resampler, **SHALLOW)
    # row 0 has text before its image; row 1 sees none; row 2 is padded, its second image never encoded; row 3 sees two
    for row in range(4):
        inputs = one_prompt(pt.config, row)
        without_mask = {name: value for name, value in inputs.items() if name != "image_attention_mask"}
        for position, block in ((-1, None), (3, None), (5, 0), (8, 1)):
            for given in (inputs, without_mask):
                expected = pt_maps.cross_attention_map(pt, to_torch(given), position, block)
                actual = tf_maps.cross_attention_map(keras_model, given, position, block)
                assert actual.dtype == "float32"
                assert relative_error(to_numpy(actual), to_numpy(expected)) < FLOAT32_ACTIVATIONS, (row, position)
    for config in (pt.config, keras_model.config):
        config.image_token_id = int(without_mask["input_ids"][0, 4])
    expected = pt_maps.cross_attention_map(pt, to_torch(without_mask))
    actual = to_numpy(tf_maps.cross_attention_map(keras_model, without_mask))
    assert relative_error(actual, to_numpy(expected)) < FLOAT32_ACTIVATIONS
    assert actual[0].sum() > 0.5
    assert actual[1].max() == 0.0

    kernel = weights_by_name(keras_model)["model.gated_cross_attn_layers.1.cross_attn.k_proj.weight"].variable
    kernel.assign(-kernel.numpy())
    spoiled = to_numpy(tf_maps.cross_attention_map(keras_model, without_mask))
    assert relative_error(spoiled, to_numpy(expected)) > 100 * FLOAT32_ACTIVATIONS


def test_the_reach_of_latents_is_equal():
    weights = np.random.default_rng(0).dirichlet(np.ones(5 + 3), size=(2, 2, 4, 3)).astype("f4")  # 2 blocks, 4 heads
    expected = pt_maps.latent_reach(tuple(map(torch.from_numpy, weights)), 5)
    actual = to_numpy(tf_maps.latent_reach(tuple(weights), 5))
    assert actual.shape == (2, 3, 5)
    assert relative_error(actual, to_numpy(expected)) < FLOAT32_ACTIVATIONS


def test_what_gives_no_map_is_refused_alike():
    pt, keras_model = model_pair(**SHALLOW)
    several = batch(pt.config)
    large = {**one_prompt(pt.config, 3), "pixel_values": np.zeros((1, 2, 3, 56, 56), "f4")}
    text = {name: value for name, value in one_prompt(pt.config, 3).items() if name in ("input_ids", "attention_mask")}
    for inputs, message in ((several, "one prompt"), (text, "one prompt"), (large, "28 x 28 pixels, got 56 x 56")):
        with pytest.raises(ValueError, match=message):
            pt_maps.cross_attention_map(pt, to_torch(inputs))
        with pytest.raises(ValueError, match=message):
            tf_maps.cross_attention_map(keras_model, inputs)
