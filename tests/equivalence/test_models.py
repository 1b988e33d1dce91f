"""Whole models of the two rooms: every output, the loss, every gradient, and what trains."""

import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers

from idefics_pt import IdeficsForVisionText2Text
from idefics_tf import TFIdeficsForVisionText2Text
from idefics_tf.weights import weights_by_name
from tests.equivalence.pairs import model_pair, spoil, to_numpy, to_torch
from tests.models import MATRIX, UNUSUAL, batch, labels_of
from tests.pt.pairs import our_model
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, FLOAT32_GRADIENTS, HALF_PRECISION, relative_error

EVERYTHING = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
CALLS = {
    "left_padding": {},
    "right_padding": {"padding_side": "right"},
    "interpolated": {"image_size": 56},
}


def named_values(output) -> dict[str, np.ndarray]:
    """Every tensor of an output by name, those of tuples numbered."""
    values = {}
    for name in output.keys():  # noqa: SIM118 - iterating over an output gives its values
        value = output[name]
        parts = value if isinstance(value, tuple) else (value,)
        values |= {f"{name} {i}": to_numpy(part) for i, part in enumerate(parts)}
    return values


def differences(pt, keras_model, inputs, device="cpu", **kwargs) -> dict[str, float]:
    with torch.no_grad():
        expected = named_values(pt(**to_torch(inputs, device), **kwargs))
    actual = named_values(keras_model(inputs, **kwargs))
    assert list(actual) == list(expected)
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@pytest.mark.parametrize("variant", MATRIX)
def test_every_output(variant, device):
    pt, keras_model = model_pair(device, **MATRIX[variant])
    for call, batch_kwargs in CALLS.items():
        inputs = batch(pt.config, **batch_kwargs)
        kwargs = {**EVERYTHING, "interpolate_pos_encoding": call == "interpolated"}
        for place, error in differences(pt, keras_model, inputs, device, **kwargs).items():
            assert error < FLOAT32_ACTIVATIONS, f"{call}: {place} differs by {error:.1e}"


@pytest.mark.parametrize("variant", UNUSUAL)
def test_e16_unusual_configurations(variant):
    pt, keras_model = model_pair(**UNUSUAL[variant])
    assert max(differences(pt, keras_model, batch(pt.config), use_cache=False).values()) < FLOAT32_ACTIVATIONS


def test_a_forgotten_transpose_is_noticed_from_its_layer_on():
    pt, keras_model = model_pair()
    spoil(keras_model, "model.layers.1.self_attn.q_proj.weight")
    errors = differences(pt, keras_model, batch(pt.config), **EVERYTHING)
    assert errors["hidden_states 1"] < FLOAT32_ACTIVATIONS
    assert errors["hidden_states 2"] > 1e-3
    assert errors["logits 0"] > 1e-3


@pytest.mark.parametrize("variant", ["base", "no_resampler"])
def test_images_in_every_form(variant, device):
    pt, keras_model = model_pair(device, **MATRIX[variant])
    inputs = batch(pt.config)
    with torch.no_grad():
        pixels = torch.from_numpy(inputs["pixel_values"]).to(device).flatten(0, 1)
        tokens = pt.model.vision_model(pixels).last_hidden_state.unflatten(0, (4, 2)).cpu().numpy()
    forms = [{"image_encoder_embeddings": tokens}]
    if pt.config.use_resampler:
        forms.append({"perceiver_embeddings": pt.encode_images(to_torch(inputs)["pixel_values"]).detach().numpy()})
    assert relative_error(keras_model.encode_images(inputs.pop("pixel_values")), next(iter(forms[-1].values()))) < 1e-5
    for form in forms:
        errors = differences(pt, keras_model, {**inputs, **form}, device, **EVERYTHING)
        assert max(errors.values()) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("image_token_id", [None, 50])
