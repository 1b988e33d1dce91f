"""What transformers computes from the size of the vocabulary counts the additional one (E4); the right values are those
of one plain forward pass."""

import copy
import pickle

import pytest
import torch
import transformers

from idefics_pt import IdeficsConfig
from tests.models import small_config
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

SEARCHES = {
    "greedy": {},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled_beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 3},
}


@pytest.mark.parametrize("search", SEARCHES)
@torch.no_grad()
def test_transition_scores_are_log_probabilities(search):
    """E4: also of tokens of the additional vocabulary, and of rows that end early."""
    model, inputs = our_model(), torch_batch(our_model().config)
    options = {"max_new_tokens": 6, "eos_token_id": list(range(5, 30)), "output_scores": True, "top_k": 0}
    torch.manual_seed(3)
    found = model.generate(**inputs, return_dict_in_generate=True, **options, **SEARCHES[search])
    beams = found.get("beam_indices")
    scores = model.compute_transition_scores(found.sequences, found.scores, beams, normalize_logits=beams is None)
    length, each = inputs["input_ids"].shape[1], len(found.sequences) // 4
    rows = {name: value.repeat_interleave(each, dim=0) for name, value in inputs.items()}
    new = found.sequences[:, length:]
    rows["input_ids"] = found.sequences
    rows["attention_mask"] = torch.cat((rows["attention_mask"], torch.ones_like(new)), dim=1)
    logits = model(**rows).logits[:, length - 1 : -1]
    expected = logits.log_softmax(dim=-1).gather(2, new.unsqueeze(2)).squeeze(2)[:, : scores.shape[1]]
    is_token = torch.ones_like(scores, dtype=torch.bool)
    if beams is not None:
        is_token = beams[:, : scores.shape[1]] >= 0
        assert not is_token.all()
        assert not scores[~is_token].any()
    assert relative_error(scores[is_token], expected[is_token]) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("do_sample", [False, True])
@torch.no_grad()
def test_candidates_are_of_the_whole_vocabulary(do_sample):
    """E4: tokens are those of the model alone; samples are compared where they are almost certain."""
    model = our_model()
    inputs = {name: value[:1] for name, value in torch_batch(model.config).items()}
    options = {"max_new_tokens": 8, "do_sample": do_sample, "eos_token_id": None, "pad_token_id": 0}
    if do_sample:
        options |= {"temperature": 0.001, "top_k": 0}
    model.lm_head.additional_fc.weight *= 3  # additional tokens are likely
    expected = model.generate(**inputs, **options)
    assert (expected[:, 9:] >= 97).any()
    for other in (model, our_model(seed=1)):
        assert torch.equal(model.generate(**inputs, **options, assistant_model=other), expected)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), expected)


def test_sizes_of_vocabularies_differ_where_the_additional_ones_do():
    """E4, E5: numbers for everyone who computes with them; tools that compare see the whole."""
    config = IdeficsConfig(**small_config())
    assert config.vocab_size == 97 == config.to_dict()["vocab_size"]
    assert type(config.to_dict()["vocab_size"]) is type(config.vocab_size + 0) is int
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), IdeficsConfig.from_dict(config.to_dict())):
        assert same.vocab_size == config.vocab_size
        assert not same.vocab_size != config.vocab_size  # noqa: SIM202 - what PEFT asks
        assert hash(same.vocab_size) == hash(97)
    other = IdeficsConfig(**small_config(additional_vocab_size=4))
    assert other.vocab_size != config.vocab_size
    assert (
        other.vocab_size == 97 == IdeficsConfig(**small_config(additional_vocab_size=0)).vocab_size == other.vocab_size
    )
    other.vocab_size = 98
    assert (other.vocab_size, other.additional_vocab_size) == (98, 4)


@torch.no_grad()
def test_a_watermark_is_found_again():
    """E4: generation and detection divide the same, base, vocabulary; the additional tokens are never marked."""
    model = our_model()
    inputs = {name: value[:1] for name, value in torch_batch(model.config).items()}
    mark = transformers.WatermarkingConfig(bias=20.0, seeding_scheme="lefthash")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    marked = model.generate(**inputs, **options, watermarking_config=mark)[:, 9:]
    detector = transformers.WatermarkDetector(model_config=model.config, device="cpu", watermarking_config=mark)
    assert detector(marked, return_dict=True).green_fraction[0] == 1.0
    assert detector(model.generate(**inputs, **options)[:, 9:], return_dict=True).green_fraction[0] < 0.7
