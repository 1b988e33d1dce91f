"""LoRA on Keras's own: which layers it reaches, and adapters that train, survive files, go on training and merge."""

import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

from idefics_common.parameters import Part
from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
from idefics_tf.freezing import train_only
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
    with pytest.raises(ValueError, match=r"writes no LoRA adapters, which model/.*_proj has"):
        model.save_pretrained(tmp_path / "home")
    with_adapters = tf_model(**SHALLOW)
    load_adapters(with_adapters, tmp_path / "adapters")
    assert with_adapters.trainable_variables == []
    assert np.array_equal(logits(with_adapters), trained)
    merge_adapters(with_adapters)
    assert adapted_layers(with_adapters) == {}
    assert len(with_adapters.weights) == len(base)
    assert len(with_adapters.trainable_variables) == len(tf_model(**SHALLOW).trainable_variables)
    with_adapters.save_pretrained(tmp_path / "home")
    reloaded = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "home")
    for merged in (with_adapters, reloaded):
        assert relative_error(logits(merged), trained) < FLOAT32_ACTIVATIONS


def by_presets(model):
    enable_lora(model, ("text", "cross_attention"), r=4, modules_to_save=["additional_embedding"])


def by_keras(*layers_of):
    """Keras's own `enable_lora`, each layer with a rank and an alpha of its own; all else stays as it is: it trains."""

    def enable(model):
        for i, layer_of in enumerate(layers_of):
            layer_of(model).enable_lora(2 + i, 3 + 2 * i)

    return enable


LAYERS = {
    "dense": lambda model: model.model.decoder_layers[0].mlp.up_proj,
    "dense_with_bias": lambda model: model.model.vision_model.encoder.layers[0].mlp.fc1,
    "head": lambda model: model.lm_head.base,
    "embedding": lambda model: model.model.embed_tokens.base,
    "positions": lambda model: model.model.vision_model.embeddings.position_embedding,
    "convolution": lambda model: model.model.vision_model.embeddings.patch_embedding,
}
ENABLE = {
    "presets": by_presets,
    "keras": by_keras(*LAYERS.values()),
}


class Interrupted(keras.callbacks.Callback):
    """A machine that goes away after two epochs."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ENABLE)
def test_k3_a_resumed_run_follows_the_uninterrupted_one(kind, tmp_path):
    """By every way that Keras has. Without its adapters, or the optimizer's state, a run would have other losses."""

    def fresh(seed=0):
        model = tf_model(seed, **SHALLOW)
        ENABLE[kind](model)
        model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
        return model

    start = fresh()
    adapted = [variable.name for variable in start.trainable_variables if variable.name.startswith("lora")]
    start.save_weights(tmp_path / "start.weights.h5")  # A is random, and of another value in each model
    inputs = batch(start.config)
    inputs["labels"] = labels_of(inputs)

    def fit(model, epochs, *callbacks):
        return model.fit(inputs, batch_size=4, epochs=epochs, verbose=0, callbacks=callbacks).history["loss"]

    whole = fresh()
    whole.load_weights(tmp_path / "start.weights.h5")
    losses = fit(whole, 4)
    assert losses[3] < losses[2] - 1e-3

    first = fresh()
    first.load_weights(tmp_path / "start.weights.h5")
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    checkpoints = [
        keras.callbacks.ModelCheckpoint(tmp_path / "x.keras"),
        keras.callbacks.ModelCheckpoint(tmp_path / "x.weights.h5", save_weights_only=True),
    ]
    with pytest.raises(KeyboardInterrupt):
        fit(first, 4, backup, *checkpoints, Interrupted())
    first.save_weights(tmp_path / "x.weights.json", max_shard_size=1e-4)
    assert len(list(tmp_path.glob("x_*.weights.h5"))) > 2

    resumed = {"pickle": pickle.loads(pickle.dumps(first)), "keras": keras.saving.load_model(tmp_path / "x.keras")}
    for name in ("x.weights.h5", "x.weights.json"):
        resumed[name] = fresh(seed=1)
        resumed[name].optimizer.build(resumed[name].trainable_variables)
        resumed[name].load_weights(tmp_path / name)
    assert fit(fresh(seed=1), 4, backup) == pytest.approx(losses[2:], rel=1e-5)
    for name, model in resumed.items():
        assert fit(model, 2) == pytest.approx(losses[2:], rel=1e-5), name
        names = [variable.name for variable in model.trainable_variables if variable.name.startswith("lora")]
        assert names == adapted, name
        assert len(model.trainable_variables) == len(whole.trainable_variables), name


def with_all_kinds(**overrides):
    """A model with random adapters, and nothing else that trains, on layers of all kinds."""
    model = tf_model(**SHALLOW, **overrides)
    by_keras(*LAYERS.values())(model)
    adapters = [variable for variable in model.weights if variable.name.startswith("lora")]
    for i, variable in enumerate(adapters):
        variable.assign(keras.random.normal(variable.shape, seed=i) * 0.2)
    train_only(model, adapters)
    return model


