"""E11: the cache is `past_key_values` or `cache`, whichever version of transformers is installed."""

import configparser
import copy
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from transformers import DynamicCache

from idefics_pt.transformers_versions import CACHE
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.pt.test_generation import GREEDY

NAMES = ("past_key_values", "cache")


def test_e11_the_name_is_that_of_transformers_own_outputs():
    model = reference_model()
    inputs = torch_batch(model.config)
    assert CACHE in model(**inputs, use_cache=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["whole", "without a head"])
@torch.no_grad()
def test_e11_forward_takes_both_names_and_its_output_is_read_by_both(part, name):
    model = our_model()
    inputs = torch_batch(model.config)
    model = model if part == "whole" else model.model
    first = model(**inputs, use_cache=True)
    assert isinstance(getattr(first, name), DynamicCache)
    assert getattr(first, name) is first[CACHE]
    token = torch.full((len(inputs["input_ids"]), 1), 5)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    rest = {"attention_mask": mask, "image_attention_mask": inputs["image_attention_mask"][:, -1:]}
    step = model(token, **rest, **{name: copy.deepcopy(first[CACHE])})
    by_position = model(token, mask, None, first[CACHE], image_attention_mask=rest["image_attention_mask"])
    assert torch.equal(step[0], by_position[0])
    assert step[CACHE].get_seq_length() == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("name", NAMES)
def test_e11_generate_takes_both_names(name):
    model = our_model()
    inputs = torch_batch(model.config)
    cache = DynamicCache(config=model.config)
    tokens = model.generate(**inputs, **GREEDY, **{name: cache})
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY))
    assert cache.get_seq_length() == tokens.shape[1] - 1


def test_e11_both_names_at_once_are_refused():
    model = our_model()
    inputs = torch_batch(model.config)
    caches = {name: DynamicCache(config=model.config) for name in NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="Give one of past_key_values and cache"):
            call(**inputs, **caches)


def test_e11_only_versions_that_the_suite_has_passed_with_are_admitted():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[2] / "setup.cfg")
    requirements = map(Requirement, settings["options"]["install_requires"].split("\n")[1:])
    (admitted,) = (requirement.specifier for requirement in requirements if requirement.name == "transformers")
    assert transformers.__version__ in admitted
    assert [version in admitted for version in ("5.22.2", "5.23.0", "5.24.0", "5.24.1")] == [False, True, True, False]
