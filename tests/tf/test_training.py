"""Keras's four loops on the model: call, predict, evaluate, fit; the loss, metrics, dropout and freezing."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from idefics_tf.training import causal_lm_loss
from tests.models import SMALL, batch, labels_of
from tests.tf.random_models import canonical, tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

TINY = {
    "num_hidden_layers": 2,
    "freeze_vision_layers": True,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}


@pytest.fixture(scope="module")
def model():
    return tf_model(**TINY)


@pytest.fixture
def inputs(model):
    inputs = batch(model.config)
    return {**inputs, "labels": labels_of(inputs)}


def numpy_loss(logits, labels) -> float:
    logits, labels = np.asarray(logits, np.float64)[:, :-1], labels[:, 1:]
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    kept = labels != -100
    return float(-log_probabilities[kept, labels[kept]].mean())


def test_the_loss_is_the_mean_over_labels_of_the_whole_vocabulary(model, inputs):
    inputs["labels"][0, 3] = 99  # of the additional vocabulary
    output = model(inputs)
    assert float(output.loss) == pytest.approx(numpy_loss(output.logits, inputs["labels"]), rel=1e-6)
    assert float(causal_lm_loss(output.logits, np.full((4, 9), -100))) == 0.0


def test_predict_joins_batches(model, inputs):
    expected = model(inputs, output_hidden_states=True)
    del inputs["labels"]
    output = model.predict(inputs, batch_size=2, verbose=0)
    assert output.keys() == ("logits", "image_hidden_states")
    assert isinstance(output.logits, np.ndarray)
    assert relative_error(output.logits, expected.logits) < FLOAT32_ACTIVATIONS
    assert output.past_key_values is None


def test_evaluate_and_fit_on_a_dataset(inputs):
    model = tf_model(**TINY, dropout=0.1)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    dataset = tf.data.Dataset.from_tensor_slices(inputs).batch(4)
    scores = model.evaluate(dataset, verbose=0, return_dict=True)
    logits = model(inputs).logits.numpy()
    kept = inputs["labels"][:, 1:] != -100
    accuracy = (logits[:, :-1].argmax(axis=-1) == inputs["labels"][:, 1:])[kept].mean()
    assert scores["loss"] == pytest.approx(numpy_loss(logits, inputs["labels"]), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(accuracy)

    before = canonical(model)
    trained = {variable.path for variable in model.trainable_variables}
    history = model.fit(dataset.repeat(8), epochs=1, shuffle=False, verbose=0).history
    assert history["loss"][0] < scores["loss"]
    assert model.evaluate(dataset, verbose=0, return_dict=True)["accuracy"] > 0.5
    changed = [name for name, value in canonical(model).items() if not np.array_equal(value, before[name])]
    assert len(changed) == len(trained)
    assert not any(name.startswith("model.vision_model") for name in changed)


def test_fit_on_a_generator_with_labels_as_targets(inputs):
    model = tf_model(**TINY)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    labels = inputs.pop("labels")

    def batches():
        while True:
            yield inputs, labels

    history = model.fit(batches(), steps_per_epoch=2, shuffle=False, verbose=0).history
    assert history["loss"][0] == pytest.approx(numpy_loss(model(inputs).logits, labels), rel=1e-5)


def test_a_loss_given_to_compile_gets_logits_and_targets(inputs):
    model = tf_model(**TINY)
    model.compile(loss=lambda y, logits: tf.reduce_mean(tf.cast(logits, tf.float32), axis=(1, 2)))
    labels = inputs.pop("labels")
    assert model.evaluate(inputs, labels, verbose=0) == pytest.approx(model(inputs).logits.numpy().mean(), rel=1e-4)


def weighted_loss(logits, labels, weights) -> float:
    """What a plain Keras loss makes of logits, labels and weights (B, T)."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    return float(loss(labels[:, 1:], logits[:, :-1], weights[:, 1:]))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 9)])
def test_k5_sample_weight_weighs_labels_wherever_they_are(model, inputs, shape):
    weights = np.random.default_rng(0).uniform(0.5, 2.0, shape).astype("float32")
    expected = weighted_loss(model(inputs).logits, inputs["labels"], np.broadcast_to(weights.reshape(4, -1), (4, 9)))
    model.compile(weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="mean")])
    assert expected != pytest.approx(float(model(inputs).loss), rel=1e-2)
    among = model.evaluate(inputs, sample_weight=weights, verbose=0, return_dict=True)
    assert among["loss"] == pytest.approx(expected, rel=1e-5)
    counted = inputs["labels"][:, 1:] != -100  # a metric divides by the sum of weights, a loss by their number
    mean_weight = np.broadcast_to(weights.reshape(4, -1), (4, 9))[:, 1:][counted].mean()
    assert among["mean"] == pytest.approx(expected / mean_weight, rel=1e-5)
    assert model.test_on_batch(inputs, sample_weight=weights)[0] == pytest.approx(expected, rel=1e-5)
    apart = {name: value for name, value in inputs.items() if name != "labels"}
    assert model.evaluate(apart, inputs["labels"], sample_weight=weights, verbose=0)[0] == pytest.approx(expected, 1e-5)
    assert model.evaluate(tf.data.Dataset.from_tensors((apart, inputs["labels"], weights)), verbose=0)[0] == (
        pytest.approx(expected, rel=1e-5)
    )


