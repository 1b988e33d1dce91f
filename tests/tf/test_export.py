"""SavedModels in a process that has TensorFlow and nothing else: no Keras, none of our code."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
from tests.models import batch
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

GENERATION = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "num_beams": 3}
SERVER = """
import sys
sys.modules["keras"] = sys.modules["idefics_tf"] = sys.modules["idefics_common"] = sys.modules["torch"] = None
import numpy as np
import tensorflow as tf
signatures = tf.saved_model.load(sys.argv[1]).signatures
results = {}
for path in sys.argv[3:]:
    inputs = {name: tf.constant(value) for name, value in np.load(path).items()}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for name, function in signatures.items():
        if name == "encode_images":
            outputs = function(pixel_values=inputs["pixel_values"])
        else:
            outputs = function(**(text if "text" in name else inputs))
        for key, value in outputs.items():
            results[f"{path} {name} {key}"] = value.numpy()
np.savez(sys.argv[2], **results)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model from a file: TensorFlow's names of its variables are not unique."""
    home = tmp_path_factory.mktemp("home") / "model"
    tf_model(seed=2, num_hidden_layers=2).save_pretrained(home)
    return TFIdeficsForVisionText2Text.from_pretrained(home)


def test_t9_a_process_with_only_tensorflow_serves_the_same(model, tmp_path):
    model.export(tmp_path / "exported", generation=GENERATION)
    whole = batch(model.config)
    part = {name: value[2:, 1:] if name != "pixel_values" else value[2:, :1] for name, value in whole.items()}
    part["image_attention_mask"] = part["image_attention_mask"][:, :, :1]
    batches = {str(tmp_path / "whole.npz"): whole, str(tmp_path / "part.npz"): part}
    for path, inputs in batches.items():
        np.savez(path, **inputs)
    command = [sys.executable, "-c", SERVER, tmp_path / "exported", tmp_path / "results.npz", *batches]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ.copy())
    assert finished.returncode == 0, finished.stderr
    results = np.load(tmp_path / "results.npz")
    assert len(results) == 2 * 5
    for path, inputs in batches.items():
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        expected = {
            "serving_default logits": model(inputs).logits,
            "text logits": model(text).logits,
            "encode_images image_hidden_states": model.encode_images(inputs["pixel_values"]),
        }
        for name, value in expected.items():
            assert relative_error(results[f"{path} {name}"], value) < FLOAT32_ACTIVATIONS, name
        for name, call in (("generate", inputs), ("generate_text", text)):
            tokens = model.generate(call, **GENERATION, disable_compile=True)
            assert np.array_equal(results[f"{path} {name} sequences"], tokens), name


def test_signatures_keep_the_names_of_the_inputs_and_leave_sizes_open(tmp_path, capsys):
    base = tf_model(num_hidden_layers=2, model_class=TFIdeficsModel)
    base.export(tmp_path / "base", image_size=56, verbose=True)
    assert "serving_default, text, encode_images" in capsys.readouterr().out
    signatures = tf.saved_model.load(tmp_path / "base").signatures
    assert set(signatures) == {"serving_default", "text", "encode_images"}
    specs = signatures["serving_default"].structured_input_signature[1]
    assert {name: tuple(spec.shape) for name, spec in specs.items()} == {
        "input_ids": (None, None),
        "attention_mask": (None, None),
        "pixel_values": (None, None, 3, 56, 56),
        "image_attention_mask": (None, None, None),
    }
    inputs = batch(base.config, image_size=56)
    served = signatures["serving_default"](**{name: tf.constant(value) for name, value in inputs.items()})
    expected = base(inputs, interpolate_pos_encoding=True).last_hidden_state
    assert relative_error(served["last_hidden_state"], expected) < FLOAT32_ACTIVATIONS


def test_what_cannot_be_exported_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="format 'tf_saved_model', got 'onnx'"):
        model.export(tmp_path, format="onnx")
    with pytest.raises(ValueError, match="without a head cannot generate"):
        tf_model(num_hidden_layers=2, model_class=TFIdeficsModel).export(tmp_path, generation={})
