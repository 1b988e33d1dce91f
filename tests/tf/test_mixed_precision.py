"""Keras's mixed precision: training stays finite, weights stay float32, and float16 scales its loss."""

import keras
import numpy as np
import pytest

from tests.models import SMALL, batch, labels_of
from tests.tf.random_models import canonical, tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, HALF_PRECISION, relative_error

SHALLOW = {
    "num_hidden_layers": 2,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_t10_mixed_precision_trains(policy):
    model, reference = tf_model(dtype=policy, dropout=0.1, **SHALLOW), tf_model(**SHALLOW)
    inputs = batch(model.config)
    inputs["labels"] = labels_of(inputs)
    expected = reference(inputs)
    output = model(inputs)
    precision = policy.removeprefix("mixed_")
    assert output.logits.dtype == precision
    assert output.loss.dtype == "float32"
    error = relative_error(keras.ops.cast(output.logits, "float32"), expected.logits)
    assert FLOAT32_ACTIVATIONS < error < HALF_PRECISION[precision]

    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (precision == "float16")
    if is_scaled:
        # the default of 2**15 is halved, and the step left out, until no gradient overflows
        model.optimizer.initial_scale = 256.0
    model.gradient_checkpointing_enable()
    losses = model.fit(inputs, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert losses[0] == pytest.approx(float(expected.loss), rel=0.2)
    assert losses[-1] < 0.8 * losses[0]
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert all(np.isfinite(value).all() for value in canonical(model).values())
