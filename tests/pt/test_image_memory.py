"""What a cache remembers of images, when callers crop, reset, repeat, reorder or compile: never the wrong image."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from idefics_pt.cache import recall_images, remember_images, select_images, with_images
from idefics_pt.growing_cache import GrowingCache
from idefics_pt.transformers_versions import CACHE
from tests.pt.pairs import our_model, torch_batch
from tests.pt.test_generation import GREEDY, counted_calls
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.fixture(scope="module")
def model():
    return our_model()


@pytest.fixture
def inputs(model):
    return torch_batch(model.config)


def first(inputs, length, **changes):
    """The first positions of a batch, with all images, and the image mask over the whole text."""
    cut = {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask")}
    images = {name: inputs[name] for name in ("pixel_values", "image_attention_mask")}
    return {**cut, **images, **changes}


def rest(inputs, length, **changes):
    """What follows the first positions; images only if given."""
    return {
        "input_ids": inputs["input_ids"][:, length:],
        "attention_mask": inputs["attention_mask"],
        "image_attention_mask": inputs["image_attention_mask"],
        **changes,
    }


def others(inputs):
    """The same texts about other images."""
    return {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_reset_cache_forgets_its_images(compiled, model, inputs):
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager") if compiled else model
    cache = StaticCache(config=model.config, max_cache_len=16)
    call(**inputs, past_key_values=cache)
    cache.reset()
    expected = model(**others(inputs)).logits
    assert relative_error(call(**others(inputs), past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS
    cache.reset()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert relative_error(call(**text, past_key_values=cache).logits, model(**text).logits) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("num_new", [1, 2, 3])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_e12_images_that_the_mask_covers_alone_replace_those_of_the_cache(compiled, num_new, model, inputs):
    """In eager execution and in graphs; the text before saw others, and that is in its keys and values alone."""
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager") if compiled else model
    pixels = torch.randn(4, num_new, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 7), past_key_values=cache)
    blank = copy.deepcopy(cache)
    remember_images(blank, None)
    mask = with_images(inputs["image_attention_mask"] != 0, num_new)
    later = rest(inputs, 7, pixel_values=pixels, image_attention_mask=mask)
    actual = call(**later, past_key_values=cache).logits
    assert relative_error(actual, model(**later, past_key_values=blank).logits) < FLOAT32_ACTIVATIONS
    assert recall_images(cache).num_images == num_new
    # each new image stands where one was: a text that is taken back sees the one in the place of what it saw
    cache.crop(-3)
    seen = with_images(inputs["image_attention_mask"][:, 5:6] != 0, num_new).expand(-1, 3, -1)
    silent = rest(inputs, 6, image_attention_mask=None)
    told = model(**{**silent, "image_attention_mask": seen}, past_key_values=copy.deepcopy(cache)).logits
    assert relative_error(model(**silent, past_key_values=cache).logits, told) < FLOAT32_ACTIVATIONS
    assert seen.any()


@torch.no_grad()
def test_images_are_known_by_the_tensor_and_only_while_it_is_unchanged(model, inputs):
    pixels = inputs["pixel_values"]
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 7), past_key_values=cache)
    expected = model(**inputs).logits[:, 7:]
    with counted_calls(vision=model.model.vision_model) as counts:
        for images, encoded in ((pixels, 0), (pixels.clone(), 1)):
            again = copy.deepcopy(cache)
            assert recall_images(again).hidden_states_BILE is recall_images(cache).hidden_states_BILE
            logits = model(**rest(inputs, 7, pixel_values=images), past_key_values=again).logits
            assert relative_error(logits, expected) < FLOAT32_ACTIVATIONS
            assert counts["vision"] == encoded
    blank = copy.deepcopy(cache)
    remember_images(blank, None)
    pixels.mul_(-1)
    later = rest(inputs, 7, pixel_values=pixels)
    actual = model(**later, past_key_values=cache).logits
    assert relative_error(actual, model(**later, past_key_values=blank).logits) < FLOAT32_ACTIVATIONS
    assert relative_error(actual, expected) > 100 * FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_a_cache_keeps_no_pixels_and_can_be_pickled(model, inputs):
    cache = DynamicCache(config=model.config)
    pixels = weakref.ref(inputs["pixel_values"])
    model(**first(inputs, 7), past_key_values=cache)
    later = rest(inputs, 7)
    del inputs["pixel_values"]
    gc.collect()
    assert pixels() is None
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(vars(recall_images(cache))))
    loaded = pickle.loads(pickle.dumps(cache))
    expected = model(**later, past_key_values=cache).logits
    assert torch.equal(model(**later, past_key_values=loaded).logits, expected)


@torch.no_grad()
def test_a_cache_cropped_to_before_its_images_takes_others(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # sees its first image from position 2 on
    cache = DynamicCache(config=model.config)
    model(**row, past_key_values=cache)
    cache.crop(-7)
    new = {**row, "pixel_values": -row["pixel_values"]}
    actual = model(**rest(new, 2, pixel_values=new["pixel_values"]), past_key_values=cache).logits
    assert relative_error(actual, model(**new).logits[:, 2:]) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("steps", [[], [7], [6, 7, 8]])
@torch.no_grad()
def test_a_cropped_cache_does_not_show_an_image_of_the_text_cut_away(steps, model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # sees image 0 at positions 2 to 4, image 1 from 5 on
    whole = DynamicCache(config=model.config)
    for start, end in zip([0, *steps], [*steps, 9], strict=True):
        images = {"pixel_values": row["pixel_values"]} if start == 0 else {}
        text = {"input_ids": row["input_ids"][:, start:end], "attention_mask": row["attention_mask"][:, :end]}
        model(**text, **images, image_attention_mask=row["image_attention_mask"], past_key_values=whole)
    for kept in range(3, 9):
        silent = rest(row, kept)
        mask = silent.pop("image_attention_mask").clone()
        cache = copy.deepcopy(whole)
        cache.crop(kept - 9)
        mask[:, kept:] = mask[:, kept - 1 : kept]
        actual = model(**silent, past_key_values=cache).logits
        expected = model(**{**row, "image_attention_mask": mask}).logits[:, kept:]
        assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_rows_with_unequal_numbers_of_images_get_new_ones(model, inputs):
    """Columns of the mask: those of the cache, padding included, then the new ones."""
    old = {**first(inputs, 5), "image_attention_mask": inputs["image_attention_mask"][:, :5]}
    cache = DynamicCache(config=model.config)
    model(**old, past_key_values=cache)
    known = recall_images(cache).num_images
    new_pixels = torch.randn(4, 1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    mask = torch.nn.functional.pad(inputs["image_attention_mask"], (0, 1))
    mask[:, 5:] = 0
    mask[:, 5:, known] = 1
    actual = model(**rest(inputs, 5, pixel_values=new_pixels, image_attention_mask=mask), past_key_values=cache).logits
    whole = {**inputs, "pixel_values": torch.cat((inputs["pixel_values"], new_pixels), dim=1)}
    expected = model(**{**whole, "image_attention_mask": mask}).logits[:, 5:]
    assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_an_image_that_was_not_encoded_is_not_taken_for_black(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # its second image is seen from position 5 on
    mask = row["image_attention_mask"]
    cache = DynamicCache(config=model.config)
    model(**first(row, 5, image_attention_mask=mask[:, :5]), past_key_values=cache)
    with pytest.raises(ValueError, match="no earlier call could see, so they were not encoded; give all images again"):
        model(**rest(row, 5, image_attention_mask=mask[:, 5:]), past_key_values=copy.deepcopy(cache))
    actual = model(**rest(row, 5, pixel_values=row["pixel_values"]), past_key_values=cache).logits
    assert relative_error(actual, model(**row).logits[:, 5:]) < FLOAT32_ACTIVATIONS
    assert recall_images(cache).encoded_BI.all()


@pytest.mark.parametrize("kept", [[2, 0], [3, 2, 1, 0], [1, 1, 3]])
@torch.no_grad()
def test_prompts_of_a_cache_can_be_selected(kept, model, inputs):
    indices = torch.tensor(kept)
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 6), past_key_values=cache)
    cache.batch_select_indices(indices)
    select_images(cache, indices)
    selected = {name: value[indices] for name, value in rest(inputs, 6).items()}
    expected = model(**inputs).logits[indices, 6:]
    assert relative_error(model(**selected, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_new_images_do_not_show_an_earlier_one_that_was_not_encoded(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # its second image is seen from position 5 on
    cache = DynamicCache(config=model.config)
    model(**first(row, 5, image_attention_mask=row["image_attention_mask"][:, :5]), past_key_values=cache)
    mask = torch.nn.functional.pad(row["image_attention_mask"], (0, 1))
    mask[:, 8:] = torch.tensor([0, 0, 1])
    later = rest(row, 5, pixel_values=row["pixel_values"][:, :1], image_attention_mask=mask)
    with pytest.raises(ValueError, match="no earlier call could see, so they were not encoded"):
        model(**later, past_key_values=cache)


@torch.no_grad()
def test_a_static_cache_of_inference_mode_goes_on_outside_of_it(model, inputs):
    cache = StaticCache(config=model.config, max_cache_len=16)
    text = {name: inputs[name][:, :2] for name in ("input_ids", "attention_mask")}
    model(**text, past_key_values=cache)
    whole = {**inputs, "image_attention_mask": inputs["image_attention_mask"].clone()}
    whole["image_attention_mask"][:, :2] = 0
    with torch.inference_mode():
        middle = {**whole, "input_ids": inputs["input_ids"][:, 2:6], "attention_mask": inputs["attention_mask"][:, :6]}
        model(**middle, past_key_values=cache)
    expected = model(**whole).logits[:, 6:]
    later = rest(whole, 6, image_attention_mask=whole["image_attention_mask"][:, 6:])
    assert relative_error(model(**later, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_step_on_a_static_cache_takes_a_mask_over_the_whole_text(compiled, model, inputs):
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(**first(inputs, 8), past_key_values=cache)
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    expected = model(**inputs).logits[:, 8:]
    assert relative_error(call(**rest(inputs, 8), past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_beams_that_saw_different_images_are_reordered_with_what_they_saw(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}
    beams = {name: value.repeat_interleave(2, dim=0) for name, value in row.items()}
    beams["image_attention_mask"][1] = beams["image_attention_mask"][1].flip(-1)
    shared = {**beams, "pixel_values": row["pixel_values"]}
    cache = model(**first(shared, 6), use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = {name: value.flip(0) for name, value in beams.items()}
    mask = swapped["image_attention_mask"].clone()
    mask[:, 6:] = mask[:, 5:6]
    expected = model(**{**swapped, "image_attention_mask": mask}).logits[:, 6:]
    silent = rest(swapped, 6, image_attention_mask=None)
    assert relative_error(model(**silent, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_e13_rows_may_be_picked_in_every_way_that_transformers_knows(model, inputs):
    for kept in ([True, False, True, True], [0, 2, 3], [-4, -2, -1]):
        cache = model(**first(inputs, 6), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor(kept))
        selected = {name: value[[0, 2, 3]] for name, value in rest(inputs, 6).items()}
        expected = model(**inputs).logits[[0, 2, 3], 6:]
        assert relative_error(model(**selected, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("kept", [[2, 0], [3, 2, 1, 0], [1, 1, 3]])
@torch.no_grad()
def test_e13_our_own_cache_takes_its_images_along(kept, model, inputs):
    indices = torch.tensor(kept)
    cache = model(**first(inputs, 6), use_cache=True).past_key_values
    assert type(cache) is GrowingCache
    again = copy.deepcopy(cache)
    cache.batch_select_indices(indices)
    selected = {name: value[indices] for name, value in rest(inputs, 6).items()}
    expected = model(**inputs).logits[indices, 6:]
    assert relative_error(model(**selected, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS
    # what a row saw goes along too, and rows of samples get images of their own
    silent = {**selected, "image_attention_mask": None}
    last = {name: value[indices] for name, value in inputs.items()}
    last["image_attention_mask"][:, 6:] = last["image_attention_mask"][:, 5:6].clone()
    expected = model(**last).logits[:, 6:]
    again.batch_repeat_interleave(3)
    again.batch_select_indices(3 * indices + 1)
    assert relative_error(model(**silent, past_key_values=again).logits, expected) < FLOAT32_ACTIVATIONS
    again.reset()
    assert recall_images(again) is None


@torch.no_grad()
def test_prompts_of_our_own_cache_are_reordered_with_their_images(model, inputs):
    order = torch.tensor([2, 0, 3, 1])
    cache = model(**first(inputs, 6), use_cache=True).past_key_values
    cache.reorder_cache(order)
    selected = {name: value[order] for name, value in rest(inputs, 6).items()}
    expected = model(**inputs).logits[order, 6:]
    assert relative_error(model(**selected, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_rows_that_fit_no_prompt_are_named(model, inputs):
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 6), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 1, 2]))
    text = {name: value[:3] for name, value in rest(inputs, 6).items()}
    with pytest.raises(ValueError, match="images of 4 prompts; 3 rows of text do not fit"):
        model(**text, past_key_values=cache)


@torch.no_grad()
def test_samples_of_a_prompt_go_on_with_images_of_their_own(model, inputs):
    row = {name: value[3:] for name, value in inputs.items()}
    cache = DynamicCache(config=model.config)
    model(**first(row, 6), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    copies = {name: value.repeat_interleave(3, dim=0) for name, value in row.items()}
    silent = {**rest(copies, 6), "image_attention_mask": None}
    last = {**copies, "image_attention_mask": copies["image_attention_mask"].clone()}
    last["image_attention_mask"][:, 6:] = copies["image_attention_mask"][:, 5:6]
    shared = copy.deepcopy(cache)
    expected = model(**last).logits[:, 6:]
    assert relative_error(model(**silent, past_key_values=shared).logits, expected) < FLOAT32_ACTIVATIONS

    new_pixels = torch.randn(3, 1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    mask = torch.nn.functional.pad(copies["image_attention_mask"], (0, 1))
    mask[:, 6:] = torch.tensor([0, 0, 1])
    actual = model(**rest(copies, 6, pixel_values=new_pixels, image_attention_mask=mask), past_key_values=cache).logits
    whole = {**copies, "pixel_values": torch.cat((copies["pixel_values"], new_pixels), dim=1)}
    expected = model(**{**whole, "image_attention_mask": mask}).logits[:, 6:]
    assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_images_of_another_size_are_refused_without_a_resampler(inputs):
    model = our_model(use_resampler=False)
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 6), past_key_values=cache)
    mask = torch.nn.functional.pad(inputs["image_attention_mask"], (0, 1), value=1)
    larger = rest(inputs, 6, pixel_values=torch.zeros(4, 1, 3, 56, 56), image_attention_mask=mask)
    with pytest.raises(ValueError, match="17 tokens each, those that the cache has seen 5"):
        model(**larger, interpolate_pos_encoding=True, past_key_values=cache)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_call_without_a_mask_sees_what_the_text_before_saw(compiled, model, inputs):
    torch._dynamo.reset()
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 4), past_key_values=cache)
    step = {name: value[:, 4:7] for name, value in inputs.items() if name != "pixel_values"}
    call = torch.compile(model, backend="eager") if compiled else model
    call(**{**step, "attention_mask": inputs["attention_mask"][:, :7]}, past_key_values=cache)
    before = copy.copy(cache)
    silent = {name: inputs[name][:, 7:] for name in ("input_ids",)} | {"attention_mask": inputs["attention_mask"]}
    mask = inputs["image_attention_mask"].clone()
    mask[:, 7:] = mask[:, 6:7]
    expected = model(**{**inputs, "image_attention_mask": mask}).logits[:, 7:]
    assert relative_error(model(**silent, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS
    assert torch.equal(recall_images(before).seen_BSI, inputs["image_attention_mask"][:, :7].bool())


def test_candidates_that_hold_an_image_token_leave_the_image_in_sight():
    """Assisted decoding reads candidates with the prompt, and crops the cache to those that it takes."""
    model = our_model()
    model.config.image_token_id = 7
    row = {name: value[:1] for name, value in torch_batch(model.config).items()}
    # the last token was followed by the image before, so that the image token is looked up
    text = {"input_ids": torch.tensor([[9, 7, 12, 13, 14, 9]]), "pixel_values": row["pixel_values"][:, :1]}
    expected = model.generate(**text, **GREEDY)
    assert torch.equal(model.generate(**text, **GREEDY, prompt_lookup_num_tokens=2), expected)


def test_decoding_loops_of_others_see_the_images(model, inputs):
    def loop(model, input_ids, generation_config, **kwargs):
        # knows nothing of first iterations, as loops written for other versions of transformers
        kwargs = {
            name: value for name, value in kwargs.items() if name not in ("logits_processor", "stopping_criteria")
        }
        cache = kwargs[CACHE]
        for _ in range(generation_config.max_new_tokens):
            past = cache.get_seq_length()
            step = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=input_ids.shape[1] - past, **kwargs
            )
            outputs = model(**step, return_dict=True)
            input_ids = torch.cat((input_ids, outputs.logits[:, -1:].argmax(dim=-1)), dim=1)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        return input_ids

    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=loop), expected)


@torch.no_grad()
def test_padding_is_not_encoded_ahead_of_time(model, inputs):
    seen = inputs["image_attention_mask"].bool().any(dim=1)
    sizes = []
    hook = model.model.vision_model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    features = model.encode_images(inputs["pixel_values"], inputs["image_attention_mask"])
    hook.remove()
    assert sizes == [seen.sum().item()]
    assert features[~seen].abs().max() == 0.0
    every = model.encode_images(inputs["pixel_values"])
    assert relative_error(features[seen], every[seen]) < FLOAT32_ACTIVATIONS
    torch._dynamo.reset()
    states = torch.compile(model, backend="eager")(**inputs).image_hidden_states
    assert states[~seen].abs().max() == 0.0
    with counted_calls(vision=model.model.vision_model) as counts:
        dark = model.encode_images(inputs["pixel_values"], torch.zeros_like(inputs["image_attention_mask"]))
    assert counts["vision"] == 0
    assert dark.shape == every.shape
