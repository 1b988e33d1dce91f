"""The rungs of a ladder: each block of the two rooms by itself, on the same inputs. The lowest that fails is the bug.

Every rung is its own negative control: with one weight of its block spoilt, the check must see a difference. The two
highest are of training: which parameters do, and an adapter that was trained in the other room.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from peft import PeftModel, get_peft_model
from transformers.activations import ACT2FN

from idefics_pt import IdeficsForVisionText2Text
from idefics_pt.lora import lora_config
from idefics_tf import TFIdeficsForVisionText2Text
from idefics_tf.layers import ACTIVATIONS
from idefics_tf.lora import load_adapters, save_adapters
from idefics_tf.weights import weights_by_name
from tests.equivalence.pairs import model_pair, spoil, to_numpy, to_torch
from tests.models import batch, labels_of
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

NOTICEABLE = 1e-3
"""A spoilt weight must make at least this relative difference."""


@dataclass
class Rung:
    """One block: how to run it in each room, and a weight of it to spoil."""

    inputs: Callable[[np.random.Generator], tuple]
    run_pt: Callable
    run_tf: Callable
    weight: str
    overrides: dict | None = None


def normal(*shape):
    return lambda generator: (generator.standard_normal(shape).astype(np.float32),)


def ids(generator):
    drawn = generator.integers(0, 100, (2, 7))
    drawn[0, :3] = 97, 99, 98  # of the additional vocabulary
    return (drawn,)


def block_inputs(generator):
    hidden = generator.standard_normal((4, 5, 24)).astype(np.float32)
    images = generator.standard_normal((2, 12, 20)).astype(np.float32)  # two rows of text share each row of images
    mask = generator.random((4, 5, 12)) < 0.5
    mask[..., 0] = True
    return hidden, images, mask, generator.random((4, 5)) < 0.7


def decoder_inputs(generator):
    hidden = generator.standard_normal((2, 5, 24)).astype(np.float32)
    mask = np.tril(np.ones((5, 5), dtype=bool))[None, None].repeat(2, axis=0)
    mask[0, :, 1:, 0] = False
    positions = np.array([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    return hidden, mask, positions


def decoder_pt(model, hidden, mask, positions):
    rotation = model.model.rotary_emb(hidden, positions)
    return model.model.layers[1](hidden, rotation, mask)[0]


def decoder_tf(model, hidden, mask, positions):
    rotation = model.model.rotary_emb(positions)
    return model.model.decoder_layers[1](hidden, rotation, mask)[0]


def gated_pt(model, hidden, images, mask, gate):
    return model.model.gated_cross_attn_layers[1](hidden, images, None, mask, gate)[0]


def gated_tf(model, hidden, images, mask, gate):
    return model.model.gated_cross_attn_layers[1](hidden, images, None, mask, gate)[0]


VISION = "model.vision_model"
GATED = "model.gated_cross_attn_layers.1"
RUNGS = {
    "rms_norm": Rung(
        normal(2, 5, 24),
        lambda model, x: model.model.layers[0].input_layernorm(x),
        lambda model, x: model.model.decoder_layers[0].input_layernorm(x),
        "model.layers.0.input_layernorm.weight",
    ),
    "layer_norm": Rung(
        # so small that the epsilon matters
        lambda generator: (generator.standard_normal((2, 5, 20)).astype(np.float32) * 1e-2,),
        lambda model, x: model.model.vision_model.pre_layrnorm(x),
        lambda model, x: model.model.vision_model.pre_layrnorm(x),
        f"{VISION}.pre_layrnorm.weight",
    ),
    "gated_mlp": Rung(
        normal(2, 5, 24),
        lambda model, x: model.model.layers[0].mlp(x),
        lambda model, x: model.model.decoder_layers[0].mlp(x),
        "model.layers.0.mlp.gate_proj.weight",
    ),
    "embedding": Rung(
        ids,
        lambda model, x: model.model.embed_tokens(x),
        lambda model, x: model.model.embed_tokens(x),
        "model.embed_tokens.additional_embedding.weight",
    ),
    "patches": Rung(
        normal(3, 3, 28, 28),
        lambda model, x: model.model.vision_model.embeddings(x),
        lambda model, x: model.model.vision_model.embeddings(x),
        f"{VISION}.embeddings.patch_embedding.weight",
    ),
    "t12_interpolated_positions": Rung(
        normal(3, 3, 56, 42),
        lambda model, x: model.model.vision_model.embeddings(x, True),
        lambda model, x: model.model.vision_model.embeddings(x, interpolate_pos_encoding=True),
        f"{VISION}.embeddings.position_embedding.weight",
    ),
    "vision_mlp_with_exact_gelu": Rung(
        lambda generator: (3 * generator.standard_normal((2, 5, 20)).astype(np.float32),),
        lambda model, x: model.model.vision_model.encoder.layers[0].mlp(x),
        lambda model, x: model.model.vision_model.encoder.layers[0].mlp(x),
        f"{VISION}.encoder.layers.0.mlp.fc1.weight",
    ),
    "vision_layer": Rung(
        normal(3, 5, 20),
        lambda model, x: model.model.vision_model.encoder.layers[1](x)[0],
        lambda model, x: model.model.vision_model.encoder.layers[1](x)[0],
        f"{VISION}.encoder.layers.1.self_attn.q_proj.weight",
    ),
    "vision_tower": Rung(
        normal(3, 3, 28, 28),
        lambda model, x: model.model.vision_model(x).last_hidden_state,
        lambda model, x: model.model.vision_model(x).last_hidden_state,
        f"{VISION}.encoder.layers.0.self_attn.out_proj.weight",
    ),
    "vision_pooler": Rung(
        normal(3, 3, 28, 28),
        lambda model, x: model.model.vision_model(x).pooler_output,
        lambda model, x: model.model.vision_model(x).pooler_output,
        f"{VISION}.post_layernorm.bias",
    ),
    "perceiver": Rung(
        normal(3, 5, 20),
        lambda model, x: model.model.perceiver_resampler(x)[0],
        lambda model, x: model.model.perceiver_resampler(x)[0],
        "model.perceiver_resampler.latents",
    ),
    "gated_block": Rung(block_inputs, gated_pt, gated_tf, f"{GATED}.cross_attn.q_proj.weight"),
    "gated_block_alpha": Rung(block_inputs, gated_pt, gated_tf, f"{GATED}.alpha_cross_attn", {"alpha_type": "vector"}),
    "gated_block_dense_alpha": Rung(block_inputs, gated_pt, gated_tf, f"{GATED}.alpha_dense"),
    "decoder_block": Rung(decoder_inputs, decoder_pt, decoder_tf, "model.layers.1.self_attn.o_proj.weight"),
    "head": Rung(
        normal(2, 5, 24), lambda model, x: model.lm_head(x), lambda model, x: model.lm_head(x), "lm_head.weight"
    ),
}


@pytest.mark.parametrize("name", RUNGS)
def test_rung(name, device):
    rung = RUNGS[name]
    pt, keras_model = model_pair(device, **(rung.overrides or {}))
    inputs = rung.inputs(np.random.default_rng(1))

    def error():
        return relative_error(to_numpy(rung.run_tf(keras_model, *inputs)), expected)

    with torch.no_grad():
        expected = to_numpy(rung.run_pt(pt, *to_torch(inputs, device)))
    assert error() < FLOAT32_ACTIVATIONS
    spoil(keras_model, rung.weight)
    assert error() > NOTICEABLE


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 241, dtype=np.float32)
    error = relative_error(ACTIVATIONS[name](tf.constant(x)), ACT2FN[name](torch.from_numpy(x)))
    assert error < FLOAT32_ACTIVATIONS
    others = [relative_error(ACTIVATIONS[other](tf.constant(x)), x) for other in ACTIVATIONS if other != "linear"]
    assert min(others) > NOTICEABLE


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary(rope_type):
    pt, keras_model = model_pair(rope_parameters=ROPES[rope_type], max_position_embeddings=256)
    positions = np.arange(256)[None]
    expected = pt.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions))
    actual = keras_model.model.rotary_emb(positions)
    shifted = keras_model.model.rotary_emb(positions + 1)
    for ours, late, theirs in zip(actual, shifted, expected, strict=True):
        # an angle of 256 radians has half a float32 step of 1.5e-5
        assert relative_error(ours, theirs) < 2e-5
        assert relative_error(late, theirs) > NOTICEABLE


def test_t12_interpolation_is_not_the_one_of_tensorflow():
    """The control of T12: TensorFlow's own bicubic kernel gives another grid than the matrices of the core."""
    from idefics_common.position_grid import interpolation_matrix

    grid = np.random.default_rng(0).standard_normal((16, 16, 4)).astype(np.float32)
    rows = interpolation_matrix(16, 32)
    ours = np.einsum("yi,xj,ije->yxe", rows, rows, grid)
    theirs = tf.image.resize(grid, (32, 32), method="bicubic").numpy()
    assert relative_error(ours, theirs) > 1e-2