def by_hand(model):
    """A model without adapters whose matrices are those of `model` with the products added, in numpy."""
    plain = tf_model(**SHALLOW)
    for name, layer_of in LAYERS.items():
        layer, target = layer_of(model), layer_of(plain)
        what = "embeddings" if name in ("embedding", "positions") else "kernel"
        a, b = (getattr(layer, f"lora_{what}_{factor}").numpy() for factor in "ab")
        matrix = next(variable for variable in target.weights if variable.name == what)
        matrix.assign(matrix.numpy() + layer.lora_alpha / layer.lora_rank * np.tensordot(a, b, 1))
    return plain


def test_k3_adapters_of_all_kinds_add_what_they_say_wherever_they_go(tmp_path):
    model = with_all_kinds()
    expected, base = logits(by_hand(model)), logits(tf_model(**SHALLOW))
    assert relative_error(logits(model), expected) < FLOAT32_ACTIVATIONS
    assert relative_error(base, expected) > 0.1

    model.save_weights(tmp_path / "x.weights.h5")
    model.export(tmp_path / "served")
    save_adapters(model, tmp_path / "adapters")
    with pytest.raises(ValueError, match="writes no LoRA adapters, which model/embed_tokens/base has"):
        model.save_pretrained(tmp_path / "home")
    with pytest.raises(ValueError, match=r"The vocabulary has LoRA adapters of its size: call .*merge_adapters"):
        model.resize_token_embeddings(104)
    with pytest.raises(ValueError, match=r"The model has LoRA adapters: call .*merge_adapters before"):
        model.quantize("int8")

    plain, loaded = tf_model(seed=1, **SHALLOW), tf_model(**SHALLOW)
    plain.load_weights(tmp_path / "x.weights.h5")
    assert adapted_layers(plain) == {}
    load_adapters(loaded, tmp_path / "adapters")
    assert list(adapted_layers(loaded)) == list(adapted_layers(model))
    merge_adapters(model)
    assert adapted_layers(model) == {}
    assert len(model.trainable_variables) == len(model.weights) == len(tf_model(**SHALLOW).weights)
    model.save_pretrained(tmp_path / "home")
    home = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "home")
    for other in (plain, loaded, model, home):
        assert relative_error(logits(other), expected) < FLOAT32_ACTIVATIONS
    served = tf.saved_model.load(tmp_path / "served").signatures["serving_default"]
    inputs = {name: tf.constant(value) for name, value in batch(model.config).items()}
    assert relative_error(served(**inputs)["logits"], expected) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_k3_files_hold_matrices_and_adapters_bit_for_bit_in_half_precision(policy, tmp_path):
    model = with_all_kinds(dtype=policy)
    model.save_weights(tmp_path / "x.weights.h5")
    other = with_all_kinds(dtype=policy, seed=1)
    other.load_weights(tmp_path / "x.weights.h5")
    for mine, theirs in zip(other.weights, model.weights, strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine.numpy(), theirs.numpy())


def test_k3_weights_without_adapters_start_them_anew(tmp_path):
    """What Keras itself does here is to set both factors to zero: the loss never moves again."""
    base = tf_model(seed=1, **SHALLOW)
    base.save_weights(tmp_path / "x.weights.h5")
    model = with_all_kinds()
    model.load_weights(tmp_path / "x.weights.h5")
    assert relative_error(logits(model), logits(base)) < FLOAT32_ACTIVATIONS
    inputs = batch(model.config)
    inputs["labels"] = labels_of(inputs)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    before = [variable.numpy() for variable in model.trainable_variables]
    losses = [model.train_on_batch(inputs) for _ in range(3)]
    assert losses[2] < losses[0]
    assert len(before) == 2 * len(LAYERS)
    assert not any(map(np.array_equal, before, (variable.numpy() for variable in model.trainable_variables)))


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (2, 9, r"\(24, 2\) and \(2, 44\) with lora_alpha 9, the file has \(24, 2\) and \(2, 44\) with 3"),
        (5, 3, r"\(24, 5\) and \(5, 44\) with lora_alpha 3, the file has \(24, 2\)"),
    ],
)
def test_k3_adapters_that_mean_something_else_are_refused(rank, alpha, message, tmp_path):
    model, other = tf_model(**SHALLOW), tf_model(**SHALLOW)
    LAYERS["dense"](model).enable_lora(2, 3)
    LAYERS["dense"](other).enable_lora(rank, alpha)
    model.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match=f"layers_0/mlp/up_proj: expected adapters of shapes {message}"):
        other.load_weights(tmp_path / "x.weights.h5")


