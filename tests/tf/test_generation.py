"""`generate` of the Keras room: compiled once a bucket, images looked at once, sampling, streaming.

That its tokens are PyTorch's is tests/equivalence/test_generated_tokens.py.
"""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from transformers import GenerationConfig

from idefics_tf import generation
from idefics_tf.generation import bucket
from tests.models import batch
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
BEAMS = {**GREEDY, "num_beams": 3}
EAGER = {"disable_compile": True}
SAMPLING = {**GREEDY, **EAGER, "do_sample": True, "num_return_sequences": 3}
SEEDED = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "seed": 3}
ENDING = {**GREEDY, "max_new_tokens": 12, "eos_token_id": [*range(40, 50), *range(60, 66)]}
RULES = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[13], [68, 46], [0, 1, 2]]}
MODES = {
    "rules": {**ENDING, **RULES, "min_new_tokens": 3, "output_scores": True, "output_logits": True},
    "sampling": {**SEEDED, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "uncached": {**GREEDY, "use_cache": False},
    "beams": {**ENDING, "num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "output_scores": True},
}


@pytest.fixture(scope="module")
def model():
    return tf_model(seed=2, num_hidden_layers=2)


@pytest.fixture
def inputs(model):
    return batch(model.config)


@contextlib.contextmanager
def counted_calls(**owners):
    """How often a method of an object is called while the context lasts: name=(object, method)."""
    counts = dict.fromkeys(owners, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, (owner, method) in owners.items():
            patch.setattr(owner, method, _counting(counts, name, getattr(owner, method)))
        yield counts


def _counting(counts, name, function):
    def count(*args, **kwargs):
        counts[name] += 1
        return function(*args, **kwargs)

    return count


def image_work(model):
    block = model.model.gated_cross_attn_layers[0].cross_attn
    return {
        "vision tower": (model.model.vision_model, "call"),
        "resampler": (model.model.perceiver_resampler, "call"),
        "image keys": (block, "project_images"),
    }


def assert_same_outputs(actual, expected):
    """The same ids, and whatever else of ids, scores and logits there is within the bound."""
    assert actual.keys() == expected.keys()
    for name in {"sequences", "beam_indices"} & set(expected.keys()):
        assert np.array_equal(actual[name], expected[name]), name
    for name in {"scores", "logits", "sequences_scores"} & set(expected.keys()):
        ours, theirs = np.array(actual[name]), np.array(expected[name])
        finite = np.isfinite(theirs)
        assert np.array_equal(np.isfinite(ours), finite), name
        assert relative_error(ours[finite], theirs[finite]) < FLOAT32_ACTIVATIONS, name


def test_t15_one_trace_for_all_lengths_and_sizes_of_a_bucket(model, inputs):
    with counted_calls(traces=(model, "_search")) as counts:
        whole = model.generate(inputs, **GREEDY)
        short = {name: value[1:, 2:] if name != "pixel_values" else value[1:] for name, value in inputs.items()}
        short["pixel_values"], short["image_attention_mask"] = (
            short["pixel_values"][:, :1],
            short["image_attention_mask"][:, :, :1],
        )
        for call in (short, {**short, "input_ids": short["input_ids"].astype(np.int32)}):
            tokens = model.generate(call, **{**GREEDY, "max_new_tokens": 9})
            assert np.array_equal(tokens, model.generate(call, **{**GREEDY, "max_new_tokens": 9}, **EAGER))
            assert tokens.dtype == call["input_ids"].dtype
            counts["traces"] -= 1  # the eager one
        assert counts["traces"] == 1
        longer = model.generate(inputs, **{**GREEDY, "max_new_tokens": bucket(1) - 8})
        assert np.array_equal(longer[:, : whole.shape[1]], whole)
        assert counts["traces"] == 2


def test_graphs_of_a_changed_model_are_forgotten():
    changing = tf_model(num_hidden_layers=2)

    def graphs():
        return changing.generation_graphs.on([variable.value for variable in changing.weights])

    graphs()["a key"] = "a graph"
    changing.weights[0].assign(changing.weights[0] + 1.0)
    assert list(graphs()) == ["a key"]
    changing.resize_token_embeddings(110)
    assert not graphs()


def test_buckets():
    assert [bucket(length) for length in (1, 64, 65, 128, 129, 1000)] == [64, 64, 128, 128, 256, 1024]


@pytest.mark.parametrize("search", [GREEDY, BEAMS])
def test_t4_within_a_function_of_the_user(model, inputs, search):
    expected = model.generate(inputs, **search, **EAGER)
    specs = {name: tf.TensorSpec([None] * 2 + list(value.shape[2:]), value.dtype) for name, value in inputs.items()}
    specs["image_attention_mask"] = tf.TensorSpec([None, None, None], tf.int64)

    @tf.function(input_signature=[specs])
    def function(inputs):
        return model.generate(**inputs, **search)

    assert np.array_equal(function(inputs), expected)
    assert np.array_equal(function({name: value[2:] for name, value in inputs.items()}), expected[2:])


@pytest.mark.parametrize("search", [GREEDY, BEAMS])
def test_xla(model, inputs, search):
    assert np.array_equal(model.generate(inputs, **search, jit_compile=True), model.generate(inputs, **search, **EAGER))


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_search_is_the_eager_one_in_every_mode(model, inputs, mode):
    kwargs = {**MODES[mode], "return_dict_in_generate": True}
    compiled, eager = (model.generate(inputs, **kwargs, **compiling) for compiling in ({}, EAGER))
    assert_same_outputs(compiled, eager)
    ids = eager.sequences.numpy()[:, 9:]
    if mode == "sampling":
        assert not np.array_equal(ids[::2], ids[1::2])
    if "output_scores" in kwargs:
        assert len(eager.scores) == ids.shape[1] > 3
        assert len(set(np.isin(ids, ENDING["eos_token_id"]).argmax(axis=1))) > 1  # texts end at different steps
    if mode == "rules":
        assert np.isneginf(eager.scores[0]).sum() >= 17 * len(ids)  # all ends and the one word


def test_images_that_all_of_the_text_sees(model, inputs):
    everything = {**inputs, "image_attention_mask": np.ones_like(inputs["image_attention_mask"])}
    with_scores = {**MODES["rules"], "return_dict_in_generate": True}
    compiled, eager = (model.generate(everything, **with_scores, **compiling) for compiling in ({}, EAGER))
    assert_same_outputs(compiled, eager)
    assert relative_error(eager.logits[0], model(everything).logits[:, -1]) < FLOAT32_ACTIVATIONS
    unmasked = {name: value for name, value in inputs.items() if name != "image_attention_mask"}
    assert np.array_equal(model.generate(unmasked, **with_scores).sequences, compiled.sequences)


def test_text_alone_as_documented(model, inputs):
    ids = inputs["input_ids"][:1]
    with counted_calls(**image_work(model)) as counts:
        tokens = model.generate(ids, max_length=30)
        assert tokens.shape[1] <= 30
        assert np.array_equal(tokens[:, :9], ids)
        assert np.array_equal(tokens, model.generate(ids, max_length=30, use_cache=False, **EAGER))
    assert not any(counts.values())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("search", [GREEDY, BEAMS])
def test_images_are_encoded_once(model, inputs, search, use_cache):
    with counted_calls(**image_work(model)) as counts:
        model.generate(inputs, **search, **EAGER, use_cache=use_cache)
    assert counts["vision tower"] == counts["resampler"] == 1
    assert counts["image keys"] == (1 if use_cache else 6)


def test_samples_share_image_keys_and_see_their_own_images(model, inputs):
    kwargs = {**SAMPLING, "seed": 3}
    outputs = model.generate(inputs, **kwargs, return_dict_in_generate=True)
    memory = outputs.past_key_values.image_memory
    assert outputs.past_key_values.layers[0].key.shape[0] == 12
    assert {key.shape[0] for key, _ in memory.key_values} == {4}
    alone = {name: np.repeat(value, 3, axis=0) for name, value in inputs.items()}
    assert np.array_equal(model.generate(alone, **{**kwargs, "num_return_sequences": 1}), outputs.sequences)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}])