FREEZING = {
    "by_default": {"freeze_text_layers": True, "freeze_vision_layers": True},
    "text": {"freeze_text_layers": True},
    "vision": {"freeze_vision_layers": True},
    "head": {"freeze_lm_head": True},
    "head_tied": {"freeze_lm_head": True, "tie_word_embeddings": True},
    "all": {"freeze_text_layers": True, "freeze_vision_layers": True, "freeze_lm_head": True},
    "nothing": {},
}
EXCEPTIONS = ([], ["LayerNorm"], ["Linear", "Embedding"])
METHODS = {
    "freeze_text_layers": lambda model: model.freeze_text_layers(["LayerNorm"]),
    "freeze_vision_layers": lambda model: model.freeze_vision_layers(["Linear"]),
    "freeze_relevant_params": lambda model: model.freeze_relevant_params(
        type(model.config).from_dict({**model.config.to_dict(), "freeze_text_layers": True})
    ),
}


def training_pt(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_tf(model) -> set[str]:
    trained = {id(variable) for variable in model.trainable_variables}
    return {name for name, weight in weights_by_name(model).items() if id(weight.variable) in trained}


@pytest.mark.parametrize("exceptions", EXCEPTIONS, ids=str)
@pytest.mark.parametrize("flags", FREEZING)
def test_t7_k2_the_same_parameters_train(flags, exceptions, tmp_path):
    """The same parameters, also once each room has kept its model in its own files, and in the other's home format."""
    excepted = dict.fromkeys(("freeze_text_module_exceptions", "freeze_vision_module_exceptions"), exceptions)
    pt, keras_model = model_pair(**FREEZING[flags], **excepted, num_hidden_layers=2)
    pt.apply_freezing()
    expected = training_pt(pt)
    assert training_tf(keras_model) == expected
    assert "model.embed_tokens.additional_embedding.weight" in expected
    if exceptions == ["LayerNorm"]:
        keras_model.save(tmp_path / "x.keras")
        pt.save_pretrained(tmp_path / "pt")
        assert training_tf(keras.saving.load_model(tmp_path / "x.keras")) == expected
        assert training_tf(TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "pt")) == expected
        assert training_pt(IdeficsForVisionText2Text.from_pretrained(tmp_path / "pt")) == expected
    keras_model.model.gated_cross_attn_layers[0].mlp.trainable = False
    assert training_tf(keras_model) != expected


