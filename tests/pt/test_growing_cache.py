"""A cache with room to spare holds what `DynamicCache` holds, and never changes what someone else looks at."""

import copy

import pytest
import torch
from transformers import DynamicCache

from idefics_pt.growing_cache import GrowingCache
from tests.pt.pairs import our_model, torch_batch


def new(length: int, rows: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, length, 4, generator=generator), torch.randn(rows, 3, length, 4, generator=generator)


def both():
    return GrowingCache(1), DynamicCache()


STEPS = {
    "tokens": lambda cache: None,
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("between", STEPS)
def test_holds_what_a_dynamic_cache_holds(between):
    results = []
    for cache in both():
        for seed, length in enumerate((5, 1, 1)):
            cache.update(*new(length, seed=seed), 0)
        STEPS[between](cache)
        for seed, length in enumerate((1, 70, 1), start=7):
            cache.update(*new(length, seed=seed), 0)
        results.append((cache.get_seq_length(), cache.layers[0].keys, cache.layers[0].values))
    (length, keys, values), (expected_length, expected_keys, expected_values) = results
    assert length == expected_length
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)


def test_a_token_is_written_behind_the_others_without_copying_them():
    cache = GrowingCache(1)
    keys, _ = cache.update(*new(5), 0)
    longer, _ = cache.update(*new(1), 0)
    assert longer.data_ptr() == keys.data_ptr()


def test_what_was_handed_out_does_not_change_after_a_crop():
    cache = GrowingCache(1)
    keys, values = cache.update(*new(6), 0)
    before = keys.clone(), values.clone()
    cache.crop(-2)
    cache.update(*new(2, seed=3), 0)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_a_copy_goes_its_own_way():
    cache = GrowingCache(1)
    cache.update(*new(5), 0)
    other = copy.deepcopy(cache)
    cache.update(*new(1, seed=1), 0)
    other.update(*new(1, seed=2), 0)
    assert torch.equal(cache.layers[0].keys[:, :, -1:], new(1, seed=1)[0])
    assert torch.equal(other.layers[0].keys[:, :, -1:], new(1, seed=2)[0])


def test_gradients_flow_through_it():
    cache = GrowingCache(1)
    keys, values = (tensor.requires_grad_() for tensor in new(3))
    cache.update(keys, values, 0)
    longer, _ = cache.update(*(tensor.requires_grad_() for tensor in new(1)), 0)
    longer.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_a_cache_of_inference_mode_goes_on_outside_it():
    cache = GrowingCache(1)
    with torch.inference_mode():
        cache.update(*new(5), 0)
    cache.update(*new(1), 0)
    assert cache.get_seq_length() == 6
    with torch.inference_mode():
        cache.update(*new(1), 0)
    assert cache.get_seq_length() == 7


def test_it_is_what_calls_and_generate_use_by_default():
    model = our_model()
    inputs = torch_batch(model.config)
    with torch.inference_mode():
        called = model(**inputs, use_cache=True).past_key_values
        kept = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True).past_key_values
    assert type(called) is type(kept) is GrowingCache