def test_k5_weights_reach_training_and_validation(inputs):
    model = tf_model(**TINY)
    weights = np.array([2.0, 0.0, 1.0, 3.0])
    expected = weighted_loss(model(inputs).logits, inputs["labels"], np.repeat(weights[:, None], 9, 1))
    model.compile(keras.optimizers.SGD(0.0))
    history = model.fit(inputs, sample_weight=weights, validation_data=(inputs, None, weights), verbose=0).history
    assert history == {"loss": [pytest.approx(expected, rel=1e-5)], "val_loss": [pytest.approx(expected, rel=1e-5)]}
    assert model.train_on_batch(inputs, sample_weight=weights) == pytest.approx(expected, rel=1e-5)


def test_a_loss_given_to_compile_gets_labels_among_the_inputs_and_goes_with_the_next_compile(inputs):
    model = tf_model(**TINY)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    model.compile(loss=loss, metrics=["accuracy"], run_eagerly=True)
    expected = float(loss(inputs["labels"], model(inputs).logits))
    assert model.evaluate(inputs, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    model.compile(run_eagerly=True)
    assert model.evaluate(inputs, verbose=0) == pytest.approx(float(model(inputs).loss), rel=1e-5)


REFUSED = {
    "nothing to compute a loss from": {"y": None},
    "labels with the other inputs, and targets": {"labels": True},
    r"sample_weight must have shape \(batch,\) or \(batch, text_len\)": {"sample_weight": np.ones((4, 3))},
}


@pytest.mark.parametrize("message", REFUSED)
def test_k5_what_the_built_in_loss_cannot_use_is_refused(inputs, message):
    model = tf_model(**TINY)
    model.compile(run_eagerly=True)
    arguments = dict(REFUSED[message])
    labels = inputs["labels"] if arguments.pop("labels", False) else inputs.pop("labels")
    with pytest.raises(ValueError, match=message):
        model.evaluate(inputs, **{"y": labels, **arguments}, verbose=0)


def test_k5_class_weight_and_loss_weights_are_refused_by_name(inputs):
    model = tf_model(**TINY)
    with pytest.raises(ValueError, match="loss_weights weigh what `loss` names"):
        model.compile(loss_weights=[2.0])
    assert not model.compiled
    model.compile()
    for loop in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match=r"class_weight .* give sample_weight"):
            loop(inputs, class_weight={0: 2.0})


DROPOUT = {"dropout": 0.3, "vision_config": {**TINY["vision_config"], "attention_dropout": 0.3}}


def test_t5_dropout_is_off_at_inference_and_on_in_training(model, inputs):
    keras.utils.set_random_seed(1)
    dropping = tf_model(**{**TINY, **DROPOUT})
    expected = model(inputs).logits.numpy()
    assert np.array_equal(dropping(inputs).logits, expected)
    assert np.array_equal(dropping(inputs, training=False).logits, expected)
    first, second = (dropping(inputs, training=True) for _ in range(2))
    assert relative_error(first.logits, expected) > 1e-2
    assert relative_error(first.logits, second.logits) > 1e-2
    assert relative_error(first.image_hidden_states, second.image_hidden_states) > 1e-3
    keras.utils.set_random_seed(1)
    again = tf_model(**{**TINY, **DROPOUT})
    assert np.array_equal(again(inputs, training=True).logits, first.logits)


def test_a_model_with_dropout_has_the_same_weights_on_disk(model, tmp_path):
    dropping = tf_model(seed=1, **{**TINY, **DROPOUT})
    model.save_weights(tmp_path / "x.weights.h5")
    dropping.load_weights(tmp_path / "x.weights.h5")
    assert all(np.array_equal(value, canonical(dropping)[name]) for name, value in canonical(model).items())


def test_a_loaded_model_goes_on_training_as_the_saved_one(inputs, tmp_path):
    model = tf_model(**TINY)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), metrics=["accuracy"], run_eagerly=True)
    for _ in range(2):
        model.train_on_batch(inputs)
    model.save(tmp_path / "x.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = keras.saving.load_model(tmp_path / "x.keras")
    assert loaded.compiled
    assert loaded.run_eagerly
    assert not loaded.jit_compile
    assert int(loaded.optimizer.iterations) == 2
    state, expected_state = ([value.numpy() for value in m.optimizer.variables] for m in (loaded, model))
    assert len(state) > 2
    assert all(map(np.array_equal, state, expected_state))
    model.reset_metrics()
    logs, expected = (m.train_on_batch(inputs, return_dict=True) for m in (loaded, model))
    assert set(logs) == {"loss", "accuracy"}
    assert logs == pytest.approx(expected, rel=1e-5)
    weights, expected_weights = canonical(loaded), canonical(model)
    assert all(relative_error(weights[name], value, 1e-3) < 1e-4 for name, value in expected_weights.items())


def test_xla_on_request(inputs):
    model = tf_model(**TINY)
    model.compile(jit_compile=True)
    assert model.jit_compile
    assert model.evaluate(inputs, verbose=0) == pytest.approx(float(model(inputs).loss), rel=1e-5)


def test_k4_accumulated_gradients_of_images_survive_a_last_batch_of_text(inputs):
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    model, plain = (tf_model(**{**TINY, "freeze_vision_layers": False}) for _ in range(2))
    model.compile(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=2, weight_decay=0.01))
    norm = model.model.vision_model.post_layernorm
    before = norm.get_weights()
    for given in (inputs, text):
        model.train_on_batch(given)
    np.testing.assert_array_equal(norm.get_weights(), before)

    variables = [variable for variable in plain.trainable_variables if "post_layernorm" not in variable.path]
    with tf.GradientTape() as tape:
        loss = (plain(inputs).loss + plain(text).loss) / 2
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.assign(variable * (1 - 0.5 * 0.01) - 0.5 * tf.convert_to_tensor(gradient))
    expected, trained = canonical(plain), canonical(model)
    for name in expected:
        np.testing.assert_allclose(trained[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
