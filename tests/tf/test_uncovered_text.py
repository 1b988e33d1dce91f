"""Image masks that cover fewer positions than the text of the call (E6): what was added sees the right thing, or is
refused. The right thing is one forward pass with a mask for all positions."""

import numpy as np
import pytest
import tensorflow as tf

from tests.appended_text import IMAGE, LAYOUTS, appended_text
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.fixture(scope="module")
def model():
    return tf_model()


@pytest.fixture
def knows(model, monkeypatch):
    """Whether the configuration knows the image token, set by a call."""
    return lambda token: monkeypatch.setattr(model.config, "image_token_id", token, raising=False)


def text_logits(model, inputs, call=None):
    """Logits where there is text; the others mean nothing."""
    logits = np.asarray(
        (model if call is None else call)({name: tf.constant(value) for name, value in inputs.items()}).logits
    )
    return logits[inputs["attention_mask"] == 1]


@pytest.mark.parametrize(
    ("layout", "token"), [*((layout, IMAGE) for layout in LAYOUTS), ("left", None), ("right", None)]
)
@pytest.mark.parametrize("in_graph", [False, True])
def test_appended_text_sees_what_the_text_before_saw(layout, token, in_graph, model, knows):
    """E6: prompts and completions side by side, with the mask of the prompts."""
    knows(token)
    inputs, whole_mask = appended_text(model.config, layout)
    expected = text_logits(model, {**inputs, "image_attention_mask": whole_mask})
    found = text_logits(model, inputs, tf.function(model) if in_graph else model)
    assert relative_error(found, expected) < FLOAT32_ACTIVATIONS
    blind = np.zeros_like(whole_mask)
    blind[:, : inputs["image_attention_mask"].shape[1]] = inputs["image_attention_mask"][:, : whole_mask.shape[1]]
    assert relative_error(text_logits(model, {**inputs, "image_attention_mask": blind}), expected) > 1e-3


def virtual(model, inputs, whole_mask, count=4):
    """The inputs as embeddings with virtual tokens in front."""
    embeddings = np.asarray(model.model.embed_tokens(inputs["input_ids"]))
    tokens = np.random.default_rng(1).standard_normal((3, count, embeddings.shape[2])).astype(np.float32)
    return {
        "inputs_embeds": np.concatenate((tokens, embeddings), axis=1),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (count, 0)), constant_values=1),
        "pixel_values": inputs["pixel_values"],
        "image_attention_mask": whole_mask,
    }


def test_virtual_tokens_in_front_see_nothing_and_what_is_ambiguous_is_refused(model, knows):
    """E6: embeddings with virtual tokens, embeddings that were appended, ids that were put in front."""
    inputs, whole_mask = appended_text(model.config, "left")
    in_front = virtual(model, inputs, whole_mask)
    with pytest.raises(ValueError, match=r"covers 10 of the 14 positions of inputs_embeds.*nothing says which"):
        model(in_front)
    knows(IMAGE)
    wide = {**in_front, "image_attention_mask": np.pad(whole_mask, ((0, 0), (4, 0), (0, 0)))}
    assert relative_error(text_logits(model, in_front), text_logits(model, wide)) < FLOAT32_ACTIVATIONS
    behind = {**in_front, "inputs_embeds": np.roll(in_front["inputs_embeds"], -4, axis=1)}
    with pytest.raises(ValueError, match=r"10 of the 14 positions of inputs_embeds.*in front of"):
        model(behind)
    before = {**inputs, "image_attention_mask": whole_mask}
    for name in ("input_ids", "attention_mask"):
        before[name] = np.pad(inputs[name], ((0, 0), (2, 0)), constant_values=1)
    with pytest.raises(ValueError, match=r"covers 10 of the 12 positions of input_ids.*behind"):
        model(before)