def test_t4_sampling_follows_its_seed(model, inputs, beams):
    kwargs = {**SAMPLING, **beams}

    def sample(seed=None):
        return model.generate(inputs, **kwargs, seed=seed).numpy()

    assert sample(1).shape == (12, 15)
    assert np.array_equal(sample(1), sample(1))
    assert not np.array_equal(sample(1), sample(2))
    tf.random.set_seed(5)
    first, second = sample(), sample()
    assert not np.array_equal(first, second)
    tf.random.set_seed(5)
    assert np.array_equal(sample(), first)


def test_sampling_is_narrowed_and_follows_the_probabilities(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}
    kwargs = {**SAMPLING, "max_new_tokens": 1, "num_return_sequences": 400, "temperature": 1.5, "top_k": 4, "seed": 0}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_p": 1.0}
    outputs = model.generate(row, **kwargs)
    scores, logits = outputs.scores[0][0].numpy(), outputs.logits[0][0].numpy()
    kept = np.argsort(-logits)[:4]
    assert np.array_equal(np.flatnonzero(np.isfinite(scores)), np.sort(kept))
    assert np.allclose(scores[kept], logits[kept] / 1.5)
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    counts = np.bincount(outputs.sequences[:, -1], minlength=len(scores)) / 400
    assert np.abs(counts - probabilities).max() < 0.1


