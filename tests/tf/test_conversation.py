"""Images encoded once and used again: given as features, remembered by a cache over a conversation, shared by beams.

That the tokens are PyTorch's is tests/equivalence/test_generated_tokens.py.
"""

import numpy as np
import pytest
import tensorflow as tf

from idefics_tf.decoding import CachedDecoder
from tests.models import batch
from tests.tf.random_models import tf_model
from tests.tf.test_generation import EAGER, GREEDY, SAMPLING, counted_calls, image_work


@pytest.fixture(scope="module")
def model():
    return tf_model(seed=2, num_hidden_layers=2)


@pytest.fixture
def inputs(model):
    return batch(model.config)


def following(tokens, inputs, new_images=0):
    """The conversation with four more tokens, and masks over all of it; if an image is added, the last two see it."""
    ids = np.concatenate((tokens, np.random.default_rng(tokens.shape[1]).integers(3, 90, (len(tokens), 4))), axis=1)
    missing = ids.shape[1] - inputs["attention_mask"].shape[1]
    image_mask = np.pad(inputs["image_attention_mask"], ((0, 0), (0, missing), (0, 0)), mode="edge")
    if new_images:
        image_mask = np.pad(image_mask, ((0, 0), (0, 0), (0, new_images)))
        image_mask[:, -2:] = np.eye(image_mask.shape[2], dtype=int)[-1]
    attention_mask = np.pad(inputs["attention_mask"], ((0, 0), (0, missing)), constant_values=1)
    return {"input_ids": ids, "attention_mask": attention_mask, "image_attention_mask": image_mask}


def recorded_sizes(patch, owner, axis):
    """The list to which every call of a layer from now on adds the size of its first argument along an axis."""
    sizes, call = [], owner.call

    def record(tensor, *args, **kwargs):
        sizes.append(tensor.shape[axis])
        return call(tensor, *args, **kwargs)

    patch.setattr(owner, "call", record)
    return sizes


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("use_resampler", [True, False])
def test_d10_generation_from_image_features(use_resampler, use_cache):
    model = tf_model(num_hidden_layers=2, use_resampler=use_resampler)
    inputs = batch(model.config)
    kwargs = {**GREEDY, **EAGER, "max_new_tokens": 3}
    expected = model.generate(inputs, **kwargs)
    pixels = inputs.pop("pixel_values")
    features = model.encode_images(pixels, inputs["image_attention_mask"])
    form = "perceiver_embeddings" if use_resampler else "image_encoder_embeddings"
    with counted_calls(vision=(model.model.vision_model, "call")) as counts:
        assert np.array_equal(model.generate({**inputs, form: features}, use_cache=use_cache, **kwargs), expected)
    assert counts["vision"] == 0


def test_a_conversation_does_no_image_work_twice(model, inputs, monkeypatch):
    """Every turn against a cold start on the whole text; and each reads only what is new."""
    turn = {**GREEDY, **EAGER, "return_dict_in_generate": True}
    tensors = {**inputs, "pixel_values": tf.constant(inputs["pixel_values"])}
    first = model.generate(tensors, **turn)
    assert first.past_key_values.get_seq_length() == 14
    second = following(first.sequences, inputs)
    pixels = tensors["pixel_values"]
    expected = model.generate(second, pixel_values=pixels, **GREEDY, **EAGER)
    warm = {**second, "past_key_values": first.past_key_values}
    with counted_calls(**image_work(model)) as counts:
        with monkeypatch.context() as patch:
            read = recorded_sizes(patch, model.model.embed_tokens, axis=1)
            answer = model.generate(warm, **turn)
        assert read == [19 - 14, 1, 1, 1, 1, 1]
        assert np.array_equal(answer.sequences, expected)
        # a caller of transformers' model gives the images again; they are known, and cost nothing
        assert np.array_equal(model.generate(warm, pixel_values=pixels, **GREEDY, **EAGER), expected)
        # a mask over the first turn goes on as it ends, and so does none at all
        warm["image_attention_mask"] = inputs["image_attention_mask"]
        assert np.array_equal(model.generate(warm, **GREEDY, **EAGER), expected)
        del warm["image_attention_mask"]
        assert np.array_equal(model.generate(warm, **GREEDY, **EAGER), expected)
    assert not any(counts.values())

    third = following(answer.sequences, second, new_images=1)
    new = np.random.default_rng(4).standard_normal((4, 1, 3, 28, 28)).astype(np.float32)
    expected = model.generate(third, pixel_values=np.concatenate((pixels, new), axis=1), **GREEDY, **EAGER)
    warm = {**third, "past_key_values": answer.past_key_values}
    with counted_calls(**image_work(model)) as counts, monkeypatch.context() as patch:
        encoded = recorded_sizes(patch, model.model.vision_model, axis=0)
        assert np.array_equal(model.generate(warm, pixel_values=new, **GREEDY, **EAGER), expected)
    assert set(counts.values()) == {1}
    assert encoded == [4]
    with pytest.raises(ValueError, match="covers 3 images per row, but there are 4: 2 that the cache has seen and 2"):
        model.generate(warm, pixel_values=pixels, **GREEDY, **EAGER)
    # all images given again: they take the place of those of the cache
    whole = np.concatenate((pixels, new), axis=1)
    assert np.array_equal(model.generate(warm, pixel_values=whole, **GREEDY, **EAGER), expected)


