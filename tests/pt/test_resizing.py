"""Resizing the vocabulary: ids keep their meaning, trained rows are kept, files remember."""

import pytest
import torch

from idefics_pt import IdeficsForVisionText2Text
from idefics_pt.layers import DecoupledEmbedding, DecoupledLinear
from tests.pt.pairs import our_model, reference_model, torch_batch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("total", [97, 98, 100, 110])
def test_d4_the_additional_vocabulary_takes_the_change(total, tied, tmp_path):
    model = our_model(tie_word_embeddings=tied)
    ids = torch.arange(min(total, 100)).unsqueeze(0)
    with torch.no_grad():
        embeddings, logits = model.get_input_embeddings()(ids), model(ids).logits
    assert model.resize_token_embeddings(total) is model.get_input_embeddings()
    assert (model.config.vocab_size, model.config.additional_vocab_size) == (97, total - 97)
    model.save_pretrained(tmp_path)
    for resized in (model, IdeficsForVisionText2Text.from_pretrained(tmp_path).eval()):
        assert type(resized.lm_head) is DecoupledLinear
        assert torch.equal(resized.get_input_embeddings()(ids), embeddings)
        with torch.no_grad():
            new_logits = resized(ids).logits
        assert new_logits.shape[-1] == total
        kept = min(total, 100)
        assert torch.allclose(new_logits[..., :kept], logits[..., :kept], rtol=0, atol=1e-5)
        assert (resized.lm_head.weight is resized.get_input_embeddings().weight) == tied


def test_new_rows_are_the_mean_of_the_base_or_random():
    model = our_model()
    model.resize_token_embeddings(104)
    embedding = model.get_input_embeddings()
    assert torch.allclose(embedding.additional_embedding.weight[3:], embedding.weight.mean(0).expand(4, -1))
    model.resize_token_embeddings(120, mean_resizing=False)
    assert 0.01 < embedding.additional_embedding.weight[7:].std().item() < 0.03


def test_rounding_up_and_the_lower_bound():
    model = our_model()
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.additional_vocab_size == 128 - 97
    with pytest.raises(ValueError, match="at least vocab_size 97, got 96"):
        model.resize_token_embeddings(96)


@pytest.mark.parametrize("total", [90, 120])
@pytest.mark.parametrize("tied", [False, True])
def test_without_added_vocabulary_as_transformers_does_it(total, tied, tmp_path):
    overrides = {"additional_vocab_size": 0, "tie_word_embeddings": tied}
    ours, reference = our_model(**overrides), reference_model(**overrides)
    torch.manual_seed(0)
    ours.resize_token_embeddings(total)
    torch.manual_seed(0)
    reference.resize_token_embeddings(total)
    assert torch.equal(ours.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    assert ours.config.vocab_size == total
    assert (type(ours.get_input_embeddings()), type(ours.lm_head)) == (DecoupledEmbedding, DecoupledLinear)
    inputs = torch_batch(ours.config)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=89)
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = reference(**inputs).logits
        for model in (ours, IdeficsForVisionText2Text.from_pretrained(tmp_path).eval()):
            logits = model(**inputs).logits
            assert torch.allclose(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("added", "total"), [(0, 120), (3, 110)])
def test_resized_weights_are_not_drawn_anew(added, total):
    """`post_init` runs again when a model is wrapped, and initialises every module not marked as done."""
    model = our_model(additional_vocab_size=added)
    model.resize_token_embeddings(total)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.post_init()
    resized = [name for name in before if name.startswith(("lm_head.", "model.embed_tokens."))]
    assert len(resized) == (4 if added else 2)
    for name in resized:
        assert torch.equal(model.state_dict()[name], before[name]), name