class _Collected:
    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(np.array(value))

    def end(self):
        self.pieces.append(None)


@pytest.mark.parametrize("compiling", [{}, EAGER])
def test_a_streamer_gets_the_prompt_and_then_every_token(model, inputs, compiling):
    streamer = _Collected()
    tokens = model.generate(inputs, **GREEDY, **compiling, streamer=streamer).numpy()
    prompt, *steps, end = streamer.pieces
    assert end is None
    assert np.array_equal(prompt, inputs["input_ids"])
    assert np.array_equal(np.stack(steps, axis=1), tokens[:, 9:])
    assert not generation._streamers
    if not compiling:
        other = _Collected()
        model.generate(inputs, **GREEDY, streamer=other)  # the same graph, another streamer
        assert len(other.pieces) == len(streamer.pieces) == 8


def test_generation_config_is_saved_with_a_keras_file(tmp_path):
    model = tf_model(num_hidden_layers=2)
    model.generation_config = GenerationConfig(max_new_tokens=3, bad_words_ids=[[5]], eos_token_id=[7, 9])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.generation_config == model.generation_config
    assert again.generation_config.eos_token_id == [7, 9]


def test_half_precision_and_larger_images(inputs):
    model = tf_model(num_hidden_layers=2, dtype="bfloat16")
    for search in (GREEDY, BEAMS):
        assert model.generate(inputs, **search, **EAGER).shape == (4, 15)
    large = batch(model.config, image_size=56)
    kwargs = {**GREEDY, **EAGER, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    outputs = model.generate(large, interpolate_pos_encoding=True, **kwargs)
    expected = model(large, interpolate_pos_encoding=True).logits[:, -1]
    assert relative_error(outputs.logits[0], tf.cast(expected, tf.float32)) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_beam": 2}, TypeError, "unexpected keyword arguments: num_beam"),
        ({"penalty_alpha": 0.5}, ValueError, r"cannot generate with penalty_alpha=0.5"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
        ({"num_return_sequences": 3, "num_beams": 2}, ValueError, "num_return_sequences"),
        ({"max_new_tokens": None, "max_length": 9}, ValueError, "9 tokens long and max_length is 9"),
        ({"bad_words_ids": [[100]]}, ValueError, r"list of lists of ids in \[0, 100\), got \[\[100\]\]"),
        ({"input_ids": np.full((4, 9), 100)}, ValueError, r"must lie in \[0, 100\)"),
        ({"input_ids": np.zeros(9, int)}, ValueError, r"must have shape \(batch, text_len\) .* got \(9,\)"),
        ({"attention_mask": np.ones((4, 8))}, ValueError, r"must have shape \(4, 9\), got \(4, 8\)"),
        ({"input_ids": None}, ValueError, "needs input_ids or inputs_embeds"),
        ({"pixel_values": None}, ValueError, "there are none: give pixel_values"),
        ({"image_attention_mask": np.ones((4, 9, 3))}, ValueError, "covers 3 images per row, but there are 2"),
        ({"pixel_values": np.ones((3, 2, 3, 28, 28))}, ValueError, "divides the 4 rows of text"),
        ({"perceiver_embeddings": np.ones((4, 2, 6, 20))}, ValueError, "pixel_values and perceiver_embeddings"),
        ({"streamer": _Collected(), "num_beams": 2}, ValueError, "A streamer needs num_beams=1"),
        ({"jit_compile": True, "use_cache": False}, ValueError, "jit_compile needs use_cache=True"),
    ],
)
def test_what_cannot_be_done_is_refused(model, inputs, change, error, message):
    with pytest.raises(error, match=message):
        model.generate(**{**inputs, **GREEDY, **change})
