"""Keras's int8: how far the logits move, what stays float, and what a quantized model refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idefics_common import IdeficsProcessor
from idefics_tf import TFIdeficsForVisionText2Text
from idefics_tf.lora import enable_lora
from tests.models import MATRIX, batch
from tests.tf.random_models import tf_model
from tests.tolerances import INT8, relative_error

CHECKPOINT = Path(__file__).parents[2] / "examples" / "fashion" / "checkpoint"


@pytest.mark.parametrize("variant", ["base", "tied"])
def test_logits_of_small_models_move_little(variant, tmp_path):
    model = tf_model(**MATRIX[variant])
    inputs = batch(model.config)
    expected = model(inputs).logits.numpy()
    model.quantize("int8")
    logits = model(inputs).logits.numpy()
    assert 1e-4 < relative_error(logits, expected) < INT8["small"]
    kernels = {v.dtype for v in model.weights if v.path.endswith("_proj/kernel")}
    assert kernels == {"int8"}
    model.save_weights(tmp_path / "x.weights.h5")
    other = tf_model(seed=1, **MATRIX[variant])
    other.quantize("int8")
    other.load_weights(tmp_path / "x.weights.h5")
    assert np.array_equal(other(inputs).logits, logits)


def test_the_shipped_model_still_predicts_the_same():
    processor = IdeficsProcessor.from_pretrained(CHECKPOINT)
    files = sorted((CHECKPOINT.parent / "photos" / "test").glob("*.png"))[:16]
    prompts = [["User:", Image.open(file), "What is this?", "\nAssistant:"] for file in files]
    inputs = dict(processor(prompts, return_tensors="np"))
    model = TFIdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    expected = model(inputs).logits.numpy()
    model.quantize("int8")
    logits = model(inputs).logits.numpy()
    kept = inputs["attention_mask"] == 1
    assert relative_error(logits[kept], expected[kept]) < INT8["fashion"]
    assert (logits[kept].argmax(axis=-1) == expected[kept].argmax(axis=-1)).mean() > 0.95


def test_what_cannot_be_is_refused(tmp_path):
    model = tf_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="can be quantized to 'int8', got 'int4'"):
        model.quantize("int4")
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize("int8")
    with pytest.raises(ValueError, match="writes no quantized weights: save before quantizing"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be saved whole"):
        model.save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="takes no adapters"):
        enable_lora(model, "text")
    adapted = tf_model(num_hidden_layers=2)
    enable_lora(adapted, "text")
    with pytest.raises(ValueError, match="merge_adapters before quantizing"):
        adapted.quantize("int8")
    assert not adapted.is_quantized
