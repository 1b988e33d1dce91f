"""What trains: as the configuration, methods and Keras's flag say, shown by Keras, and kept wherever a model goes."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest

from benchmarks.planning.training import is_trainable
from idefics_common.parameters import expand
from idefics_tf.lora import enable_lora
from idefics_tf.weights import weights_by_name
from tests.models import SMALL, batch, labels_of
from tests.tf.random_models import canonical, tf_model

SHALLOW = {
    "num_hidden_layers": 2,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}
TEXT, VISION, HEAD = {"freeze_text_layers": True}, {"freeze_vision_layers": True}, {"freeze_lm_head": True}
OPTIONS = {
    "nothing": {},
    "text": TEXT,
    "text_norms_train": {**TEXT, "freeze_text_module_exceptions": ["RMSNorm"]},
    "vision": VISION,
    "vision_norms_and_embeddings_train": {**VISION, "freeze_vision_module_exceptions": ["LayerNorm", "Embedding"]},
    "linear_layers_train": {
        **TEXT, **VISION,
        "freeze_text_module_exceptions": ["Linear"],
        "freeze_vision_module_exceptions": ["Linear"],
    },
    "all": {**TEXT, **VISION, **HEAD},
    "all_tied": {**VISION, **HEAD, "tie_word_embeddings": True},
    "all_without_added_vocabulary": {**TEXT, **HEAD, "additional_vocab_size": 0},
}  # fmt: skip
NORM = "model.vision_model.post_layernorm"


def training(model) -> set[str]:
    """Canonical names of what trains, by Keras's own list."""
    trained = {id(variable) for variable in model.trainable_variables}
    return {name for name, weight in weights_by_name(model).items() if id(weight.variable) in trained}


def as_configured(config) -> set[str]:
    """The same by a rule over the parameter table, which knows no layers."""
    return {p.name for p in expand(config) if p.tied_to is None and is_trainable(p, config)}


def all_names(model, part="") -> set[str]:
    return {name for name in weights_by_name(model) if name.startswith(f"model.{part}")}


def journeys(model, folder) -> dict:
    """The model, gone through everything that Keras keeps models in."""
    model.save(folder / "x.keras")
    return {
        "keras": keras.saving.load_model(folder / "x.keras"),
        "pickle": pickle.loads(pickle.dumps(model)),
        "deepcopy": copy.deepcopy(model),
        "clone_model": keras.models.clone_model(model),
    }


def inputs_of(model):
    inputs = batch(model.config)
    return {**inputs, "labels": labels_of(inputs)}


@pytest.mark.parametrize("option", OPTIONS)
def test_k2_what_the_configuration_freezes_stays_frozen(option, tmp_path):
    model = tf_model(**SHALLOW, **OPTIONS[option])
    expected = as_configured(model.config)
    assert training(model) == expected
    for name, gone in journeys(model, tmp_path).items():
        assert training(gone) == expected, name
        assert len(gone.trainable_weights) == len(expected), name
    other = tf_model(seed=1, **SHALLOW, **OPTIONS[option])
    model.save_weights(tmp_path / "x.weights.h5")
    other.load_weights(tmp_path / "x.weights.h5")
    assert training(other) == expected
    assert all(np.array_equal(value, canonical(other)[name]) for name, value in canonical(model).items())


def freeze_a_layer(model):
    model.model.decoder_layers[0].trainable = False
    return all_names(model) - all_names(model, "layers.0.") | all_lm(model)


def freeze_a_variable(model):
    model.model.norm.weights[0].trainable = False
    return all_names(model) - {"model.norm.weight"} | all_lm(model)


def freeze_by_method(model):
    model.model.freeze_vision_layers(["LayerNorm"])
    norms = {name for name in all_names(model, "vision_model.") if "norm" in name}
    assert len(norms) == 8
    return all_names(model) - all_names(model, "vision_model.") | norms | all_lm(model)


def unfreeze_what_was_frozen_in_part(model):
    model.model.freeze_vision_layers(["LayerNorm"])
    model.model.vision_model.trainable = True  # it is True already, and TensorFlow would skip this
    return set(weights_by_name(model))


def freeze_all_but_a_layer_inside(model):
    """As in Keras, what is inside a frozen model does not train with it, but does by itself."""
    model.trainable = False
    model.lm_head.trainable = True
    assert len(model.lm_head.trainable_weights) == 2
    return set()


def all_lm(model) -> set[str]:
    return set(weights_by_name(model)) - all_names(model)


