"""Beams and samples of a prompt read it once: the same tokens and scores as with a row for each of them."""

import contextlib

import pytest
import torch
from transformers import DynamicCache, StaticCache

from idefics_pt import generation
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.pt.test_generation import GREEDY, counted_calls, image_work
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

ROWS, BEAMS = 4, 3
SEARCHES = {
    "beams": {"num_beams": BEAMS},
    "several beams returned": {"num_beams": BEAMS, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams that sample": {"num_beams": BEAMS, "do_sample": True, "top_k": 20},
    "samples": {"do_sample": True, "num_return_sequences": BEAMS, "top_p": 0.9},
}
OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}


def _emptied(cache, model, inputs):
    """A cache with a row for each beam that has been used and emptied."""
    model.generate(**inputs, **GREEDY, num_beams=BEAMS, past_key_values=cache)
    cache.reset()
    return cache


# what else may be given with a search, by name: from model and inputs to arguments
CALLS = {
    "nothing else": lambda model, inputs: {},
    "no cache": lambda model, inputs: {"use_cache": False},
    "a static cache": lambda model, inputs: {"cache_implementation": "static"},
    "a dynamic cache of the caller": lambda model, inputs: {"past_key_values": DynamicCache(config=model.config)},
    "a static cache of the caller": lambda model, inputs: {
        "past_key_values": StaticCache(config=model.config, max_cache_len=30)
    },
    "an emptied dynamic cache": lambda model, inputs: {
        "past_key_values": _emptied(DynamicCache(config=model.config), model, inputs)
    },
    "an emptied static cache": lambda model, inputs: {
        "past_key_values": _emptied(StaticCache(config=model.config, max_cache_len=30), model, inputs)
    },
    "embeddings of text": lambda model, inputs: {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "input_ids": None,
    },
    "features of images": lambda model, inputs: {
        "perceiver_embeddings": model.encode_images(inputs["pixel_values"]),
        "pixel_values": None,
    },
    "no images": lambda model, inputs: {"pixel_values": None, "image_attention_mask": None},
    "no masks": lambda model, inputs: {"attention_mask": None, "image_attention_mask": None},
    "chunks": lambda model, inputs: {"prefill_chunk_size": 4},
    "one prompt": lambda model, inputs: {name: value[:1] for name, value in inputs.items()},
}


@contextlib.contextmanager
def rows_read(model):
    """Rows of text and positions of each forward pass while the context lasts."""
    shapes = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    yield shapes
    hook.remove()


def expanded(prefill, input_ids, generation_config, model_kwargs, shared, *args, **kwargs):
    """Transformers' own way, with a row for each beam from the first pass on."""
    return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


def assert_equal_outputs(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    assert actual.keys() == expected.keys()
    pairs = [(actual.scores, expected.scores), (actual.logits, expected.logits)]
    pairs += zip(actual.get("hidden_states", ()), expected.get("hidden_states", ()), strict=True)
    for ours, theirs in pairs:
        for x, y in zip(ours, theirs, strict=True):
            finite = torch.isfinite(y)
            assert torch.equal(torch.isfinite(x), finite)
            assert relative_error(x[finite], y[finite]) < FLOAT32_ACTIVATIONS
    if "sequences_scores" in expected:
        assert relative_error(actual.sequences_scores, expected.sequences_scores) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("search", SEARCHES)
@torch.no_grad()
def test_a_prompt_is_read_once_with_the_same_outcome(search, call, monkeypatch):
    model = our_model()
    inputs = torch_batch(model.config)

    def generate():
        given = {**inputs, **CALLS[call](model, inputs)}
        torch.manual_seed(0)
        with rows_read(model) as shapes, counted_calls(**image_work(model)) as counts:
            outputs = model.generate(**given, **{**GREEDY, **SEARCHES[search], **OUTPUTS})
        assert counts["vision tower"] <= 1
        return outputs, shapes

    outputs, shapes = generate()
    prompts = 1 if call == "one prompt" else ROWS
    length = inputs["input_ids"].shape[1]
    assert shapes[0] == (prompts, 4 if call == "chunks" else length)
    monkeypatch.setattr(generation, "read_prompts_once", expanded)
    expected, expanded_shapes = generate()
    assert expanded_shapes[0][0] == BEAMS * prompts  # otherwise nothing is compared
    assert expanded_shapes[-1] == shapes[-1]
    assert_equal_outputs(outputs, expected)


@pytest.mark.parametrize("search", SEARCHES)
def test_scores_are_those_of_transformers(search):
    ours, reference = our_model(), reference_model()
    inputs = torch_batch(ours.config)
    outcomes = []
    for model in (ours, reference):
        torch.manual_seed(0)
        options = {**OUTPUTS, "output_hidden_states": False}
        outcomes.append(model.generate(**inputs, **{**GREEDY, **SEARCHES[search], **options}))
    actual, expected = outcomes
    assert_equal_outputs(actual, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_attention_weights_have_a_row_for_each_beam(cache):
    ours, reference = our_model(attention="eager"), reference_model(attention="eager")
    inputs = torch_batch(ours.config)
    kwargs = {"num_beams": BEAMS, "output_attentions": True, "return_dict_in_generate": True, **GREEDY}
    if cache == "static":
        kwargs["cache_implementation"] = "static"
    steps = zip(
        ours.generate(**inputs, **kwargs).attentions, reference.generate(**inputs, **kwargs).attentions, strict=True
    )
    real = inputs["attention_mask"].repeat_interleave(BEAMS, dim=0).bool()
    for number, (actual, expected) in enumerate(steps):
        for x, y in zip(actual, expected, strict=True):
            assert x.shape == y.shape
            if number == 0:  # what padding attends to is nobody's business
                x, y = x.transpose(1, 2)[real], y.transpose(1, 2)[real]
            assert relative_error(x, y) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("search", SEARCHES)
def test_a_warm_cache_has_a_row_for_each_beam_and_goes_on(search):
    model = our_model()
    inputs = torch_batch(model.config)
    cache = DynamicCache(config=model.config)
    split = 5
    head = {name: inputs[name][:, :split] for name in ("input_ids", "attention_mask", "image_attention_mask")}
    with torch.no_grad():
        model(**head, pixel_values=inputs["pixel_values"], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"text of 4 rows, expected 12.*batch_repeat_interleave"):
        model.generate(**inputs, **{**GREEDY, **SEARCHES[search]}, past_key_values=cache)
    cache.batch_repeat_interleave(BEAMS)
    torch.manual_seed(0)
    actual = model.generate(**inputs, **{**GREEDY, **SEARCHES[search]}, past_key_values=cache)
    torch.manual_seed(0)
    assert torch.equal(actual, model.generate(**inputs, **{**GREEDY, **SEARCHES[search]}))


def test_rows_that_others_changed_are_all_read():
    """A search of someone else's may give beams prompts of their own before the first pass."""
    model = our_model()
    inputs = torch_batch(model.config)
    seen = []

    def search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        input_ids[1::BEAMS, -1] = 7
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        seen.append(outputs.logits[:, -1])
        return input_ids

    ids = model.generate(**inputs, custom_generate=search, num_beams=BEAMS, **GREEDY)
    rest = {name: value.repeat_interleave(BEAMS, dim=0) for name, value in inputs.items()}
    with torch.no_grad():
        expected = model(**{**rest, "input_ids": ids}).logits[:, -1]
    assert relative_error(seen[0], expected) < FLOAT32_ACTIVATIONS