@pytest.mark.parametrize("shared", [False, True])
def test_images_without_a_mask_and_shared_by_rows(image_token_id, shared):
    pt, keras_model = model_pair()
    pt.config.image_token_id = keras_model.config.image_token_id = image_token_id
    inputs = batch(pt.config)
    del inputs["image_attention_mask"]
    inputs["input_ids"][:, [2, 6]] = 50
    inputs["input_ids"][1, 4] = pt.config.eos_token_id
    if shared:
        inputs["pixel_values"] = inputs["pixel_values"][:2]
    assert max(differences(pt, keras_model, inputs, **EVERYTHING).values()) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("variant", MATRIX)
def test_loss_and_gradients(variant, device):
    pt, keras_model = model_pair(device, **MATRIX[variant])
    inputs = batch(pt.config)
    inputs["labels"] = labels_of(inputs)
    expected_loss = pt(**to_torch(inputs, device)).loss
    expected_loss.backward()
    with tf.GradientTape() as tape:
        loss = keras_model(inputs).loss
    weights = weights_by_name(keras_model)
    gradients = tape.gradient(loss, [weight.variable.value for weight in weights.values()])
    assert relative_error(loss, to_numpy(expected_loss)) < 1e-6
    expected = {name: parameter.grad for name, parameter in pt.named_parameters()}
    # a key bias shifts all scores of a query alike, so its gradient is rounding; it gets the scale of its model
    least_scale = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    compared = 0
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if expected[name] is None:
            assert gradient is None, name
            continue
        actual = weight.layout.inverse(tf.convert_to_tensor(gradient).numpy())
        error = relative_error(actual, to_numpy(expected[name]), least_scale)
        assert error < FLOAT32_GRADIENTS, f"gradient of {name} differs by {error:.1e}"
        compared += 1
    assert compared > len(weights) - 3


def test_wrong_gradients_would_be_noticed():
    """The negative control of the gradients: without the gates' derivative they differ."""
    pt, keras_model = model_pair()
    inputs = batch(pt.config)
    inputs["labels"] = labels_of(inputs)
    pt(**to_torch(inputs)).loss.backward()
    spoil(keras_model, "model.gated_cross_attn_layers.0.alpha_dense")
    variable = weights_by_name(keras_model)["model.norm.weight"].variable
    with tf.GradientTape() as tape:
        loss = keras_model(inputs).loss
    gradient = tape.gradient(loss, variable.value)
    assert relative_error(gradient, to_numpy(pt.model.norm.weight.grad)) > 10 * FLOAT32_GRADIENTS


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_half_precision_against_float32(policy, device):
    pt, _ = model_pair(device)
    keras_model = tf_model(dtype=policy)
    inputs = batch(pt.config)
    with torch.no_grad():
        expected = to_numpy(pt(**to_torch(inputs, device)).logits)
    logits = keras_model(inputs).logits
    precision = policy.removeprefix("mixed_")
    assert logits.dtype == precision
    error = relative_error(tf.cast(logits, "float32"), expected)
    assert FLOAT32_ACTIVATIONS < error < HALF_PRECISION[precision]


def test_t14_checkpoints_keep_their_dtype_and_go_both_ways(tmp_path):
    pt = our_model().to(torch.bfloat16)
    pt.save_pretrained(tmp_path / "pt", max_shard_size="50KB")
    keras_model = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "pt")
    assert {variable.dtype for variable in keras_model.weights} == {"bfloat16"}
    as_float32 = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "pt", dtype="float32")
    expected = IdeficsForVisionText2Text.from_pretrained(
        tmp_path / "pt", dtype=torch.float32, attn_implementation="eager"
    )
    assert max(differences(expected, as_float32, batch(pt.config), **EVERYTHING).values()) < FLOAT32_ACTIVATIONS
    keras_model.save_pretrained(tmp_path / "tf")
    theirs, report = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "tf", output_loading_info=True)
    assert theirs.dtype == torch.bfloat16
    assert not any(report.values())
    back = IdeficsForVisionText2Text.from_pretrained(tmp_path / "tf")
    assert back.dtype == torch.bfloat16
    for name, value in pt.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
