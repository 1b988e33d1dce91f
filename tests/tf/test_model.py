"""The Keras model's call: masks of any dtype, dynamic shapes, caches, text alone, options, and what is refused."""

import numpy as np
import pytest
import tensorflow as tf

from idefics_tf import TFIdeficsModel
from idefics_tf.cache import TFIdeficsCache
from tests.models import batch
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.fixture(scope="module")
def model():
    return tf_model()


@pytest.fixture
def inputs(model):
    return batch(model.config)


@pytest.fixture(scope="module")
def expected(model):
    return model(batch(model.config)).logits.numpy()


DTYPES = ["bool", "int8", "int32", "int64", "uint8", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_t3_masks_of_any_dtype_mean_the_same(model, inputs, expected, dtype):
    for name in ("attention_mask", "image_attention_mask"):
        inputs[name] = tf.cast(inputs[name], dtype)
    assert np.array_equal(model(inputs).logits, expected)


def test_t3_a_mask_is_not_ignored(model, inputs, expected):
    inputs["image_attention_mask"][:, -1, 0] ^= 1
    changed = np.abs(model(inputs).logits - expected).max(axis=-1) > 1e-3
    assert changed[:, -1].all()
    # padding attends to everything, and nothing attends to padding
    assert not changed[:, :-1][inputs["attention_mask"][:, :-1] == 1].any()


def test_t2_what_comes_before_an_image_does_not_depend_on_it(model, inputs, expected):
    inputs["pixel_values"][0, 1] += 1.0
    changed = np.abs(model(inputs).logits - expected).max(axis=-1) > 0
    assert changed[0, 5:].all()
    assert not changed[0, :5].any()
    assert not changed[1:].any()


SPECS = {
    "input_ids": tf.TensorSpec([None, None], tf.int32),
    "attention_mask": tf.TensorSpec([None, None], tf.int32),
    "pixel_values": tf.TensorSpec([None, None, 3, 28, 28], tf.float32),
    "image_attention_mask": tf.TensorSpec([None, None, None], tf.int32),
}


def test_t8_dynamic_shapes_and_one_trace(model, inputs, expected):
    @tf.function(input_signature=[SPECS])
    def function(batch):
        return model(batch, output_attentions=True, use_cache=True)

    inputs = {name: tf.cast(value, SPECS[name].dtype) for name, value in inputs.items()}
    assert relative_error(function(inputs).logits, expected) < FLOAT32_ACTIVATIONS
    shorter = {name: value[1:4] for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask", "image_attention_mask"):
        shorter[name] = shorter[name][:, :7]
    cases = [shorter, {**shorter, "image_attention_mask": tf.zeros_like(shorter["image_attention_mask"])}]
    one_image = {**shorter, "pixel_values": shorter["pixel_values"][:, :1]}
    cases.append({**one_image, "image_attention_mask": shorter["image_attention_mask"][:, :, :1]})
    for case in cases:
        assert relative_error(function(case).logits, model(case).logits) < FLOAT32_ACTIVATIONS
    assert function.experimental_get_tracing_count() == 1


def test_a_cached_step_in_a_graph(model, inputs, expected):
    """Cache and length unknown to the graph, images only in the cache."""
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_attention_mask")}
    start = {name: value[:, :6] for name, value in text.items()}
    start["image_attention_mask"] = text["image_attention_mask"]
    cache = model({**inputs, **start}, use_cache=True).past_key_values

    @tf.function
    def step(ids, mask, image_mask, cache):
        return model(
            input_ids=ids,
            attention_mask=mask,
            image_attention_mask=image_mask,
            past_key_values=cache,
            use_cache=True,
        )

    ids = tf.TensorSpec([None, None], tf.int64)
    concrete = step.get_concrete_function(ids, ids, tf.TensorSpec([None, None, None], tf.int64), cache.spec())
    for i in range(6, 9):
        arguments = (inputs["input_ids"][:, i : i + 1], inputs["attention_mask"][:, : i + 1])
        output = concrete(*map(tf.constant, arguments), tf.constant(inputs["image_attention_mask"][:, : i + 1]), cache)
        cache = output.past_key_values
        assert isinstance(cache, TFIdeficsCache)
        assert relative_error(output.logits[:, 0], expected[:, i]) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("chunks", [[4, 5], [1, 1, 7], [8, 1]])
def test_t11_cached_steps_need_no_position_ids(model, inputs, expected, chunks):
    cache, done = None, 0
    for length in chunks:
        call = {
            "input_ids": inputs["input_ids"][:, done : done + length],
            "attention_mask": inputs["attention_mask"][:, : done + length],
            "image_attention_mask": inputs["image_attention_mask"],
        }
        if cache is None:
            call["pixel_values"] = inputs["pixel_values"]
        output = model(call, past_key_values=cache, use_cache=True)
        kept = inputs["attention_mask"][:, done : done + length] == 1
        error = relative_error(output.logits.numpy()[kept], expected[:, done : done + length][kept])
        assert error < FLOAT32_ACTIVATIONS
        cache, done = output.past_key_values, done + length
    assert int(cache.get_seq_length()) == 9


def test_image_keys_and_values_are_made_once(model, inputs):
    first = model({**inputs, "input_ids": inputs["input_ids"]}, use_cache=True).past_key_values
    mask = np.concatenate((inputs["attention_mask"], np.ones((4, 1), dtype=int)), axis=1)
    second = model(input_ids=inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=first, use_cache=True)
    for before, after in zip(
        first.image_memory.key_values, second.past_key_values.image_memory.key_values, strict=True
    ):
        assert np.array_equal(before[0], after[0])
        assert np.array_equal(before[1], after[1])


def test_new_images_after_a_cache(model, inputs, expected):
    """A second image that comes with a later call is seen from there on as if it had been there all along."""
    start = {name: value[:, :5] for name, value in inputs.items()}
    start |= {"pixel_values": inputs["pixel_values"][:, :1], "image_attention_mask": inputs["image_attention_mask"]}
    start["image_attention_mask"] = start["image_attention_mask"][:, :, :1]
    cache = model(start, use_cache=True).past_key_values
    output = model(
        input_ids=inputs["input_ids"][:, 5:],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"][:, 1:],
        image_attention_mask=inputs["image_attention_mask"],
        past_key_values=cache,
    )
    assert relative_error(output.logits, expected[:, 5:]) < FLOAT32_ACTIVATIONS


def test_t10_text_alone_runs_no_image_module(model, inputs, expected, monkeypatch):
    monkeypatch.setattr(model.model.vision_model, "call", None)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert relative_error(model(text).logits[1], expected[1]) < FLOAT32_ACTIVATIONS
    unseen = {**inputs, "image_attention_mask": np.zeros_like(inputs["image_attention_mask"])}
    assert np.array_equal(model(unseen).logits, model(text).logits)


def test_only_images_that_are_seen_are_encoded(model, inputs):
    output = model(inputs, output_attentions=True)
    seen = inputs["image_attention_mask"].any(axis=1)
    assert len(output.vision_attentions[0]) == seen.sum() == 5
    assert np.array_equal(output.image_hidden_states.numpy().any(axis=(2, 3)), seen)


def test_all_inputs_as_one_dict_or_by_keyword_or_embedded(model, inputs, expected):
    assert np.array_equal(model(**inputs).logits, expected)
    assert np.array_equal(model({**inputs, "use_cache": False}).logits, expected)
    embeds = model.model.embed_tokens(inputs.pop("input_ids"))
    assert np.array_equal(model(inputs_embeds=embeds, **inputs).logits, expected)


def test_outputs_as_tuple_and_by_name(model, inputs):
    kwargs = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
    inputs["labels"] = inputs["input_ids"]
    named, plain = model(inputs, **kwargs), model(inputs, **kwargs, return_dict=False)
    assert named.keys()[:6] == (
        "loss", "logits", "past_key_values", "hidden_states", "attentions", "image_hidden_states"
    )  # fmt: skip
    assert type(plain) is tuple
    assert np.array_equal(plain[1], named["logits"])
    assert len(named.hidden_states) == 5
    assert model(inputs).attentions is None
    with pytest.raises(AttributeError, match="has no field 'logit'"):
        named.logit  # noqa: B018


@pytest.mark.parametrize(("which", "kept"), [(0, {0}), (-1, {4}), ([1, -2, 9], {1, 3})])
def test_hidden_states_can_be_chosen(model, inputs, which, kept):
    every, chosen = (model(inputs, output_hidden_states=asked).hidden_states for asked in (True, which))
    assert {i for i, state in enumerate(chosen) if state is not None} == kept
    assert all(np.array_equal(chosen[i], every[i]) for i in kept)


def test_the_base_model_is_the_inner_model(model, inputs):
    base = tf_model(model_class=TFIdeficsModel)
    expected = model(inputs, output_hidden_states=True).hidden_states[-1]
    assert np.array_equal(base(inputs).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_embeds": np.zeros((4, 9, 24), "float32")}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": np.full((4, 9), 100)}, r"must lie in \[0, 100\): vocab_size 97 plus additional_vocab_size 3"),
        ({"perceiver_embeddings": np.zeros((4, 2, 6, 20), "float32")}, "pixel_values and perceiver_embeddings"),
        ({"pixel_values": np.zeros((4, 2, 3, 56, 56), "float32")}, "56 x 56 pixels .*`interpolate_pos_encoding=True`"),
        ({"pixel_values": np.zeros((4, 2, 1, 28, 28), "float32")}, "must have 3 channels, got 1"),
        ({"pixel_values": np.zeros((3, 2, 3, 28, 28), "float32")}, "divides the 4 rows of text"),
        ({"pixel_values": None}, "lets text attend to images, but there are none"),
        ({"image_attention_mask": np.ones((4, 9, 3), int)}, "covers 3 images per row, but there are 2"),
        ({"image_attention_mask": np.ones((3, 9, 2), int)}, "with batch 4"),
        ({"attention_mask": np.ones((4, 8), int)}, r"attention_mask must have shape \(4, 9\), got \(4, 8\)"),
        ({"attention_mask": np.ones((4, 1, 9, 9), int)}, r"attention_mask must have 2 axes, got shape \(4, 1, 9, 9\)"),
        ({"input_ids": np.ones(9, int)}, r"input_ids must have shape \(batch, text_len\) .*got \(9,\)"),
        ({"input_ids": np.ones((4, 0), int)}, r"hold something, got \(4, 0\)"),
        (
            {"pixel_values": None, "perceiver_embeddings": np.ones((4, 2, 6, 19), "float32")},
            "perceiver_embeddings must have the vision tower's width 20, got 19",
        ),
        ({"labels": np.full((4, 9), 100)}, r"labels must be -100 or lie in \[0, 100\), got 100 to 100"),
        ({"labels": np.full((4, 9), -1)}, r"labels must be -100 or lie in \[0, 100\), got -1 to -1"),
        ({"labels": np.ones((4, 8), int)}, r"labels must have shape \(4, 9\).*got \(4, 8\)"),
    ],
)
def test_contradictions_are_refused(model, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        model({**inputs, **change})