def test_k3_adapters_on_quantized_layers(tmp_path):
    """Keras's own enable_lora on int8: the kernel is not quantized anew in the file, as Keras does it."""
    model = tf_model(**SHALLOW)
    model.quantize("int8")
    layer = LAYERS["dense"](model)
    layer.enable_lora(2, 3)
    layer.lora_kernel_b.assign(keras.random.normal((2, 44), seed=0))
    kernel, expected = layer._kernel.numpy(), logits(model)
    model.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    assert np.array_equal(LAYERS["dense"](loaded)._kernel.numpy(), kernel)
    assert np.array_equal(logits(loaded), expected)
    other = tf_model(**SHALLOW)
    other.quantize("int8")
    model.save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="up_proj: the file has adapters, and this layer is quantized and has none"):
        other.load_weights(tmp_path / "x.weights.h5")
    merge_adapters(loaded)
    assert relative_error(logits(loaded), expected) < 0.05  # what a kernel quantized anew costs
    assert relative_error(logits(other), expected) > 0.1


def test_adapters_take_along_what_trains_beside_them(tmp_path):
    model = tf_model(**SHALLOW)
    enable_lora(model, "text", r=2, modules_to_save=["additional_embedding"])
    model.model.norm.trainable = True
    for i, variable in enumerate(model.trainable_variables):
        variable.assign_add(keras.random.normal(variable.shape, seed=i) * 0.2)
    save_adapters(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens.additional_embedding", "model.norm"]
    loaded = tf_model(**SHALLOW)
    load_adapters(loaded, tmp_path)
    assert np.array_equal(logits(loaded), logits(model))
    assert loaded.trainable_variables == []
    again = pickle.loads(pickle.dumps(loaded))  # nothing trains any more that would tell what belongs to the adapters
    save_adapters(again, tmp_path / "again")
    last = tf_model(**SHALLOW)
    load_adapters(last, tmp_path / "again", trainable=True)
    assert np.array_equal(logits(last), logits(model))
    assert len(last.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize(
    ("enable", "message"),
    [
        (lambda model: setattr(model.model.vision_model.encoder.layers[0].mlp.fc1.bias, "trainable", True), "fc1.bias"),
        (lambda model: setattr(model.model.embed_tokens.additional_embedding, "trainable", True), None),
        (lambda model: setattr(model.model.perceiver_resampler, "trainable", True), None),
    ],
)
def test_what_pefts_format_has_no_place_for_is_refused(enable, message, tmp_path):
    model = tf_model(**SHALLOW)
    enable_lora(model, "vision", r=2)
    enable(model)
    if message is None:
        save_adapters(model, tmp_path)
        return
    with pytest.raises(
        ValueError, match=f"{message} trains, and PEFT's format has no place for it beside the adapters"
    ):
        save_adapters(model, tmp_path)


def test_a_tied_vocabulary_has_no_adapters_in_pefts_format(tmp_path):
    model = tf_model(**SHALLOW, tie_word_embeddings=True)
    model.model.embed_tokens.base.enable_lora(2)
    with pytest.raises(ValueError, match=r"model\.embed_tokens: the head is tied to the embedding in this model"):
        save_adapters(model, tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.weight: the head is tied"):
        enable_lora(tf_model(**SHALLOW, tie_word_embeddings=True), "text", modules_to_save=["lm_head"])


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
        ({"trainable_token_indices": [3], "use_rslora": True}, "cannot do trainable_token_indices, use_rslora"),
        ({"modules_to_save": ["lm_heads"]}, "modules_to_save names 'lm_heads', and the model has no such module"),
        ({"modules_to_save": ["lm_head"]}, "- base_model.model.lm_head.weight"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"bias": "all"}, "bias must be none, since Keras adapts kernels alone; got 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base model"),
        ({"r": 3}, r"r is 3, but the adapters of model.layers.0.self_attn.q_proj have rank 2"),
        ({"rank_pattern": {"up_proj": 3}}, r"r is 3, but the adapters of model.layers.0.mlp.up_proj have rank 2"),
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


@pytest.mark.parametrize("loop", ["predict", "evaluate"])
def test_k3_loops_traced_before_adapters_came_or_went_follow_the_model(loop, tmp_path):
    def said():
        if loop == "predict":
            return relative_error(model.predict(inputs, verbose=0).logits, logits(model))
        return abs(model.evaluate(labelled, verbose=0) / float(model(labelled).loss) - 1)

    model = tf_model(**SHALLOW)
    model.compile()
    inputs = batch(model.config)
    labelled = {**inputs, "labels": labels_of(inputs)}
    assert said() < FLOAT32_ACTIVATIONS
    save_adapters(adapted_model(), tmp_path)
    before = logits(model)
    load_adapters(model, tmp_path)
    assert relative_error(logits(model), before) > 0.01
    assert said() < FLOAT32_ACTIVATIONS
    merge_adapters(model)
    assert said() < FLOAT32_ACTIVATIONS
    model.lm_head.base.enable_lora(2)  # Keras's own
    model.lm_head.base.lora_kernel_b.assign(np.ones(model.lm_head.base.lora_kernel_b.shape))
    assert said() < FLOAT32_ACTIVATIONS
