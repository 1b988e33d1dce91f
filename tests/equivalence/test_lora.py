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

VISION = "model.vision_model.embeddings"
CASES = {
    **{preset: {"presets": preset} for preset in PRESETS},
    "all_presets": {"presets": tuple(PRESETS)},
    "all_linear_layers": {"target_modules": "all-linear"},
    "convolution_and_positions": {
        "target_modules": [f"{VISION}.patch_embedding", f"{VISION}.position_embedding", "model.layers.0.mlp.up_proj"],
        "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"patch_embedding": 3},
    },
    "added_vocabulary": {"target_modules": ["additional_embedding", "additional_fc"]},
    "saved_vocabulary": {"presets": "text", "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_parts": {"presets": "text", "modules_to_save": ["model.norm", "perceiver_resampler"]},
    # PEFT cannot adapt the base matrices where there is an additional vocabulary
    "vocabulary": {"target_modules": ["embed_tokens", "lm_head"], "overrides": {"additional_vocab_size": 0}},
}


def logits_pt(model, inputs):
    with torch.no_grad():
        return to_numpy(model(**to_torch(inputs)).logits)


# PEFT saves the base matrices along with the adapters of a vocabulary, and says so
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_work_in_keras_and_go_back(case, tmp_path):
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **CASES[case]}
    overrides = {"num_hidden_layers": 2, **settings.pop("overrides", {})}
    pt, keras_model = model_pair(**overrides)
    inputs = batch(pt.config)
    base = keras_model(inputs).logits.numpy()
    torch.manual_seed(0)
    adapted = get_peft_model(pt, lora_config(pt, settings.pop("presets", "text"), **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # what is saved as it is, too
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "pt")
    load_adapters(keras_model, tmp_path / "pt")
    logits = keras_model(inputs).logits
    assert relative_error(logits, logits_pt(adapted, inputs)) < FLOAT32_ACTIVATIONS
    assert relative_error(logits, base) > 1e-3
    save_adapters(keras_model, tmp_path / "tf")
    again = PeftModel.from_pretrained(model_pair(**overrides)[0], tmp_path / "tf").eval()
    assert relative_error(logits, logits_pt(again, inputs)) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("by", ["presets", "keras"])
def test_adapters_of_keras_work_in_peft(by, tmp_path):
    overrides = {"num_hidden_layers": 2, "additional_vocab_size": 3 if by == "presets" else 0}
    pt, keras_model = model_pair(**overrides)
    inputs = batch(pt.config)
    base = logits_pt(pt, inputs)
    if by == "presets":
        enable_lora(keras_model, PRESETS, r=3, lora_alpha=5, modules_to_save=["additional_fc"])
    else:  # Keras's own, on layers of all kinds, and all else goes on training
        model = keras_model.model
        embeddings = model.vision_model.embeddings
        model.decoder_layers[0].self_attn.q_proj.enable_lora(3, 5)
        model.embed_tokens.base.enable_lora(2)
        keras_model.lm_head.base.enable_lora(2)
        embeddings.patch_embedding.enable_lora(4, 2)
        embeddings.position_embedding.enable_lora(2)
        embeddings.class_embedding.trainable = False  # its module holds adapters
    for i, variable in enumerate(keras_model.trainable_variables):
        variable.assign_add(keras.random.normal(variable.shape, seed=i) * 0.2)
    save_adapters(keras_model, tmp_path)
    logits = logits_pt(PeftModel.from_pretrained(pt, tmp_path).eval(), inputs)
    assert relative_error(keras_model(inputs).logits, logits) < FLOAT32_ACTIVATIONS
    assert relative_error(logits, base) > 1e-3
