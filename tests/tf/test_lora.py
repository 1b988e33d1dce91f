"""LoRA on Keras's own: which layers it reaches, and adapters that train, survive files and merge."""

import json
import warnings

import keras
import numpy as np
import pytest

from idefics_common.parameters import Part
from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
from idefics_tf.lora import (
    PRESETS,
    adapted_layers,
    enable_lora,
    load_adapters,
    lora_targets,
    merge_adapters,
    save_adapters,
)
from idefics_tf.trainable import trainable_parameters
from tests.models import SMALL, batch, labels_of
from tests.tf.random_models import canonical, tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

SHALLOW = {
    "num_hidden_layers": 2,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}


def adapted_model(presets=tuple(PRESETS), **kwargs):
    """A small model with random adapters."""
    model = tf_model(**SHALLOW)
    enable_lora(model, presets, r=2, **kwargs)
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(keras.random.normal(variable.shape, seed=i) * 0.2)
    return model


def logits(model):
    return model(batch(model.config)).logits.numpy()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_reaches_all_linear_layers_of_its_part_and_trains_nothing_else(preset):
    model = tf_model(**SHALLOW)
    before = logits(model)
    enable_lora(model, preset, r=2)
    assert np.array_equal(logits(model), before)
    adapted = adapted_layers(model)
    assert list(adapted) == lora_targets(model.config, preset)
    counts = trainable_parameters(model)
    assert {part for part, count in counts.trainable.items() if count} == {PRESETS[preset]}
    assert {v.path.rpartition("/")[2] for v in model.trainable_variables} == {"lora_kernel_a", "lora_kernel_b"}
    assert len(model.trainable_variables) == 2 * len(adapted)
    sizes = sum(2 * sum(parameter.shape) for parameter, _ in adapted.values())
    assert sum(counts.trainable.values()) == sizes == counts.trainable[PRESETS[preset]]
    assert sum(counts.total.values()) == model.count_params()


def test_adapters_train_survive_files_and_merge(tmp_path):
    model = tf_model(**SHALLOW)
    base = canonical(model)
    enable_lora(model, ("text", "cross_attention"), r=4)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    inputs = batch(model.config)
    inputs["labels"] = labels_of(inputs)
    losses = model.fit(inputs, batch_size=4, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.array_equal(value, base[name]) for name, value in canonical(model).items())
    trained = logits(model)

    save_adapters(model, tmp_path / "adapters")
    model.save_weights(tmp_path / "x.weights.h5")
    model.save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="writes no LoRA adapters"):
        model.save_pretrained(tmp_path / "home")
    with_adapters, with_weights = tf_model(**SHALLOW), tf_model(seed=1, **SHALLOW)
    load_adapters(with_adapters, tmp_path / "adapters")
    assert with_adapters.trainable_variables == []
    assert np.array_equal(logits(with_adapters), trained)
    with_weights.load_weights(tmp_path / "x.weights.h5")
    merge_adapters(with_adapters)
    assert adapted_layers(with_adapters) == {}
    assert len(with_adapters.weights) == len(base)
    assert len(with_adapters.trainable_variables) == len(tf_model(**SHALLOW).trainable_variables)
    with_adapters.save_pretrained(tmp_path / "home")
    reloaded = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "home")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole = keras.saving.load_model(tmp_path / "x.keras")
    assert not whole.compiled  # the state of an optimizer of adapters is of no use to merged kernels
    for merged in (with_adapters, with_weights, reloaded, whole):
        assert relative_error(logits(merged), trained) < FLOAT32_ACTIVATIONS


def test_merging_counts_the_scale():
    model = adapted_model("text", lora_alpha=7)
    expected = logits(model)
    merge_adapters(model)
    assert relative_error(logits(model), expected) < FLOAT32_ACTIVATIONS
    assert relative_error(logits(tf_model(**SHALLOW)), expected) > 0.01


def test_loaded_adapters_train_on_request(tmp_path):
    save_adapters(adapted_model("vision"), tmp_path)
    model = tf_model(**SHALLOW)
    load_adapters(model, tmp_path, trainable=True)
    assert len(model.trainable_variables) == 2 * len(lora_targets(model.config, "vision"))


def _change(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "adapter_config.json: Keras's LoRA cannot do use_dora"),
        ({"modules_to_save": ["lm_head"], "use_rslora": True}, "cannot do modules_to_save, use_rslora"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"bias": "all"}, "bias must be none, since Keras adapts kernels alone; got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base model"),
        ({"r": 3}, r"r is 3, but the adapters have ranks \[2\]"),
    ],
)
def test_what_keras_cannot_do_is_refused(changes, message, tmp_path):
    save_adapters(adapted_model("text"), tmp_path)
    _change(tmp_path / "adapter_config.json", **changes)
    model = tf_model(**SHALLOW)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert adapted_layers(model) == {}
    assert model.trainable_variables


def test_adapters_of_another_model_are_refused(tmp_path):
    save_adapters(adapted_model("text"), tmp_path)
    with pytest.raises(ValueError, match=r"! base_model.model.model.layers.0.mlp.down_proj.lora_A.weight expected"):
        load_adapters(tf_model(**{**SHALLOW, "intermediate_size": 40}), tmp_path)
    with pytest.raises(ValueError, match=r"unexpected\n.*\+ 'base_model.model.model.layers.1"):
        load_adapters(tf_model(**{**SHALLOW, "num_hidden_layers": 1, "cross_layer_interval": 1}), tmp_path)


@pytest.mark.parametrize(
    ("presets", "overrides", "message"),
    [
        ("decoder", {}, r"LoRA presets are text, cross_attention, resampler, vision; got \['decoder'\]"),
        ((), {}, "got none"),
        ("resampler", {"use_resampler": False}, f"'resampler' needs a {Part.RESAMPLER}, and this model has none"),
    ],
)
def test_presets_that_name_nothing_are_refused(presets, overrides, message):
    with pytest.raises(ValueError, match=message):
        enable_lora(tf_model(**{**SHALLOW, **overrides}), presets)


def test_models_that_cannot_be_adapted_are_refused(tmp_path):
    with pytest.raises(ValueError, match="with a language head, got a TFIdeficsModel"):
        enable_lora(tf_model(model_class=TFIdeficsModel, **SHALLOW), "text")
    with pytest.raises(ValueError, match="has adapters already"):
        enable_lora(adapted_model("text"), "vision")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(tf_model(**SHALLOW), tmp_path)


def test_frozen_parts_count_in_the_table_of_what_trains():
    model = tf_model(freeze_text_layers=True, freeze_vision_layers=True, freeze_lm_head=True, **SHALLOW)
    counts = trainable_parameters(model)
    assert sum(counts.total.values()) == model.count_params()
    added = 3 * 24
    assert counts.trainable == {
        **counts.total, Part.VISION: 0, Part.DECODER: 0, Part.EMBEDDING: added, Part.HEAD: added
    }  # fmt: skip
    assert trainable_parameters(model.model).total == {**counts.total, Part.HEAD: 0}
