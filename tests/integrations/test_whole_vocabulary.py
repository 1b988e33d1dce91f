"""TRL multiplies by `lm_head.weight` itself (E4): it is the whole vocabulary, trained and saved as ever."""

import peft
import pytest
import torch
from optimum import quanto
from trl.trainer.utils import add_fused_lm_head

from idefics_pt import IdeficsForVisionText2Text
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, FLOAT32_GRADIENTS, relative_error


def log_probabilities(logits, labels):
    logits, labels = logits[:, :-1].log_softmax(dim=-1), labels[:, 1:]
    return logits.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2).masked_fill(labels == -100, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities_of_trl_are_of_the_whole_vocabulary(tied, tmp_path):
    """E4: values, gradients, a step of training, and files."""
    model, plain = our_model(tie_word_embeddings=tied), our_model(tie_word_embeddings=tied)
    inputs = torch_batch(plain.config, with_labels=True)
    inputs["labels"][0, 4:6] = torch.tensor([97, 99])
    labels = inputs["labels"]
    expected = log_probabilities(plain(**inputs).logits, labels)
    add_fused_lm_head(model)
    found = model(**inputs, fused_lm_head=True)
    assert relative_error(found.log_probs.detach(), expected.detach()) < FLOAT32_ACTIVATIONS
    assert found.loss.item() == pytest.approx(plain(**inputs).loss.item(), rel=1e-5)
    found.loss.backward()
    plain(**inputs).loss.backward()
    base, added = plain.lm_head.weight.grad, plain.lm_head.additional_fc.weight.grad
    assert relative_error(model.lm_head.weight.grad, torch.cat((base, added))) < FLOAT32_GRADIENTS
    for some in (model, plain):
        torch.optim.SGD([p for p in some.parameters() if p.grad is not None], lr=0.1).step()
    expected = plain(**inputs).logits.detach()
    assert relative_error(model(**inputs).logits.detach(), expected) < FLOAT32_ACTIVATIONS
    model.save_pretrained(tmp_path)
    again = IdeficsForVisionText2Text.from_pretrained(tmp_path).eval()
    assert relative_error(again(**inputs).logits.detach(), expected) < FLOAT32_ACTIVATIONS
    assert len(again.lm_head.weight) == 97


def test_with_an_adapter_or_a_frozen_base():
    """E4: LoRA elsewhere is fine; one parameter cannot train in part, and the message names the other part."""
    model = our_model()
    inputs = torch_batch(model.config, with_labels=True)
    add_fused_lm_head(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    expected = log_probabilities(our_model()(**inputs).logits, inputs["labels"])
    found = model(**inputs, fused_lm_head=True).log_probs
    assert relative_error(found.detach(), expected.detach()) < FLOAT32_ACTIVATIONS
    frozen = our_model(freeze_lm_head=True)
    with pytest.raises(ValueError, match=r"in additional_fc trains and the base one does not"):
        add_fused_lm_head(frozen)
    frozen.lm_head.additional_fc.requires_grad_(False)
    add_fused_lm_head(frozen)


def test_heads_that_trl_would_take_for_the_whole_vocabulary():
    """E4: without its added rows a head is refused; resized ones are joined again."""
    model = our_model()
    quanto.quantize(model, weights=quanto.qint8)
    with pytest.raises(ValueError, match=r"lm_head is a QLinear, without the 3 rows"):
        add_fused_lm_head(model)
    assert "forward" not in vars(model)
    model, plain = our_model(), our_model()
    add_fused_lm_head(model)
    for some in (model, plain):
        some.resize_token_embeddings(104)
    inputs = torch_batch(plain.config, with_labels=True)
    inputs["labels"][0, 4:6] = torch.tensor([97, 103])
    found = model(**inputs, fused_lm_head=True).log_probs.detach()
    assert relative_error(found, log_probabilities(plain(**inputs).logits, inputs["labels"]).detach()) < 1e-5