def test_t15_turns_of_a_conversation_share_their_graphs(model, inputs):
    turn = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True}
    pixels = inputs["pixel_values"]
    said = model.generate(inputs, **turn, **EAGER)
    text, traces = inputs, []
    for new_images in (0, 1, 0, 1):
        text = following(said.sequences, text, new_images)
        new = np.random.default_rng(len(traces)).standard_normal((4, new_images, 3, 28, 28)).astype(np.float32)
        pixels = np.concatenate((pixels, new), axis=1)
        given = {"pixel_values": new} if new_images else {}
        with counted_calls(traces=(model, "_search")) as counts:
            said = model.generate(text, past_key_values=said.past_key_values, **given, **turn)
        traces.append(counts["traces"])
        assert np.array_equal(said.sequences, model.generate(text, pixel_values=pixels, **{**turn, **EAGER}).sequences)
    assert traces == [1, 1, 0, 0]


@pytest.mark.parametrize("compiling", [{}, EAGER])
def test_an_image_that_was_not_encoded_is_encoded_when_it_is_asked_for(compiling, model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}
    row["image_attention_mask"][..., 1] = 0
    said = model.generate(row, **GREEDY, **EAGER, return_dict_in_generate=True)
    text = following(said.sequences, row)
    text["image_attention_mask"][:, -2:] = (0, 1)
    expected = model.generate(text, pixel_values=row["pixel_values"], **GREEDY, **EAGER)
    text["past_key_values"] = said.past_key_values
    with pytest.raises(ValueError, match="so they were not encoded; give all images again"):
        model.generate(text, **GREEDY, **compiling)
    text["image_attention_mask"] = text["image_attention_mask"][:, -5:]  # of the tokens that this call reads
    kwargs = {**GREEDY, **compiling, "return_dict_in_generate": True}
    actual = model.generate(text, pixel_values=row["pixel_values"], **kwargs)
    assert np.array_equal(actual.sequences, expected)
    assert actual.past_key_values.image_memory.encoded_BI.numpy().all()


def test_a_conversation_is_taken_back_to_before_its_images(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}
    said = model.generate(row, **GREEDY, **EAGER, return_dict_in_generate=True)
    other = {**row, "pixel_values": -row["pixel_values"]}
    expected = model.generate(other, **GREEDY, **EAGER)
    assert not np.array_equal(expected, said.sequences)
    cache = said.past_key_values.crop(2)
    assert np.array_equal(model.generate(other, past_key_values=cache, **GREEDY, **EAGER), expected)


def test_samples_go_on_with_the_images_of_their_prompts(model, inputs):
    said = model.generate(inputs, **SAMPLING, seed=1, return_dict_in_generate=True)
    cache = said.past_key_values
    assert (cache.layers[0].key.shape[0], cache.image_memory.num_rows) == (12, 4)
    copies = {name: np.repeat(value, 3, axis=0) for name, value in inputs.items()}
    text = following(said.sequences, copies)
    expected = model.generate(text, pixel_values=inputs["pixel_values"], **GREEDY, **EAGER)
    assert np.array_equal(model.generate(text, past_key_values=cache, **GREEDY, **EAGER), expected)
    kept = [7, 0]
    part = {name: value[kept] for name, value in text.items()}
    selected = cache.batch_select_indices(kept)
    assert np.array_equal(model.generate(part, past_key_values=selected, **GREEDY, **EAGER), expected.numpy()[kept])


def test_a_turn_within_a_function_of_the_user(model, inputs):
    said = model.generate(inputs, **GREEDY, **EAGER, return_dict_in_generate=True)
    text = {name: tf.constant(value) for name, value in following(said.sequences, inputs).items()}
    expected = model.generate(text, past_key_values=said.past_key_values, **GREEDY, **EAGER)
    specs = {name: tf.TensorSpec([None] * len(value.shape), value.dtype) for name, value in text.items()}

    @tf.function(input_signature=[specs, said.past_key_values.spec()])
    def function(text, cache):
        return model.generate(text, past_key_values=cache, **GREEDY)

    with counted_calls(**image_work(model)) as counts:
        assert np.array_equal(function(text, said.past_key_values), expected)
    assert not any(counts.values())


def test_beams_share_the_images_of_their_prompt(model, inputs, monkeypatch):
    """In every step of a search with 4 beams: text has 16 rows, images have the 4 of the prompts."""
    steps, next_logits = [], CachedDecoder.next_logits

    def record(decoder, memory, ids_RC, length):
        images = decoder.images_to_read
        image_tensors = (images.hidden_states_BILE, *tf.nest.flatten(images.key_values))
        steps.append(({key.shape[0] for key, _ in memory}, {tensor.shape[0] for tensor in image_tensors}))
        return next_logits(decoder, memory, ids_RC, length)

    monkeypatch.setattr(CachedDecoder, "next_logits", record)
    projected = recorded_sizes(monkeypatch, model.model.gated_cross_attn_layers[0].cross_attn.k_proj, axis=0)
    tokens = model.generate(inputs, **GREEDY, **EAGER, num_beams=4)
    assert steps == [({16}, {4})] * 5
    assert projected == [4]
    assert np.array_equal(tokens, model.generate(inputs, **GREEDY, **EAGER, num_beams=4, use_cache=False))