CHANGES = [
    freeze_a_layer, freeze_a_variable, freeze_by_method, unfreeze_what_was_frozen_in_part, freeze_all_but_a_layer_inside
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_k2_what_users_freeze_stays_frozen(change, tmp_path):
    model = tf_model(**SHALLOW)
    expected = change(model)
    assert training(model) == expected
    for name, gone in journeys(model, tmp_path).items():
        assert training(gone) == expected, name
        assert len(gone.lm_head.trainable_weights) == len(model.lm_head.trainable_weights), name
        gone.trainable = True
        assert training(gone) == set(weights_by_name(model)), name


@pytest.mark.parametrize("exceptions", [[], ["LayerNorm"]])
def test_k1_the_second_phase_trains_what_it_unfreezes(exceptions):
    """Keras's recipe: frozen by the configuration, trained, then `layer.trainable = True`, `compile`, `fit`."""
    model = tf_model(**SHALLOW, **VISION, freeze_vision_module_exceptions=exceptions)
    inputs, tower = inputs_of(model), model.model.vision_model

    def moved() -> set[str]:
        before = canonical(model)
        model.train_on_batch(inputs)
        return {name for name, value in canonical(model).items() if not np.array_equal(value, before[name])}

    unused = {f"{NORM}.weight", f"{NORM}.bias"}
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    assert moved() == training(model) - unused
    tower.trainable = True
    with pytest.raises(
        ValueError, match=r"variables train that did not .* call compile\(\) again, with a new optimizer"
    ):
        model.train_on_batch(inputs)
    model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    assert len(tower.trainable_weights) == len(tower.weights)
    assert moved() == set(weights_by_name(model)) - unused


def test_k1_what_is_frozen_after_compile_stands_still():
    """Traced, not eager: Keras itself would go on with the function that it has made before."""
    model = tf_model(**SHALLOW, **VISION, **TEXT)
    inputs = inputs_of(model)
    model.compile(keras.optimizers.SGD(0.1))
    model.model.perceiver_resampler.trainable = False
    for part in ("perceiver_resampler.", "gated_cross_attn_layers."):
        before = canonical(model)
        model.fit(inputs, batch_size=4, verbose=0)
        moved = {name for name, value in canonical(model).items() if not np.array_equal(value, before[name])}
        assert moved == training(model)
        assert moved
        assert not moved & all_names(model, part)
        for block in model.model.gated_cross_attn_layers:
            block.trainable = False


def test_k1_keras_shows_what_trains(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    model = tf_model(**SHALLOW, **VISION, **TEXT)
    lines = []
    model.summary(show_trainable=True, expand_nested=True, line_length=120, print_fn=lines.append)
    flags = {}
    for line in "\n".join(lines).splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 4:
            flags[cells[0].removeprefix("└ ").partition(" ")[0]] = cells[3]
    frozen = {"vision_model", "layers_0", "layers_1", "norm"}
    trains = {"model", "embed_tokens", "perceiver_resampler", "gated_cross_attn_layers_0", "lm_head"}
    assert {name for name, flag in flags.items() if flag == "N"} == frozen
    assert {name for name, flag in flags.items() if flag == "Y"} == trains
    sizes = {p.name: p.size for p in expand(model.config)}
    assert f"Trainable params: {sum(sizes[name] for name in as_configured(model.config)):,}" in "\n".join(lines)


def test_k2_training_goes_on_with_the_state_of_the_optimizer(tmp_path):
    """Frozen after the optimizer was made, so that it has states for more than trains."""
    model = tf_model(**SHALLOW, **VISION)
    inputs = inputs_of(model)
    model.compile(keras.optimizers.AdamW(1e-2), run_eagerly=True)
    model.train_on_batch(inputs)
    model.model.freeze_text_layers(["RMSNorm"])
    model.train_on_batch(inputs)
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gone = {name: other for name, other in journeys(model, tmp_path).items() if name != "clone_model"}

    def go_on(model) -> list[float]:
        losses = []
        for _ in range(2):
            model.reset_metrics()
            losses.append(model.train_on_batch(inputs))
        return losses

    state = [variable.numpy() for variable in model.optimizer.variables]
    expected = go_on(model)
    assert expected[1] < expected[0]
    for name, other in gone.items():
        assert all(map(np.array_equal, state, (variable.numpy() for variable in other.optimizer.variables))), name
        assert other.is_gradient_checkpointing, name
        assert go_on(other) == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("kind", ["images", "text"])
def test_k7_a_correct_fit_warns_of_nothing(kind):
    """Everything trains; what the loss does not depend on stays as it was, and AdamW does not decay it either."""
    model = tf_model(**SHALLOW)
    inputs = inputs_of(model)
    if kind == "text":
        del inputs["pixel_values"], inputs["image_attention_mask"]
    before = canonical(model)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        model.fit(inputs, batch_size=4, verbose=0)
    still = {name for name, value in canonical(model).items() if np.array_equal(value, before[name])}
    images_alone = (
        "vision_model.",
        "perceiver_resampler.",
        "gated_cross_attn_layers.0.cross_attn",
        "gated_cross_attn_layers.0.input_layernorm",
        "gated_cross_attn_layers.0.alpha_cross",
    )
    expected = set().union(*(all_names(model, part) for part in images_alone)) if kind == "text" else set()
    assert still == expected | {f"{NORM}.weight", f"{NORM}.bias"}
    assert still <= training(model)


def test_k7_a_loss_that_depends_on_nothing_that_trains_is_an_error():
    model = tf_model(**SHALLOW)
    inputs = inputs_of(model)
    del inputs["pixel_values"], inputs["image_attention_mask"]
    model.trainable = False
    model.trainable = True
    model.model.freeze_text_layers()
    for layer in (model.lm_head, model.model.embed_tokens, *model.model.gated_cross_attn_layers):
        layer.trainable = False
    model.compile(run_eagerly=True)
    with pytest.raises(ValueError, match=r"The loss depends on none of the \d+ variables that train, such as .*vision"):
        model.train_on_batch(inputs)


def test_k1_linear_layers_that_are_excepted_train_their_adapters_and_no_integers():
    model = tf_model(**SHALLOW)
    enable_lora(model, "vision", r=2)
    model.model.freeze_vision_layers(["Linear"])
    assert {weight.name for weight in model.model.vision_model.trainable_weights} == {
        "lora_kernel_a", "lora_kernel_b", "bias"
    }  # fmt: skip
    quantized = tf_model(**SHALLOW)
    quantized.quantize("int8")
    quantized.model.freeze_text_layers(["Linear"])
    assert not [weight for layer in quantized.model.decoder_layers for weight in layer.trainable_weights]
