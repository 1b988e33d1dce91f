"""What a cache remembers of images, when callers crop, reset, repeat, reorder or compile: never the wrong image."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from idefics_tf.cache import ImageMemory, open_spec
from tests.models import batch
from tests.tf.random_models import tf_model
from tests.tf.test_generation import counted_calls
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
    return {**inputs, "pixel_values": inputs["pixel_values"][::-1]}


def cache_of(model, inputs):
    return model(inputs, use_cache=True).past_key_values


def in_graph(model, inputs, cache, sizes_known=False):
    """The output of a call as part of a graph, that by default knows the sizes of neither the inputs nor the cache."""
    function = tf.function(lambda inputs, cache: model(inputs, past_key_values=cache, use_cache=True), autograph=False)
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    if sizes_known:
        return function(inputs, cache)
    specs = {name: open_spec(value, *range(2 if name == "pixel_values" else 3)) for name, value in inputs.items()}
    return function.get_concrete_function(specs, cache.spec())(inputs, cache)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_emptied_cache_forgets_its_images(compiled, model, inputs):
    cache = cache_of(model, inputs).crop(0)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for call in (others(inputs), text):
        actual = in_graph(model, call, cache) if compiled else model(call, past_key_values=cache)
        assert relative_error(actual.logits, model(call).logits) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("num_new", [1, 2, 3])
@pytest.mark.parametrize("mode", ["eager", "graph", "graph of open sizes"])
def test_e12_images_that_the_mask_covers_alone_replace_those_of_the_cache(mode, num_new, model, inputs):
    """In eager execution and in graphs; the text before saw others, and that is in its keys and values alone."""
    pixels = np.random.default_rng(3).standard_normal((4, num_new, 3, 28, 28)).astype(np.float32)
    cache = cache_of(model, first(inputs, 7))
    mask = np.pad(inputs["image_attention_mask"], ((0, 0), (0, 0), (0, 1)))[..., :num_new]
    call = rest(inputs, 7, pixel_values=pixels, image_attention_mask=mask)
    expected = model(call, past_key_values=cache._replace(image_memory=None), use_cache=True)
    if mode == "eager":
        actual = model(call, past_key_values=cache, use_cache=True)
    else:
        actual = in_graph(model, call, cache, sizes_known=mode == "graph")
    assert relative_error(actual.logits, expected.logits) < FLOAT32_ACTIVATIONS
    assert actual.past_key_values.image_memory.num_images == num_new
    # each new image stands where one was: a text that is taken back sees the one in the place of what it saw
    cropped = actual.past_key_values.crop(-3)
    silent = {name: value for name, value in rest(inputs, 6).items() if name != "image_attention_mask"}
    seen = np.repeat(mask[:, 5:6], 3, axis=1)
    told = model({**silent, "image_attention_mask": seen}, past_key_values=cropped).logits
    assert relative_error(model(silent, past_key_values=cropped).logits, told) < FLOAT32_ACTIVATIONS
    assert seen.any()


def test_images_are_known_by_the_tensor(model, inputs, expected):
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    pixels = inputs["pixel_values"]
    cache = cache_of(model, first(inputs, 7))
    with counted_calls(vision=(model.model.vision_model, "call")) as counts:
        for images, encoded in ((pixels, 0), (tf.identity(pixels), 1)):
            again = model(rest(inputs, 7, pixel_values=images), past_key_values=cache)
            assert relative_error(again.logits, expected[:, 7:]) < FLOAT32_ACTIVATIONS
            assert counts["vision"] == encoded
        features = model.encode_images(-pixels)
        later = rest(inputs, 7, perceiver_embeddings=features)
        actual = model(later, past_key_values=cache).logits
    wanted = model(rest(inputs, 7, pixel_values=-pixels), past_key_values=cache._replace(image_memory=None)).logits
    assert relative_error(actual, wanted) < FLOAT32_ACTIVATIONS
    assert relative_error(actual, expected[:, 7:]) > 100 * FLOAT32_ACTIVATIONS


def test_a_cache_keeps_no_pixels(model, inputs):
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    pixels = weakref.ref(inputs["pixel_values"])
    cache = cache_of(model, first(inputs, 7))
    del inputs["pixel_values"]
    gc.collect()
    assert pixels() is None
    assert all(isinstance(leaf, tf.Tensor) for leaf in tf.nest.flatten(cache))


def test_a_cache_cropped_to_before_its_images_takes_others(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # sees its first image from position 2 on
    cache = cache_of(model, row)
    new = {**row, "pixel_values": -row["pixel_values"]}
    call = rest(new, 2, pixel_values=new["pixel_values"])
    expected = model(new).logits[:, 2:]
    for kept in (2, -7):
        actual = model(call, past_key_values=cache.crop(kept)).logits
        assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS
    assert cache.reset().get_seq_length() == 0
    assert cache.reset().image_memory is None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("steps", [[], [7], [6, 7, 8]])
def test_a_cropped_cache_does_not_show_an_image_of_the_text_cut_away(steps, compiled, model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # sees image 0 at positions 2 to 4, image 1 from 5 on
    whole = None
    for start, end in zip([0, *steps], [*steps, 9], strict=True):
        call = {"input_ids": row["input_ids"][:, start:end], "attention_mask": row["attention_mask"][:, :end]}
        call["image_attention_mask"] = row["image_attention_mask"][:, start:end]
        if start == 0:
            whole = cache_of(model, {**call, "pixel_values": row["pixel_values"]})
        elif compiled:
            whole = in_graph(model, call, whole).past_key_values
        else:
            whole = model(call, past_key_values=whole, use_cache=True).past_key_values
    for kept in range(3, 9):
        silent = rest(row, kept)
        mask = silent.pop("image_attention_mask").copy()
        mask[:, kept:] = mask[:, kept - 1 : kept]
        actual = model(silent, past_key_values=whole.crop(kept)).logits
        expected = model({**row, "image_attention_mask": mask}).logits[:, kept:]
        assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS
    whole_text = {name: row[name] for name in ("input_ids", "attention_mask")}
    mask[:, 4:] = mask[:, 3:4]
    told = {**whole_text, "pixel_values": row["pixel_values"], "image_attention_mask": mask}
    expected = model.generate(told, max_new_tokens=3)
    assert np.array_equal(model.generate(whole_text, past_key_values=whole.crop(4), max_new_tokens=3), expected)


@pytest.mark.parametrize(("compiled", "new_rows"), [(False, 4), (False, 2), (True, 2)])
def test_rows_with_unequal_numbers_of_images_get_new_ones(compiled, new_rows, model, inputs):
    """Columns of the mask: those of the cache, padding included, then the new ones, which rows may share."""
    cache = cache_of(model, first(inputs, 5, image_attention_mask=inputs["image_attention_mask"][:, :5]))
    known = cache.image_memory.num_images
    new_pixels = np.random.default_rng(3).standard_normal((new_rows, 1, 3, 28, 28)).astype(np.float32)
    mask = np.pad(inputs["image_attention_mask"], ((0, 0), (0, 0), (0, 1)))
    mask[:, 5:] = 0
    mask[:, 5:, known] = 1
    call = rest(inputs, 5, pixel_values=new_pixels, image_attention_mask=mask)
    actual = in_graph(model, call, cache) if compiled else model(call, past_key_values=cache, use_cache=True)
    new_pixels = np.repeat(new_pixels, 4 // new_rows, axis=0)
    whole = {**inputs, "pixel_values": np.concatenate((inputs["pixel_values"], new_pixels), axis=1)}
    expected = model({**whole, "image_attention_mask": mask}).logits[:, 5:]
    assert relative_error(actual.logits, expected) < FLOAT32_ACTIVATIONS
    memory = actual.past_key_values.image_memory
    # nobody has seen the second images, and row 1 none but the new one
    assert memory.encoded_BI.numpy().astype(int).tolist() == [[1, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 1]]


def test_an_image_that_was_not_encoded_is_not_taken_for_black(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # its second image is seen from position 5 on
    mask = row["image_attention_mask"]
    cache = cache_of(model, first(row, 5, image_attention_mask=mask[:, :5]))
    with pytest.raises(ValueError, match="no earlier call could see, so they were not encoded; give all images again"):
        model(rest(row, 5, image_attention_mask=mask[:, 5:]), past_key_values=cache)
    call = rest(row, 5, pixel_values=row["pixel_values"], image_attention_mask=mask[:, 5:])
    actual = model(call, past_key_values=cache, use_cache=True)
    assert relative_error(actual.logits, model(row).logits[:, 5:]) < FLOAT32_ACTIVATIONS
    # the first image, which this call does not see, is encoded too: later ones may ask for it
    assert actual.past_key_values.image_memory.encoded_BI.numpy().all()


def test_new_images_do_not_show_an_earlier_one_that_was_not_encoded(model, inputs):
    row = {name: value[:1] for name, value in inputs.items()}  # its second image is seen from position 5 on
    mask = row["image_attention_mask"]
    cache = cache_of(model, first(row, 5, image_attention_mask=mask[:, :5]))
    mask = np.pad(mask, ((0, 0), (0, 0), (0, 1)))
    mask[:, 8:] = (0, 0, 1)
    with pytest.raises(ValueError, match="no earlier call could see, so they were not encoded"):
        model(rest(row, 5, pixel_values=row["pixel_values"][:, :1], image_attention_mask=mask), past_key_values=cache)


@pytest.mark.parametrize("length", [-2, np.int64(-2), tf.constant(-2), tf.constant(7)])
def test_a_cache_is_cropped_by_numbers_of_every_kind(length, model, inputs):
    """After steps without a mask, of which the memory knows that they saw what the last of it did."""
    cache = cache_of(model, first(inputs, 6))
    step = {"input_ids": inputs["input_ids"][:, 6:], "attention_mask": inputs["attention_mask"]}
    cache = model(step, past_key_values=cache, use_cache=True).past_key_values.crop(length)
    assert cache.get_seq_length() == 7
    mask = inputs["image_attention_mask"].copy()
    mask[:, 6:] = mask[:, 5:6]
    silent = {"input_ids": inputs["input_ids"][:, 7:], "attention_mask": inputs["attention_mask"]}
    expected = model({**inputs, "image_attention_mask": mask}).logits[:, 7:]
    assert relative_error(model(silent, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("empty", [0, np.int64(0), tf.constant(0), None])
def test_a_cache_that_was_emptied_in_any_way_begins_anew(empty, model, inputs):
    cache = cache_of(model, inputs)
    if empty is None:  # by a tensor in a graph
        cache = tf.function(lambda cache, n: cache.crop(n), autograph=False)(cache, tf.constant(0))
    else:
        cache = cache.crop(empty)
    text = {name: inputs[name][:, :2] for name in ("input_ids", "attention_mask")}
    cache = model(text, past_key_values=cache, use_cache=True).past_key_values
    new = others(inputs)
    mask = new["image_attention_mask"].copy()
    mask[:, :2] = 0
    expected = model({**new, "image_attention_mask": mask}).logits.numpy()[:, 2:]
    later = rest(new, 2, pixel_values=new["pixel_values"], image_attention_mask=mask[:, 2:])
    actual, real = model(later, past_key_values=cache).logits.numpy(), inputs["attention_mask"][:, 2:] > 0
    assert relative_error(actual[real], expected[real]) < FLOAT32_ACTIVATIONS


def test_a_mask_longer_than_the_text_in_a_graph_of_open_sizes(model, inputs):
    call = {**inputs, "image_attention_mask": np.pad(inputs["image_attention_mask"], ((0, 0), (0, 3), (0, 0)))}
    specs = {name: open_spec(tf.constant(value), *range(2)) for name, value in call.items()}
    function = tf.function(lambda call: model(call).logits, autograph=False).get_concrete_function(specs)
    actual = function({name: tf.constant(value) for name, value in call.items()})
    assert relative_error(actual, model(inputs).logits) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_known_images_cost_nothing_in_any_precision(dtype, inputs):
    model = tf_model(dtype=dtype)
    pixels = tf.constant(inputs["pixel_values"])
    cache = cache_of(model, first(inputs, 7, pixel_values=pixels))
    turn = {"max_new_tokens": 2, "disable_compile": True, "return_dict_in_generate": True}
    with counted_calls(vision=(model.model.vision_model, "call")) as counts:
        model(rest(inputs, 7, pixel_values=pixels), past_key_values=cache)
        model.generate({**inputs, "pixel_values": pixels}, past_key_values=cache, **turn)
    assert counts["vision"] == 0
    variable = tf.Variable(pixels)
    changed = cache_of(model, first(inputs, 7, pixel_values=variable))
    variable.assign(-variable)
    call = rest(inputs, 7, pixel_values=variable)
    expected = model(call, past_key_values=changed._replace(image_memory=None)).logits
    assert relative_error(model(call, past_key_values=changed).logits, expected) < FLOAT32_ACTIVATIONS


@pytest.mark.parametrize("kept", [[2, 0], [3, 2, 1, 0], [1, 1, 3]])
def test_prompts_of_a_cache_can_be_selected(kept, model, inputs, expected):
    cache = cache_of(model, first(inputs, 6)).batch_select_indices(kept)
    assert cache.image_memory.num_rows == len(kept)
    selected = {name: value[kept] for name, value in rest(inputs, 6).items()}
    actual = model(selected, past_key_values=cache).logits
    assert relative_error(actual, expected[kept, 6:]) < FLOAT32_ACTIVATIONS


def test_rows_that_fit_no_prompt_are_named(model, inputs):
    cache = cache_of(model, first(inputs, 6))
    cache = cache.batch_select_indices([0, 1, 2])._replace(image_memory=cache.image_memory)
    text = {name: value[:3] for name, value in rest(inputs, 6).items()}
    with pytest.raises(ValueError, match="images of 4 prompts; 3 rows of text do not fit"):
        model(text, past_key_values=cache)


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_of_a_prompt_go_on_with_images_of_their_own(compiled, model, inputs):
    row = {name: value[3:] for name, value in inputs.items()}
    cache = cache_of(model, first(row, 6)).batch_repeat_interleave(3)
    assert (cache.layers[0].key.shape[0], cache.image_memory.num_rows) == (3, 1)
    copies = {name: np.repeat(value, 3, axis=0) for name, value in row.items()}
    silent = rest(copies, 6)
    del silent["image_attention_mask"]
    last = {**copies, "image_attention_mask": copies["image_attention_mask"].copy()}
    last["image_attention_mask"][:, 6:] = copies["image_attention_mask"][:, 5:6]

    def call(inputs, cache):
        return in_graph(model, inputs, cache) if compiled else model(inputs, past_key_values=cache)

    expected = model(last).logits[:, 6:]
    assert relative_error(call(silent, cache).logits, expected) < FLOAT32_ACTIVATIONS
    two = {name: value[:2] for name, value in silent.items()}
    selected = cache.batch_select_indices([2, 0])
    assert relative_error(model(two, past_key_values=selected).logits, expected[:2]) < FLOAT32_ACTIVATIONS

    new_pixels = np.random.default_rng(3).standard_normal((3, 1, 3, 28, 28)).astype(np.float32)
    mask = np.pad(copies["image_attention_mask"], ((0, 0), (0, 0), (0, 1)))
    mask[:, 6:] = (0, 0, 1)
    actual = call(rest(copies, 6, pixel_values=new_pixels, image_attention_mask=mask), cache).logits
    whole = {**copies, "pixel_values": np.concatenate((copies["pixel_values"], new_pixels), axis=1)}
    expected = model({**whole, "image_attention_mask": mask}).logits[:, 6:]
    assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS


def test_rows_of_images_that_do_not_fit_are_named(model, inputs):
    six = {name: np.concatenate((value, value[:2])) for name, value in inputs.items()}
    cache = cache_of(model, {**first(six, 6), "pixel_values": six["pixel_values"][:2]})
    mask = np.pad(six["image_attention_mask"], ((0, 0), (0, 0), (0, 1)))
    call = rest(six, 6, pixel_values=six["pixel_values"][:3, :1], image_attention_mask=mask)
    with pytest.raises(ValueError, match="pixel_values has 3 rows, but the cache has seen the images of 2 prompts"):
        model(call, past_key_values=cache)


def test_new_images_need_a_mask_over_all(model, inputs):
    call = rest(inputs, 6, pixel_values=inputs["pixel_values"])
    del call["image_attention_mask"]
    with pytest.raises(ValueError, match="New images for a cache that has seen some need an image_attention_mask"):
        model(call, past_key_values=cache_of(model, first(inputs, 6)))


def test_images_of_another_size(model, inputs):
    mask = np.pad(inputs["image_attention_mask"], ((0, 0), (0, 0), (0, 1)), constant_values=1)
    pixels = np.ones((4, 1, 3, 56, 56), np.float32)
    larger = rest(inputs, 6, pixel_values=pixels, image_attention_mask=mask, interpolate_pos_encoding=True)
    plain = tf_model(use_resampler=False)
    with pytest.raises(ValueError, match="17 tokens each, those that the cache has seen 5"):
        plain(larger, past_key_values=cache_of(plain, first(inputs, 6)))
    # with a resampler they may differ
    cache = model(larger, past_key_values=cache_of(model, first(inputs, 6)), use_cache=True).past_key_values
    assert cache.image_memory.num_images == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_without_a_mask_sees_what_the_text_before_saw(compiled, model, inputs):
    cache = cache_of(model, first(inputs, 4))
    step = {name: value[:, 4:7] for name, value in inputs.items() if name != "pixel_values"}
    step["attention_mask"] = inputs["attention_mask"][:, :7]
    cache = (in_graph(model, step, cache) if compiled else model(step, past_key_values=cache)).past_key_values
    mask = inputs["image_attention_mask"].copy()
    mask[:, 7:] = mask[:, 6:7]
    silent = {"input_ids": inputs["input_ids"][:, 7:], "attention_mask": inputs["attention_mask"]}
    expected = model({**inputs, "image_attention_mask": mask}).logits[:, 7:]
    assert relative_error(model(silent, past_key_values=cache).logits, expected) < FLOAT32_ACTIVATIONS
    assert np.array_equal(cache.image_memory.seen_BSI, mask[:, :7].astype(bool))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("sees_both", [False, True])
def test_a_narrowed_memory_gives_what_the_whole_one_gives(sees_both, copies, compiled, model, inputs):
    """At their end row 0 sees its second image, row 1 none, row 2 its first, and row 3 its second or both."""
    inputs["image_attention_mask"][3, -1, 0] = sees_both
    cache = cache_of(model, inputs).batch_repeat_interleave(copies)
    narrowed = tf.function(ImageMemory.narrowed, autograph=False) if compiled else ImageMemory.narrowed
    whole, narrow = cache.image_memory, narrowed(cache.image_memory)
    assert narrow.num_images == (2 if sees_both else 1)
    assert narrow.key_values[0][0].shape[2] * whole.num_images == whole.key_values[0][0].shape[2] * narrow.num_images
    mask = np.repeat(np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1), copies, axis=0)
    step = {"input_ids": np.arange(5, 5 + 4 * copies)[:, None], "attention_mask": mask}
    expected, actual = (
        model(step, past_key_values=cache._replace(image_memory=memory)).logits for memory in (whole, narrow)
    )
    assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS


def test_padding_is_not_encoded_ahead_of_time(model, inputs):
    seen = inputs["image_attention_mask"].any(axis=1)
    every = model.encode_images(inputs["pixel_values"])
    features = model.encode_images(inputs["pixel_values"], inputs["image_attention_mask"]).numpy()
    assert not features[~seen].any()
    assert relative_error(features[seen], every.numpy()[seen]) < FLOAT32_ACTIVATIONS
    with counted_calls(vision=(model.model.vision_model, "call")) as counts:
        dark = model.encode_images(inputs["pixel_values"], np.zeros_like(inputs["image_attention_mask"]))
    assert counts["vision"] == 0
    assert dark.shape == every.shape
