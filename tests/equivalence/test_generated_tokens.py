"""Generated tokens of the two rooms, which have to be equal: over the configuration matrix, and in every mode.

PyTorch's are transformers' (tests/pt/test_generation.py). The Keras side runs without compiling where that changes
nothing but the time; compiled searches are held against it in tests/tf/test_generation.py, and a few of them here.
"""

import numpy as np
import pytest
import tensorflow as tf
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import logits_process

from idefics_pt.cache import recall_images
from idefics_tf import logits_processors
from tests.equivalence.pairs import model_pair, spoil, to_numpy, to_torch
from tests.models import MATRIX, batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
ENDS = [*range(40, 50), *range(60, 66)]
"""Enough ids that end a text for texts to end at different steps."""
ENDING = {**GREEDY, "max_new_tokens": 12, "eos_token_id": ENDS}

PAIR = {"seed": 2, "num_hidden_layers": 2}
"""Two layers are enough where the configuration is not the point; with this seed, texts differ and end at different
steps."""

RARELY_ENDING = {**ENDING, "eos_token_id": [5, 38, 46], "num_beams": 3, "length_penalty": 2.0}
"""With these, the three kinds of stopping early find different texts."""

SEARCHES = {
    "greedy": GREEDY,
    "beam": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
}
MODES = {
    "repetition_penalty": {**GREEDY, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "ngrams": {**GREEDY, "no_repeat_ngram_size": 2},
    "bad_words": {**GREEDY, "bad_words_ids": [[13], [68, 46], [38, 38], [0, 1, 2]], "no_repeat_ngram_size": 3},
    "ends": ENDING,
    "ends_not_before": {**ENDING, "min_new_tokens": 4, "bad_words_ids": [[40], [50]]},
    "max_length": {**GREEDY, "max_new_tokens": None, "max_length": 13, "min_length": 12, "eos_token_id": ENDS},
    "one_end_no_pad": {**GREEDY, "eos_token_id": 38, "pad_token_id": None},
    "beam_ends": {**ENDING, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam_ends_pad": {**ENDING, "num_beams": 2, "pad_token_id": 7, "length_penalty": -1.0, "min_new_tokens": 2},
    "beam_stops": RARELY_ENDING,
    "beam_stops_early": {**RARELY_ENDING, "early_stopping": True},
    "beam_never_stops_early": {**RARELY_ENDING, "early_stopping": "never"},
    "beam_rules": {**ENDING, "num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "uncached": {**GREEDY, "use_cache": False},
    "beam_uncached": {**ENDING, "num_beams": 3, "use_cache": False},
}


@pytest.fixture(scope="module")
def pair():
    return model_pair(**PAIR)


def assert_same_tokens(pair, inputs, compiled=False, **kwargs):
    pt, keras_model = pair
    expected = pt.generate(**to_torch(inputs), **kwargs).numpy()
    actual = keras_model.generate(inputs, **kwargs, disable_compile=not compiled).numpy()
    assert actual.dtype == np.int64
    assert np.array_equal(actual, expected), f"\n{actual}\n{expected}"
    return actual


@pytest.mark.parametrize("variant", MATRIX)
def test_tokens_over_the_matrix(variant, device):
    pt, keras_model = model_pair(device, **MATRIX[variant])
    inputs = batch(pt.config)
    for kwargs in SEARCHES.values():
        expected = pt.generate(**to_torch(inputs, device), **kwargs).cpu().numpy()
        assert np.array_equal(keras_model.generate(inputs, **kwargs, disable_compile=True), expected)


@pytest.mark.parametrize("mode", MODES)
def test_t4_every_mode(pair, mode):
    assert_same_tokens(pair, batch(pair[0].config), **MODES[mode])


@pytest.mark.parametrize("search", SEARCHES)
def test_t4_compiled(pair, search):
    assert_same_tokens(pair, batch(pair[0].config), compiled=True, **SEARCHES[search])


def test_texts_end_at_different_steps_and_stopping_matters(pair):
    """Else the modes with ends would show nothing."""
    ids = pair[1].generate(batch(pair[0].config), **ENDING, disable_compile=True).numpy()[:, 9:]
    assert len({tuple(np.isin(row, ENDS)) for row in ids}) > 1
    assert (ids == 0).any()
    stops = [
        pair[0].generate(**to_torch(batch(pair[0].config)), **RARELY_ENDING, early_stopping=kind).tolist()
        for kind in (False, True, "never")
    ]
    assert len(set(map(str, stops))) == 3


@pytest.mark.parametrize("search", SEARCHES)
def test_a_wrong_weight_would_be_noticed(search):
    pt, keras_model = model_pair(**PAIR)
    spoil(keras_model, "model.gated_cross_attn_layers.0.cross_attn.v_proj.weight")
    with pytest.raises(AssertionError):
        assert_same_tokens((pt, keras_model), batch(pt.config), **SEARCHES[search])


@pytest.mark.parametrize("search", SEARCHES)
def test_text_alone(pair, search):
    inputs = batch(pair[0].config)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_same_tokens(pair, text, **SEARCHES[search])
    # the processor's zero image, which nothing looks at
    dark = {name: np.zeros_like(inputs[name]) for name in ("pixel_values", "image_attention_mask")}
    assert_same_tokens(pair, {**text, **dark}, **SEARCHES[search])
    # padding that only the ids show
    assert_same_tokens(pair, {"input_ids": inputs["input_ids"]}, **SEARCHES[search])


@pytest.mark.parametrize("given", ["no_image_mask", "image_tokens", "features", "shared_images"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_images_given_in_other_ways(pair, given, use_cache):
    pt, keras_model = pair
    inputs = batch(pt.config)
    if given == "features":
        features = pt.encode_images(to_torch(inputs.pop("pixel_values"))).detach().numpy()
        inputs["perceiver_embeddings"] = features
    elif given == "shared_images":
        inputs["pixel_values"] = inputs["pixel_values"][:2]
    else:
        del inputs["image_attention_mask"]
        inputs["input_ids"][:, 2] = inputs["input_ids"][0, 5] = 98
    image_token = 98 if given == "image_tokens" else None
    pt.config.image_token_id = keras_model.config.image_token_id = image_token
    try:
        assert_same_tokens(pair, inputs, use_cache=use_cache, bad_words_ids=[[98]], **GREEDY)
    finally:
        pt.config.image_token_id = keras_model.config.image_token_id = None


@pytest.mark.parametrize("search", SEARCHES)
def test_embeddings_instead_of_ids(pair, search):
    pt, _ = pair
    inputs = batch(pt.config)
    ids = inputs.pop("input_ids")
    embeddings = pt.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy()
    new = assert_same_tokens(pair, {**inputs, "inputs_embeds": embeddings}, **SEARCHES[search])
    assert new.shape[1] == 6
    both = {**inputs, "inputs_embeds": embeddings, "input_ids": np.roll(ids, 1, axis=1)}
    assert_same_tokens(pair, both, **SEARCHES[search])
    limited = {**SEARCHES[search], "max_new_tokens": None, "max_length": 12}
    assert assert_same_tokens(pair, {**inputs, "inputs_embeds": embeddings}, **limited).shape[1] == 3


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_scores(pair, search):
    pt, keras_model = pair
    inputs = batch(pt.config)
    kwargs = {**ENDING, **({"num_beams": 3} if search == "beam" else {}), "no_repeat_ngram_size": 2}
    kwargs["repetition_penalty"] = 1.7  # of which padding has no part: no token shows it, but the scores do
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = pt.generate(**to_torch(inputs), **kwargs)
    actual = keras_model.generate(inputs, **kwargs, disable_compile=True)
    assert np.array_equal(actual.sequences, expected.sequences)
    assert len(actual.scores) == len(actual.logits) == len(expected.scores)
    for name in ("scores", "logits"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            ours, theirs = ours.numpy(), theirs.numpy()
            assert np.array_equal(np.isinf(ours), np.isinf(theirs))
            finite = np.isfinite(theirs)
            assert relative_error(ours[finite], theirs[finite]) < 2 * FLOAT32_ACTIVATIONS
    if search == "beam":
        assert np.array_equal(actual.beam_indices, expected.beam_indices)
        assert relative_error(actual.sequences_scores, to_numpy(expected.sequences_scores)) < FLOAT32_ACTIVATIONS


def test_a_conversation(pair):
    """Two turns about the same images, then one about another: each room goes on with its own cache."""
    pt, keras_model = pair
    text = batch(pt.config)
    pixels = text.pop("pixel_values")
    pt_cache, keras_cache = DynamicCache(config=pt.config), None
    for images in (pixels, None, pixels[:, 1:] + 1):
        kwargs = {**GREEDY, "return_dict_in_generate": True}
        given = {} if images is None else {"pixel_values": images}
        expected = pt.generate(**to_torch({**text, **given}), past_key_values=pt_cache, **kwargs)
        actual = keras_model.generate({**text, **given}, past_key_values=keras_cache, **kwargs, disable_compile=True)
        assert np.array_equal(actual.sequences, expected.sequences)
        pt_memory, keras_memory = recall_images(pt_cache), actual.past_key_values.image_memory
        for ours, theirs in zip(keras_memory.key_values, pt_memory.key_values, strict=True):
            assert relative_error(ours[0], to_numpy(theirs[0])) < FLOAT32_ACTIVATIONS
            assert relative_error(ours[1], to_numpy(theirs[1])) < FLOAT32_ACTIVATIONS
        keras_cache, asked = actual.past_key_values, np.full((4, 3), 11)
        text["input_ids"] = np.concatenate((expected.sequences.numpy(), asked), axis=1)
        text["attention_mask"] = np.pad(text["attention_mask"], ((0, 0), (0, 9)), constant_values=1)
        text["image_attention_mask"] = np.pad(text["image_attention_mask"], ((0, 0), (0, 9), (0, 0)), mode="edge")
        if images is None:
            text["image_attention_mask"] = np.pad(text["image_attention_mask"], ((0, 0), (0, 0), (0, 1)))
            text["image_attention_mask"][:, -2:] = (0, 0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_narrowing_is_that_of_transformers(seed):
    scores = np.random.default_rng(seed).normal(size=(5, 40)).astype(np.float32) * 3
    scores[0, 7] = scores[0, 9]
    for k in (1, 3, 60):
        expected = logits_process.TopKLogitsWarper(k)(None, torch.from_numpy(scores)).numpy()
        assert np.array_equal(logits_processors.top_k(tf.constant(scores), k), expected)
    for p, kept in ((0.3, 1), (0.9, 1), (0.01, 4)):
        warper = logits_process.TopPLogitsWarper(p, min_tokens_to_keep=kept)
        expected = warper(None, torch.from_numpy(scores)).numpy()
        assert np.array_equal(logits_processors.top_p(tf.constant(scores), p, kept), expected)
        assert (expected == -np.inf).any()


def test_saved_defaults_go_both_ways(tmp_path):
    pt, keras_model = model_pair(**PAIR)
    settings = {
        "max_new_tokens": 7,
        "num_beams": 2,
        "bad_words_ids": [[46]],
        "eos_token_id": [38, 5],
        "pad_token_id": 0,
    }
    pt.generation_config = GenerationConfig(**settings)
    pt.save_pretrained(tmp_path / "pt")
    again = type(keras_model).from_pretrained(tmp_path / "pt")
    assert_same_tokens((pt, again), batch(pt.config))
    again.generation_config.max_new_tokens = 5
    again.save_pretrained(tmp_path / "tf")
    back = type(pt).from_pretrained(tmp_path / "tf", attn_implementation="eager")
    assert back.generation_config.max_new_tokens == 5
    assert_same_tokens((back, again), batch(pt.config))


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")  # which is the point
def test_defaults_of_a_model_that_was_not_loaded(pair):
    pt, keras_model = pair
    assert keras_model.generation_config.to_dict() == pt.generation_config.to_dict()
    assert_same_tokens(pair, batch(pt.config))
