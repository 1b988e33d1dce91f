"""What a cache remembers of images, when callers crop, reset, repeat, reorder or compile: never the wrong image."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from idefics_pt.cache import recall_images, select_images
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


@torch.no_grad()
def test_other_images_do_not_pass_for_known_ones(model, inputs):
    cache = DynamicCache(config=model.config)
    model(**first(inputs, 7), past_key_values=cache)
    with pytest.raises(ValueError, match="2 that the cache has seen and 2 given with this call, and these are others"):
        model(**rest(inputs, 7, pixel_values=others(inputs)["pixel_values"]), past_key_values=copy.deepcopy(cache))
    again = model(**rest(inputs, 7, pixel_values=inputs["pixel_values"].clone()), past_key_values=cache).logits
    assert relative_error(again, model(**inputs).logits[:, 7:]) < FLOAT32_ACTIVATIONS


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
        if kept <= 5:
            with pytest.raises(ValueError, match=f"cropped to {kept} positions: give image_attention_mask"):
                model(**silent, past_key_values=cache)
            mask[:, kept:] = mask[:, kept - 1 : kept]
            silent["image_attention_mask"] = mask[:, kept:]
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
    assert recall_images(cache).encoded_BI is None


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
    assert torch.equal(recall_images(before).last_mask_BI, mask[:, 6].bool())


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