@pytest.mark.parametrize("method", METHODS)
def test_k2_what_methods_freeze(method):
    pt, keras_model = model_pair(num_hidden_layers=2)
    everything = training_pt(pt)
    for model in (pt, keras_model):
        METHODS[method](model.model)
    assert training_tf(keras_model) == training_pt(pt) != everything


@pytest.mark.parametrize("kind", ["images", "text"])
def test_k7_what_moves(kind):
    """Of what trains, that on which the loss depends: a gradient that PyTorch lacks is a variable that stands still.

    So "trains" means the same in both rooms for the last norm of the vision tower, which only makes a pooled state: its
    flag is up, and no step moves it.
    """
    pt, keras_model = model_pair(num_hidden_layers=2)
    inputs = batch(pt.config)
    inputs["labels"] = labels_of(inputs)
    if kind == "text":
        del inputs["pixel_values"], inputs["image_attention_mask"]
    pt(**to_torch(inputs)).loss.backward()
    expected = {name for name, parameter in pt.named_parameters() if parameter.grad is not None}
    weights = weights_by_name(keras_model)
    before = {name: weight.variable.numpy() for name, weight in weights.items()}
    keras_model.compile(keras.optimizers.AdamW(1e-2), run_eagerly=True)
    keras_model.train_on_batch(inputs)
    moved = {name for name, weight in weights.items() if not np.array_equal(weight.variable.numpy(), before[name])}
    assert moved == expected
    assert moved < training_tf(keras_model) == training_pt(pt)


def test_k3_an_adapter_carried_across(tmp_path):
    """Trained in PyTorch, then in Keras, then back in PyTorch: each room answers as the one before, and learns on."""
    pt, keras_model = model_pair(num_hidden_layers=2)
    modules = ["additional_embedding", "additional_fc"]
    adapted = get_peft_model(pt, lora_config(pt, ("text", "cross_attention"), r=3, modules_to_save=modules))
    inputs = batch(pt.config)
    inputs["labels"] = labels_of(inputs)

    def train_pt():
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            adapted(**to_torch(inputs)).loss.backward()
            optimizer.step()

    def answer_pt(model):
        with torch.no_grad():
            output = model(**to_torch(inputs))
        return float(output.loss), to_numpy(output.logits)

    at_first, _ = answer_pt(adapted)
    train_pt()
    trained, expected = answer_pt(adapted)
    adapted.save_pretrained(tmp_path / "pt")
    load_adapters(keras_model, tmp_path / "pt", trainable=True)
    assert relative_error(keras_model(inputs).logits, expected) < FLOAT32_ACTIVATIONS
    assert trained < at_first - 0.1
    spoiled = keras_model.model.decoder_layers[1].mlp.up_proj.lora_kernel_b
    value = spoiled.numpy()
    spoiled.assign(np.flip(value))
    assert relative_error(keras_model(inputs).logits, expected) > NOTICEABLE
    spoiled.assign(value)

    keras_model.compile(keras.optimizers.Adam(1e-2), run_eagerly=True)
    for _ in range(3):
        keras_model.train_on_batch(inputs)
    save_adapters(keras_model, tmp_path / "tf")
    back = PeftModel.from_pretrained(model_pair(num_hidden_layers=2)[0], tmp_path / "tf").eval()
    loss, logits = answer_pt(back)
    assert relative_error(keras_model(inputs).logits, logits) < FLOAT32_ACTIVATIONS
    assert loss < trained - 0.1
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(keras_model.trainable_variables) == len(names)
