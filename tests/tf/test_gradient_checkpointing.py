"""Gradient checkpointing: the gradients that training has without it, from the same dropout."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from idefics_tf.lora import enable_lora
from tests.models import SMALL, batch, labels_of
from tests.tf.random_models import canonical, tf_model
from tests.tolerances import FLOAT32_GRADIENTS, relative_error

SHALLOW = {
    "num_hidden_layers": 2,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}
DROPOUT = {"dropout": 0.3, "vision_config": {**SHALLOW["vision_config"], "attention_dropout": 0.3}}
FROZEN = {"freeze_text_layers": True, "freeze_vision_layers": True}


def inputs_of(model):
    inputs = batch(model.config)
    return {name: tf.constant(value) for name, value in {**inputs, "labels": labels_of(inputs)}.items()}


def make(checkpointed, overrides, preset=None):
    keras.utils.set_random_seed(3)
    model = tf_model(**{**SHALLOW, **overrides})
    if preset is not None:
        enable_lora(model, preset, r=2)
        for variable in model.trainable_variables:
            variable.assign(keras.random.normal(variable.shape, seed=1) * 0.1)
    if checkpointed:
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing == checkpointed
    return model


def gradients(model, in_graph):
    """The loss and the gradients by path below the model, of two steps, because the second draws other seeds."""

    def step(inputs):
        with tf.GradientTape() as tape:
            loss = model(inputs, training=True).loss
        return loss, tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    step = tf.function(step) if in_graph else step
    inputs = inputs_of(model)
    first, second = step(inputs), step(inputs)
    paths = [variable.path.partition("/")[2] for variable in model.trainable_variables]
    arrays = [None if gradient is None else tf.convert_to_tensor(gradient).numpy() for gradient in second[1]]
    return (float(first[0]), float(second[0])), dict(zip(paths, arrays, strict=True))


def assert_same_gradients(overrides, in_graph, preset=None):
    (expected_losses, expected), (losses, actual) = (
        gradients(make(checkpointed, overrides, preset), in_graph) for checkpointed in (False, True)
    )
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    known = {path: gradient for path, gradient in expected.items() if gradient is not None}
    assert {path for path, gradient in actual.items() if gradient is not None} == set(known)
    assert len(known) > 5
    largest = max(np.abs(gradient).max() for gradient in known.values())
    errors = {path: relative_error(actual[path], known[path], least_scale=1e-2 * largest) for path in known}
    assert max(errors.values()) < FLOAT32_GRADIENTS, max(errors, key=errors.get)
    return losses


@pytest.mark.parametrize(
    ("overrides", "in_graph"),
    [({}, False), (DROPOUT, False), (DROPOUT, True), ({**DROPOUT, **FROZEN}, True)],
    ids=["plain", "dropout", "dropout_in_graph", "frozen_in_graph"],
)
def test_t6_gradients_are_the_same(overrides, in_graph):
    losses = assert_same_gradients(overrides, in_graph)
    assert (losses[0] != losses[1]) == ("dropout" in overrides)


@pytest.mark.parametrize("preset", ["text", "vision"])
def test_gradients_of_adapters_are_the_same(preset):
    assert_same_gradients(DROPOUT, False, preset)


def count_runs(model, monkeypatch):
    """The vision layers' norms count their calls into the list that this returns."""
    runs = []
    for layer in model.model.vision_model.encoder.layers:
        original = layer.layer_norm1.call
        monkeypatch.setattr(layer.layer_norm1, "call", lambda x, original=original: (runs.append(1), original(x))[1])
    return runs


def test_layers_run_again_in_the_backward_pass(monkeypatch):
    model = make(True, {})
    runs = count_runs(model, monkeypatch)
    with tf.GradientTape() as tape:
        loss = model(inputs_of(model), training=True).loss
    assert len(runs) == 1
    tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert len(runs) == 2


def test_fit_trains_alike_and_can_be_switched_back():
    results = []
    for checkpointed in (False, True):
        model = make(checkpointed, DROPOUT)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        inputs = inputs_of(model)
        model.fit(inputs, batch_size=4, epochs=2, verbose=0, shuffle=False)
        results.append(canonical(model))
    plain, recomputed = results
    assert all(relative_error(recomputed[name], plain[name], 0.1) < FLOAT32_GRADIENTS for name in plain)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert model.train_function is None


def test_attentions_and_caches_are_there_on_request():
    model = make(True, {})
    output = model(inputs_of(model), training=True, output_attentions=True, use_cache=True)
    plain = make(False, {})(inputs_of(model), training=True, output_attentions=True, use_cache=True)
    assert output.keys() == plain.keys()
    for ours, theirs in zip(tf.nest.flatten(output), tf.nest.flatten(plain), strict=True):
        assert relative_error(ours, theirs) < 1e-6
