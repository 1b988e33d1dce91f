"""Freezing: what the configuration says, after construction and after loading."""

import pytest
import torch
import transformers

from idefics_common.configuration.fields import MODULE_EXCEPTIONS
from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text
from idefics_pt.freezing import EXCEPTIONS
from tests.models import small_config

FROZEN = {"freeze_text_layers": True, "freeze_vision_layers": True}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("flags", [FROZEN, {**FROZEN, "freeze_lm_head": True}, {"freeze_lm_head": True}, {}])
@pytest.mark.parametrize("tied", [False, True])
def test_d1_freezing_survives_loading(flags, tied, tmp_path):
    kwargs = small_config(
        **{"freeze_text_layers": False, "freeze_vision_layers": False, **flags}, tie_word_embeddings=tied
    )
    model = IdeficsForVisionText2Text(IdeficsConfig(**kwargs))
    if not tied:
        expected = trainable(transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**kwargs)))
        assert trainable(model) == expected
    model.save_pretrained(tmp_path)
    assert trainable(IdeficsForVisionText2Text.from_pretrained(tmp_path)) == trainable(model)


def test_additional_vocabulary_always_trains():
    names = trainable(IdeficsForVisionText2Text(IdeficsConfig(**small_config(**FROZEN, freeze_lm_head=True))))
    assert {"model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight"} <= names
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names


@pytest.mark.parametrize("exception", ["LayerNorm", "RMSNorm"])
def test_d8_text_norms_can_stay_trainable(exception):
    config = IdeficsConfig(**small_config(**FROZEN, freeze_text_module_exceptions=[exception]))
    names = {name for name in trainable(IdeficsForVisionText2Text(config)) if name.startswith("model.layers.0.")}
    assert names == {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}


def test_d8_unknown_exception_is_named():
    assert tuple(EXCEPTIONS) == MODULE_EXCEPTIONS
    model = IdeficsForVisionText2Text(IdeficsConfig(**small_config()))
    with pytest.raises(ValueError, match=r"exceptions must be .*LayerNorm, RMSNorm, Linear, Embedding; got \['Batch"):
        model.model.freeze_text_layers(["BatchNorm"])


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    from tests.pt.pairs import torch_batch

    model = IdeficsForVisionText2Text(IdeficsConfig(**small_config(**FROZEN)))
    model(**torch_batch(model.config, with_labels=True)).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable(model)
    assert torch.isfinite(model.lm_head.weight.grad).all()
