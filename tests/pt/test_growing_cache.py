"""A cache with room to spare holds what `DynamicCache` holds, and never changes what someone else looks at."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from idefics_pt.growing_cache import GrowingCache
from tests.pt.pairs import our_model, torch_batch


def new(length: int, rows: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, length, 4, generator=generator), torch.randn(rows, 3, length, 4, generator=generator)


@pytest.fixture(autouse=True)
def without_gradients():
    """Only then does the cache write in place."""
    with torch.no_grad():
        yield


def both():
    return GrowingCache(), DynamicCache()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [1, 70])
def test_repeated_rows_are_reordered_and_extended_as_in_a_dynamic_cache(length, rows):
    results = []
    for cache in both():
        cache.update(*new(5, rows), 0)
        held = cache.layers[0].keys.clone()
        first = cache.layers[0].keys
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.arange(3 * rows).flip(0))
        cache.update(*new(length, 3 * rows, seed=1), 0)
        cache.reorder_cache(torch.arange(3 * rows).roll(1))
        cache.update(*new(1, 3 * rows, seed=2), 0)
        assert torch.equal(first, held)  # whoever looks at the row that was repeated
        results.append((cache.layers[0].keys, cache.layers[0].values))
    assert all(map(torch.equal, *results))


def copied_layers(cache):
    """Each layer goes on as its copy, after the original has been given another token."""
    originals = cache.layers
    cache.layers = [copy.copy(layer) for layer in originals]
    originals[0].update(*new(1, seed=5))


STEPS = {
    "tokens": lambda cache: None,
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "copy": copied_layers,
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
    cache = GrowingCache()
    keys, _ = cache.update(*new(5), 0)
    longer, _ = cache.update(*new(1), 0)
    assert longer.data_ptr() == keys.data_ptr()


def test_what_was_handed_out_does_not_change_after_a_crop():
    cache = GrowingCache()
    keys, values = cache.update(*new(6), 0)
    before = keys.clone(), values.clone()
    cache.crop(-2)
    cache.update(*new(2, seed=3), 0)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_someone_puts_in_the_place_of_either_is_kept(name):
    cache = GrowingCache()
    cache.update(*new(5), 0)
    (layer,) = cache.layers
    setattr(layer, name, -getattr(layer, name))
    expected = getattr(layer, name).clone()
    cache.update(*new(1, seed=1), 0)
    assert torch.equal(getattr(layer, name)[:, :, :5], expected)


def copy_of_layers(cache):
    other = GrowingCache()
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, copy_of_layers])
def test_a_copy_goes_its_own_way(copied):
    cache = GrowingCache()
    cache.update(*new(5), 0)
    other = copied(cache)
    cache.update(*new(1, seed=1), 0)
    other.update(*new(1, seed=2), 0)
    assert torch.equal(cache.layers[0].keys[:, :, -1:], new(1, seed=1)[0])
    assert torch.equal(other.layers[0].keys[:, :, -1:], new(1, seed=2)[0])


@pytest.mark.parametrize("trained", ["query", "key", "value"])
def test_gradients_flow_through_it(trained):
    gradients = []
    for cache in both():
        with torch.enable_grad():
            parts = {"query": torch.ones(2, 3, 1, 4), "key": new(1)[0], "value": new(1, seed=1)[1]}
            parts[trained].requires_grad_()
            outputs = []
            for _ in range(3):
                keys, values = cache.update(parts["key"] * 2, parts["value"] * 2, 0)
                outputs.append(torch.nn.functional.scaled_dot_product_attention(parts["query"] * 2, keys, values))
            torch.cat(outputs).pow(2).sum().backward()
        gradients.append(parts[trained].grad)
    torch.testing.assert_close(*gradients)


def test_what_does_not_fit_is_refused_as_ever():
    for cache in both():
        cache.update(*new(3, rows=4), 0)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            cache.update(*new(1, rows=1), 0)


def test_a_finer_precision_is_not_rounded_to_the_first():
    for cache in both():
        cache.update(*new(3), 0)
        keys, _ = cache.update(*(x.double() for x in new(1, seed=1)), 0)
        assert keys.dtype == torch.float64
        assert torch.equal(keys[:, :, 3:], new(1, seed=1)[0].double())


def test_it_is_made_from_what_data_parallel_gathers():
    cache = GrowingCache([new(3), new(3, seed=1)])
    assert torch.equal(cache.layers[1].values, new(3, seed=1)[1])
    cache.update(*new(1), 1)
    assert cache.get_seq_length(1) == 4


def test_a_cache_of_inference_mode_goes_on_outside_it():
    cache = GrowingCache()
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_e14_copies_have_no_room_and_go_on_alone(duplicate):
    cache, expected = both()
    for each in (cache, expected):
        each.update(*new(5), 0)
    assert not cache.layers[0].keys.is_contiguous()  # a view of a buffer, to whose strides a graph would be tied
    other = duplicate(cache)
    assert other.layers[0].keys.is_contiguous()
    assert vars(other.layers[0]).keys() == vars(expected.layers[0]).keys()
    cache.update(*new(1, seed=9), 0)
    for each in (other, expected):
        each.update(*new(2, seed=1), 0)
    assert torch.equal(other.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(other.layers[0].values, expected.layers[0].values)
