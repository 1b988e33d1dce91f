"""Mistakes that both rooms refuse, and in the same words."""

import numpy as np
import pytest
from transformers import DynamicCache

from tests.equivalence.pairs import model_pair, to_torch
from tests.models import batch

MISTAKES = {
    "ids_and_embeddings": {"inputs_embeds": np.ones((4, 9, 24), np.float32)},
    "axes_of_ids": {"input_ids": np.ones(9, np.int64)},
    "empty_ids": {"input_ids": np.ones((4, 0), np.int64)},
    "axes_of_embeddings": {"input_ids": None, "inputs_embeds": np.ones((4, 9), np.float32)},
    "unknown_id": {"input_ids": np.full((4, 9), 100)},
    "mask_of_another_length": {"attention_mask": np.ones((4, 8), np.int64)},
    "labels_beyond_the_vocabulary": {"labels": np.full((4, 9), 100)},
    "negative_labels": {"labels": np.full((4, 9), -1)},
    "images_in_two_forms": {"perceiver_embeddings": np.ones((4, 2, 6, 20), np.float32)},
    "rows_of_images": {"pixel_values": np.ones((3, 2, 3, 28, 28), np.float32)},
    "axes_of_images": {"pixel_values": np.ones((4, 3, 28, 28), np.float32)},
    "channels": {"pixel_values": np.ones((4, 2, 1, 28, 28), np.float32)},
    "size": {"pixel_values": np.ones((4, 2, 3, 56, 28), np.float32)},
    "width": {"pixel_values": None, "perceiver_embeddings": np.ones((4, 2, 6, 19), np.float32)},
    "no_images": {"pixel_values": None},
    "rows_of_the_image_mask": {"image_attention_mask": np.ones((3, 9, 2), np.int64)},
    "images_of_the_image_mask": {"image_attention_mask": np.ones((4, 9, 3), np.int64)},
}
"""Changes of a batch."""

PIXELS = np.random.default_rng(3).standard_normal((4, 2, 3, 28, 28)).astype(np.float32)
LATER_MISTAKES = {
    "no_mask_for_new_images": {"pixel_values": PIXELS, "image_attention_mask": None},
    "too_few_columns": {"pixel_values": PIXELS[:, :1]},
    "rows_of_new_images": {"pixel_values": PIXELS[:3]},
    "an_image_that_nobody_saw": {"image_attention_mask": np.ones((4, 9, 2), np.int64)},
    "length_of_the_image_mask": {"image_attention_mask": np.zeros((4, 8, 2), np.int64)},
}
"""Changes of what follows a cache of the first six positions."""


@pytest.fixture(scope="module")
def pair():
    return model_pair(num_hidden_layers=2)


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as raised:
        call(*args, **kwargs)
    return str(raised.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_call(pair, mistake):
    pt, keras_model = pair
    inputs = {**batch(pt.config), **MISTAKES[mistake]}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    # Keras says around it which layer raised
    assert message_of(pt, **to_torch(inputs)) in message_of(keras_model, inputs)


@pytest.mark.parametrize("mistake", LATER_MISTAKES)
def test_a_call_with_a_cache(pair, mistake):
    pt, keras_model = pair
    whole = batch(pt.config)
    text = {name: value for name, value in whole.items() if name != "pixel_values"}
    start = {**{name: value[:, :6] for name, value in text.items()}, "pixel_values": whole["pixel_values"]}
    later = {**text, "input_ids": text["input_ids"][:, 6:], **LATER_MISTAKES[mistake]}
    later = {name: value for name, value in later.items() if value is not None}
    pt_cache = DynamicCache(config=pt.config)
    pt(**to_torch(start), past_key_values=pt_cache)
    keras_cache = keras_model(start, use_cache=True).past_key_values
    expected = message_of(pt, **to_torch(later), past_key_values=pt_cache)
    assert expected in message_of(keras_model, later, past_key_values=keras_cache)


def test_a_mask_of_one_axis(pair):
    pt, keras_model = pair
    inputs = {**batch(pt.config), "attention_mask": np.ones(9, np.int64)}
    assert message_of(pt, **to_torch(inputs)) == "attention_mask must have 2 or 4 axes, got shape (9,)."
    assert "attention_mask must have 2 axes, got shape (9,)." in message_of(keras_model, inputs)


def test_a_keyword_goes_before_the_dict(pair):
    _, keras_model = pair
    inputs = batch(pair[0].config)
    blind = {**inputs, "image_attention_mask": np.zeros_like(inputs["image_attention_mask"])}
    expected = keras_model(blind).logits
    actual = keras_model(inputs, image_attention_mask=blind["image_attention_mask"]).logits
    assert np.array_equal(actual, expected)
    assert not np.array_equal(actual, keras_model(inputs).logits)
