"""Generation: the tokens of transformers' IDEFICS, images encoded once, and text without any image."""

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models import MATRIX
from tests.pt.pairs import our_model, reference_model, torch_batch

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beam_returning_two": {"num_beams": 3, "num_return_sequences": 2},
    "repetition_penalty": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
}


@contextlib.contextmanager
def counted_calls(**modules):
    """How often each module is called while the context lasts, by name."""
    counts = dict.fromkeys(modules, 0)

    def counter(name):
        def count(*_):
            counts[name] += 1

        return count

    hooks = [module.register_forward_hook(counter(name)) for name, module in modules.items()]
    yield counts
    for hook in hooks:
        hook.remove()


def image_work(model):
    """The modules that work on images: none of them may run for text, or twice for an image."""
    block = model.model.gated_cross_attn_layers[0].cross_attn
    return {
        "vision tower": model.model.vision_model,
        "resampler": model.model.perceiver_resampler,
        "image keys": block.k_proj,
        "image values": block.v_proj,
    }


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("variant", MATRIX)
def test_tokens_are_those_of_transformers(variant, search, use_cache, device):
    ours, reference = our_model(device, **MATRIX[variant]), reference_model(device, **MATRIX[variant])
    inputs = torch_batch(ours.config, device)
    expected = reference.generate(**inputs, **GREEDY, **SEARCHES[search])
    assert torch.equal(ours.generate(**inputs, use_cache=use_cache, **GREEDY, **SEARCHES[search]), expected)


def test_tokens_depend_on_the_images():
    model = our_model()
    inputs = torch_batch(model.config)
    tokens = model.generate(**inputs, **GREEDY)
    inputs["pixel_values"] = inputs["pixel_values"].roll(1, dims=0)
    others = model.generate(**inputs, **GREEDY)
    assert not torch.equal(tokens[0], others[0])
    assert torch.equal(tokens[1], others[1])  # the row that sees no image


def test_d3_beam_search_with_added_vocabulary():
    model = our_model()
    assert model.config.additional_vocab_size > 0
    outputs = model.generate(
        **torch_batch(model.config), num_beams=2, **GREEDY, return_dict_in_generate=True, output_scores=True
    )
    assert outputs.scores[0].shape[-1] == model.config.vocab_size + model.config.additional_vocab_size


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_d13_image_keys_are_made_once(beams, use_cache):
    model = our_model()
    inputs = torch_batch(model.config)
    with counted_calls(**image_work(model)) as counts:
        model.generate(**inputs, num_beams=beams, use_cache=use_cache, **GREEDY)
    assert counts["vision tower"] == counts["resampler"] == 1
    assert counts["image keys"] == counts["image values"] == (1 if use_cache else GREEDY["max_new_tokens"])


def test_d13_text_alone_runs_no_image_work():
    model = our_model()
    inputs = torch_batch(model.config)
    inputs["image_attention_mask"] = torch.zeros_like(inputs["image_attention_mask"])[..., :1]
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])[:, :1]
    with counted_calls(**image_work(model)) as counts:
        with_zero_image = model.generate(**inputs, **GREEDY)
        logits = model(**inputs).logits
    assert not any(counts.values())
    expected = reference_model()(**inputs).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, **GREEDY), with_zero_image)


