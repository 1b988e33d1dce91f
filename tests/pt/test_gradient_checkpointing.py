"""Gradient checkpointing: the gradients that training has without it."""

import pytest
import torch
from peft import get_peft_model

from idefics_pt.lora import PRESETS, lora_config
from idefics_pt.vision import VisionEncoderLayer
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_GRADIENTS, relative_error

FROZEN = {"freeze_text_layers": True, "freeze_vision_layers": True}
KINDS = ["Linear"]


def gradients(model, seed=0):
    """Loss, and gradients by name, of one training step whose dropout is drawn from `seed`."""
    model.train()
    torch.manual_seed(seed)
    loss = model(**torch_batch(model.config, with_labels=True)).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(checkpointed, plain):
    expected_loss, expected = gradients(plain)
    loss, actual = gradients(checkpointed)
    assert torch.equal(loss, expected_loss)
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    errors = {name: relative_error(actual[name], expected[name], least_scale=1e-2 * largest) for name in expected}
    assert max(errors.values()) < FLOAT32_GRADIENTS, max(errors, key=errors.get)


def count_vision_runs(model):
    """Install a counter of runs of vision layers; returns the list it appends to."""
    runs = []
    for module in model.modules():
        if isinstance(module, VisionEncoderLayer):
            module.layer_norm1.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "freezing",
    [
        {},
        FROZEN,
        {**FROZEN, "additional_vocab_size": 0},
        {**FROZEN, "freeze_text_module_exceptions": KINDS, "freeze_vision_module_exceptions": KINDS},
    ],
    ids=["trainable", "frozen", "frozen_no_added_vocabulary", "frozen_but_linear"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of a frozen vision tower
def test_gradients_are_the_same(freezing, dropout, reentrant):
    models = [our_model(dropout=dropout, **freezing) for _ in range(2)]
    for model in models:
        model.apply_freezing()
    models[0].activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(*models)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_gradients_of_adapters_are_the_same(preset, reentrant):
    models = []
    for checkpoint in (True, False):
        base = our_model(dropout=0.3)
        if checkpoint:
            base.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        models.append(get_peft_model(base, lora_config(base, preset, init_lora_weights=False)))
    assert_same_gradients(*models)


def test_checkpointing_recomputes_what_trains_and_nothing_else():
    """The vision layers run a second time, in the backward pass, but only if they have a gradient to get there."""
    for frozen, expected in ((False, 4), (True, 2)):
        model = our_model(freeze_vision_layers=frozen)
        model.apply_freezing()
        model.activation_checkpointing_enable({"use_reentrant": False})
        runs = count_vision_runs(model)
        gradients(model)
        assert len(runs) == expected


def test_input_gradients_can_be_switched_off_again():
    model = our_model()
    model.requires_grad_(False)
    model.model.vision_model.encoder.requires_grad_(True)
    inputs = torch_batch(model.config)
    wanted = []
    model.model.vision_model.pre_layrnorm.register_forward_hook(lambda module, _, out: wanted.append(out.requires_grad))
    model.enable_input_require_grads()
    model.model.vision_model.pre_layrnorm.register_forward_hook(lambda module, _, out: wanted.append(out.requires_grad))
    model(**inputs)
    model.disable_input_require_grads()
    model(**inputs)
    assert wanted == [False, True, False, False]
