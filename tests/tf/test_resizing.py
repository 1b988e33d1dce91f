"""Resizing the vocabulary: ids keep their meaning, trained rows are kept, files remember."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
from idefics_tf.weights import weights_by_name
from tests.models import batch
from tests.tf.random_models import canonical, tf_model

TWO_LAYERS = {"num_hidden_layers": 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("total", [97, 98, 110])
def test_t10_the_additional_vocabulary_takes_the_change(total, tied, tmp_path):
    model = tf_model(tie_word_embeddings=tied, **TWO_LAYERS)
    paths = [variable.path for variable in model.weights]
    kept = min(total, 100)
    ids = np.arange(kept)[None]
    embeddings, logits = model.model.embed_tokens(ids).numpy(), model(ids).logits.numpy()
    assert model.resize_token_embeddings(total) is model.model.embed_tokens
    assert (model.config.vocab_size, model.config.additional_vocab_size) == (97, total - 97)
    if total > 97:
        assert [variable.path for variable in model.weights] == paths
    model.save_pretrained(tmp_path / "home")
    model.save_weights(tmp_path / "x.weights.h5")
    loaded = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "home")
    filled = TFIdeficsForVisionText2Text(model.config)
    filled.load_weights(tmp_path / "x.weights.h5")
    for resized in (model, loaded, filled):
        assert np.array_equal(resized.model.embed_tokens(ids), embeddings)
        new_logits = resized(ids).logits.numpy()
        assert new_logits.shape[-1] == total
        assert np.allclose(new_logits[..., :kept], logits[..., :kept], rtol=0, atol=1e-5)


def test_new_rows_are_the_mean_of_the_base_or_random():
    model = tf_model(**TWO_LAYERS)
    model.resize_token_embeddings(104)
    weights = canonical(model)
    for base, added in (
        ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
        ("lm_head.weight", "lm_head.additional_fc.weight"),
    ):
        assert np.allclose(weights[added][3:], weights[base].mean(axis=0))
    model.resize_token_embeddings(120, mean_resizing=False)
    assert 0.01 < model.model.embed_tokens.additional_embedding.embeddings.numpy()[7:].std() < 0.03


def test_rounding_up_and_the_lower_bound():
    model = tf_model(model_class=TFIdeficsModel, **TWO_LAYERS)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.additional_vocab_size == 128 - 97
    assert model(np.array([[127]])).last_hidden_state.shape == (1, 1, 24)
    with pytest.raises(ValueError, match="at least vocab_size 97, got 96"):
        model.resize_token_embeddings(96)


@pytest.mark.parametrize("total", [90, 120])
@pytest.mark.parametrize("tied", [False, True])
def test_without_added_vocabulary_the_base_is_resized(total, tied):
    model = tf_model(additional_vocab_size=0, tie_word_embeddings=tied, **TWO_LAYERS)
    before = canonical(model)
    kept = min(total, 97)
    model.resize_token_embeddings(total)
    after = canonical(model)
    assert model.config.vocab_size == total
    assert model(np.arange(kept)[None]).logits.shape[-1] == total
    for name, value in before.items():
        resized = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert np.array_equal(after[name][:kept] if resized else after[name], value[:kept] if resized else value)
        if resized and total > 97:
            assert np.allclose(after[name][kept:], value.mean(axis=0), atol=1e-6)


def test_a_resized_model_trains_and_stays_frozen_where_it_was():
    model = tf_model(freeze_text_layers=True, freeze_lm_head=True, dtype="mixed_bfloat16", **TWO_LAYERS)
    trained = {variable.path for variable in model.trainable_variables}
    model.resize_token_embeddings(110)
    assert {variable.path for variable in model.trainable_variables} == trained
    assert {weight.variable.dtype for weight in weights_by_name(model).values()} == {"float32"}
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    inputs = batch(model.config)
    before = canonical(model)
    inputs["labels"] = tf.constant(np.where(inputs["attention_mask"] == 1, 109, -100))
    model.fit(inputs, batch_size=4, verbose=0)
    changed = {name for name, value in canonical(model).items() if not np.array_equal(value, before[name])}
    assert "lm_head.additional_fc.weight" in changed
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & changed