def test_d9_text_only_input():
    model = our_model()
    inputs = torch_batch(model.config)
    with torch.no_grad():
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        dark = {**inputs, "image_attention_mask": torch.zeros_like(inputs["image_attention_mask"])}
        expected = reference_model()(**dark).logits
    assert outputs.image_hidden_states is None
    assert torch.allclose(outputs.logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_d9_image_mask_is_optional():
    model, reference = our_model(), reference_model()
    inputs = torch_batch(model.config)
    every = torch.ones_like(inputs.pop("image_attention_mask"))
    with torch.no_grad():
        expected = reference(**inputs, image_attention_mask=every).logits
        logits = model(**inputs).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    tokens = reference.generate(**inputs, image_attention_mask=every, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


def test_image_mask_is_made_from_image_tokens_when_their_id_is_known():
    model = our_model()
    inputs = torch_batch(model.config)
    image_token = model.config.image_token_id = model.config.vocab_size + 1
    ids = inputs["input_ids"].where(inputs["input_ids"] != image_token, 5)
    ids[:, 1], ids[0, 5] = image_token, image_token
    mask = torch.zeros_like(inputs["image_attention_mask"])
    mask[:, 1:, 0] = 1
    mask[0, 5:] = torch.tensor([0, 1])
    inputs["input_ids"] = ids
    inputs.pop("image_attention_mask")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs, image_attention_mask=mask).logits)
    assert torch.equal(
        model.generate(**inputs, **GREEDY), model.generate(**inputs, image_attention_mask=mask, **GREEDY)
    )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("images", ["pixel_values", None])
def test_tokens_from_embeddings_are_those_from_ids(images, beams):
    model = our_model()
    inputs = torch_batch(model.config)
    if images is None:
        del inputs["pixel_values"], inputs["image_attention_mask"]
    expected = model.generate(**inputs, num_beams=beams, **GREEDY)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    new_tokens = expected[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **inputs, num_beams=beams, **GREEDY), new_tokens)
    # with both, the embeddings are read and the ids only head the result
    other_ids = ids.roll(1, dims=1)
    both = model.generate(input_ids=other_ids, inputs_embeds=embeddings, **inputs, num_beams=beams, **GREEDY)
    assert torch.equal(both, torch.cat((other_ids, new_tokens), dim=1))


def test_beams_and_samples_share_image_keys():
    model = our_model()
    inputs = torch_batch(model.config)
    outputs = model.generate(**inputs, num_beams=3, return_dict_in_generate=True, **GREEDY)
    rows = len(inputs["input_ids"])
    memory = outputs.past_key_values.image_memory
    assert outputs.past_key_values.layers[0].keys.shape[0] == 3 * rows
    assert {key.shape[0] for key, _ in memory.key_values} == {rows}


def test_samples_follow_the_seed_and_their_own_images():
    model = our_model()
    inputs = torch_batch(model.config)
    kwargs = {**GREEDY, "do_sample": True, "num_return_sequences": 3}

    def sample(seed, **changed):
        torch.manual_seed(seed)
        return model.generate(**{**inputs, **changed}, **kwargs)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    # the same numbers drawn without sharing: every row of text gets a row of images of its own
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in inputs.items()}
    torch.manual_seed(0)
    alone = model.generate(**repeated, **{**kwargs, "num_return_sequences": 1})
    assert torch.equal(sample(0), alone)


