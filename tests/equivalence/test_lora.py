"""Adapters go between the rooms: PEFT's files load in Keras, Keras's in PEFT, and the logits are the same."""

import keras
import pytest
import torch
from peft import PeftModel, get_peft_model

from idefics_pt.lora import PRESETS, lora_config
from idefics_tf.lora import enable_lora, load_adapters, save_adapters
from tests.equivalence.pairs import model_pair, to_numpy, to_torch
from tests.models import batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


def logits_pt(model, inputs):
    with torch.no_grad():
        return to_numpy(model(**to_torch(inputs)).logits)


@pytest.mark.parametrize("presets", [*PRESETS, tuple(PRESETS)], ids=str)
def test_adapters_of_peft_work_in_keras(presets, tmp_path):
    pt, keras_model = model_pair()
    inputs = batch(pt.config)
    base = keras_model(inputs).logits.numpy()
    torch.manual_seed(0)
    adapted = get_peft_model(pt, lora_config(pt, presets, r=3, lora_alpha=5, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    load_adapters(keras_model, tmp_path)
    logits = keras_model(inputs).logits
    assert relative_error(logits, logits_pt(adapted, inputs)) < FLOAT32_ACTIVATIONS
    assert relative_error(logits, base) > 1e-3


def test_adapters_of_keras_work_in_peft(tmp_path):
    pt, keras_model = model_pair()
    inputs = batch(pt.config)
    base = logits_pt(pt, inputs)
    enable_lora(keras_model, PRESETS, r=3, lora_alpha=5)
    for i, variable in enumerate(keras_model.trainable_variables):
        variable.assign(keras.random.normal(variable.shape, seed=i) * 0.2)
    save_adapters(keras_model, tmp_path)
    logits = logits_pt(PeftModel.from_pretrained(pt, tmp_path).eval(), inputs)
    assert relative_error(keras_model(inputs).logits, logits) < FLOAT32_ACTIVATIONS
    assert relative_error(logits, base) > 1e-3