@pytest.mark.parametrize("split", [1, 4, 8])
def test_cached_forward_in_two_parts_equals_one(split):
    model = our_model()
    inputs = torch_batch(model.config)
    with torch.no_grad():
        whole = model(**inputs)
        first = model(
            input_ids=inputs["input_ids"][:, :split],
            attention_mask=inputs["attention_mask"][:, :split],
            pixel_values=inputs["pixel_values"],
            image_attention_mask=inputs["image_attention_mask"],
            use_cache=True,
        )
        cache = copy.deepcopy(first.past_key_values)
        with counted_calls(**image_work(model)) as counts:
            second = model(
                input_ids=inputs["input_ids"][:, split:],
                attention_mask=inputs["attention_mask"],
                image_attention_mask=inputs["image_attention_mask"],
                past_key_values=cache,
            )
    assert not any(counts.values())
    logits = torch.cat((first.logits, second.logits), dim=1)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(logits[real], whole.logits[real], rtol=0, atol=1e-5 * whole.logits.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "there are none: give pixel_values"),
        ({"image_attention_mask": torch.ones(4, 9, 3)}, "covers 3 images per row, but there are 2"),
        (
            {"inputs_embeds": torch.ones(4, 9, 24), "input_ids": None, "image_attention_mask": torch.ones(4, 5, 2)},
            "covers 5 of the 9 positions of inputs_embeds",
        ),
        ({"image_attention_mask": torch.ones(4, 9)}, r"got \(4, 9\)"),
        ({"pixel_values": torch.ones(3, 2, 3, 28, 28)}, "divides the 4 rows of text"),
        ({"pixel_values": torch.ones(4, 2, 1, 28, 28)}, "must have 3 channels, got 1"),
        ({"pixel_values": torch.ones(4, 2, 3, 56, 28)}, "56 x 28 pixels but the model's images are 28 x 28"),
        ({"perceiver_embeddings": torch.ones(4, 2, 6, 20)}, "got pixel_values and perceiver_embeddings"),
        ({"input_ids": torch.full((4, 9), 100)}, r"must lie in \[0, 100\)"),
        ({"input_ids": torch.full((4, 9), -1)}, "got ids from -1 to -1"),
        ({"inputs_embeds": torch.ones(4, 9, 24)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(9, dtype=torch.long)}, r"input_ids must have shape \(batch, text_len\).*got \(9,\)"),
        ({"input_ids": torch.ones(4, 0, dtype=torch.long)}, r"hold something, got \(4, 0\)"),
        ({"attention_mask": torch.ones(4, 8)}, r"attention_mask must have shape \(4, 9\), got \(4, 8\)"),
        (
            {"pixel_values": None, "perceiver_embeddings": torch.ones(4, 2, 6, 19)},
            "perceiver_embeddings must have the vision tower's width 20, got 19",
        ),
        ({"labels": torch.full((4, 9), 100)}, r"labels must be -100 or lie in \[0, 100\), got 100 to 100"),
        ({"labels": torch.ones(4, 8, dtype=torch.long)}, r"labels must have shape \(4, 9\).*got \(4, 8\)"),
        ({"labels": torch.ones(4, 9, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep does not go with labels"),
    ],
)
def test_bad_arguments_are_named(change, message):
    model = our_model()
    inputs = {**torch_batch(model.config), **change}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_mistyped_argument_is_named():
    model = our_model()
    inputs = torch_batch(model.config)
    with pytest.warns(UserWarning, match="no effect: image_atention_mask, pixel_value") as warned:
        model(input_ids=inputs["input_ids"], image_atention_mask=1, pixel_value=3)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("change", [{}, {"num_beams": 2}, {"inputs_embeds": True}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_the_same_cache_for_another_prompt_is_refused(kind, change):
    """Row E7: transformers would read a part of the prompt behind what the cache holds, without a word."""
    model = our_model()
    inputs = {name: value[:2] for name, value in torch_batch(model.config).items()}
    change = dict(change)
    if change.pop("inputs_embeds", False):
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    expected = model.generate(**inputs, **GREEDY, **change, past_key_values=cache)
    length = int(cache.get_seq_length())
    with pytest.raises(ValueError, match=f"The cache holds {length} positions of text and the prompt has"):
        model.generate(**inputs, **GREEDY, **change, past_key_values=cache)
    assert int(cache.get_seq_length()) == length
    cache.reset()
    assert torch.equal(model.generate(**inputs, **GREEDY, **change, past_key_values=cache), expected)


@torch.no_grad()
def test_a_mask_that_does_not_fit_the_cached_text_is_refused():
    """Row E7: the call's own positions would see nothing, or be counted wrongly."""
    model = our_model()
    inputs = torch_batch(model.config)
    cache = model(**inputs, use_cache=True).past_key_values
    rows, length = inputs["input_ids"].shape
    token = inputs["input_ids"][:, -1:]
    longer = torch.ones(rows, length + 2, dtype=torch.long)
    for mask in (inputs["attention_mask"][:, :1], inputs["attention_mask"], longer):
        with pytest.raises(ValueError, match=f"attention_mask must cover the {length} cached positions and the 1 of"):
            model(input_ids=token, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == length
    mask = torch.cat((inputs["attention_mask"], torch.ones(rows, 1, dtype=torch.long)), dim=1)
    model(input_ids=token, attention_mask=mask, past_key_values=cache)
