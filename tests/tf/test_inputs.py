"""K5, K6: every form of input that Keras users pass gives what named tensors give, or is refused by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from idefics_common import IdeficsConfig
from idefics_tf import TFIdeficsForVisionText2Text
from tests.models import batch, labels_of
from tests.tf.distributed_worker import SHALLOW
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.fixture(scope="module")
def model():
    return tf_model(**SHALLOW)


@pytest.fixture
def inputs(model):
    return batch(model.config)


@pytest.fixture
def text(inputs):
    return inputs["input_ids"], inputs["attention_mask"]


FORMS = {
    "positional": lambda ids, mask: ((ids, mask), {}),
    "list": lambda ids, mask: (([ids, mask],), {}),
    "tuple": lambda ids, mask: (((ids, mask),), {}),
    "dict": lambda ids, mask: (({"input_ids": ids, "attention_mask": mask},), {}),
    "dict_and_keyword": lambda ids, mask: (({"input_ids": ids},), {"attention_mask": mask}),
    "nested_lists": lambda ids, mask: ((ids.tolist(),), {"attention_mask": mask.tolist()}),
    "list_of_nested_lists": lambda ids, mask: (([ids.tolist(), mask.tolist()],), {}),
    "list_of_rows": lambda ids, mask: ((list(ids),), {"attention_mask": mask}),
}


@pytest.mark.parametrize("form", FORMS)
def test_k6_inputs_in_every_form_are_the_named_ones(model, text, form):
    args, kwargs = FORMS[form](*text)
    expected = model(input_ids=text[0], attention_mask=text[1]).logits
    assert relative_error(model(*args, **kwargs).logits, expected) < FLOAT32_ACTIVATIONS


def test_k6_the_loops_and_generate_take_a_list(text, inputs):
    model = tf_model(**SHALLOW)
    expected = model(input_ids=text[0], attention_mask=text[1]).logits
    assert relative_error(model.predict(list(text), verbose=0).logits, expected) < FLOAT32_ACTIVATIONS
    labels = labels_of(inputs)
    loss = model(input_ids=text[0], attention_mask=text[1], labels=labels).loss
    model.compile(run_eagerly=True)
    assert model.evaluate(list(text), labels, verbose=0) == pytest.approx(float(loss), rel=1e-5)
    settings = {"max_new_tokens": 2, "disable_compile": True}
    expected = model.generate(input_ids=text[0], attention_mask=text[1], **settings)
    assert np.array_equal(model.generate(list(text), **settings), expected)


BAD = {
    "input_ids is a ragged tensor": lambda ids, mask: {"input_ids": tf.ragged.constant([[3, 4, 5], [3, 4]])},
    "attention_mask is a ragged tensor": lambda ids, mask: {
        "input_ids": ids, "attention_mask": tf.ragged.constant([[1, 1, 1], [1, 1]])
    },
    "input_ids is a sparse tensor": lambda ids, mask: {"input_ids": tf.sparse.from_dense(ids)},
    "input_ids must be a tensor, or lists that make one": lambda ids, mask: {"input_ids": [[3, 4, 5], [3]]},
    "attention_mask must be a tensor, or lists": lambda ids, mask: {"input_ids": ids, "attention_mask": [[1, 1], [1]]},
    "input_ids must hold numbers, got text": lambda ids, mask: {"input_ids": "a photo of"},
    r"position_ids must have shape \(4, 9\) or \(1, text_len\), got \(9,\)": lambda ids, mask: {
        "input_ids": ids, "position_ids": np.arange(9)
    },
    r"position_ids must have shape .* got \(1, 8\)": lambda ids, mask: {
        "input_ids": ids, "position_ids": np.arange(8)[None]
    },
    "output_hidden_states must be True, False, None": lambda ids, mask: {
        "input_ids": ids, "output_hidden_states": "all"
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_k6_what_is_no_tensor_is_refused_by_name(model, text, message):
    with pytest.raises(ValueError, match=message):
        model(**BAD[message](*text))


def test_k5_too_many_inputs_and_inputs_that_come_twice_are_refused(model, text):
    with pytest.raises(TypeError, match="attention_mask came twice"):
        model(list(text), attention_mask=text[1])
    with pytest.raises(TypeError, match="20 positional inputs, but 16 arguments: input_ids, attention_mask"):
        model([text[0]] * 20)
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_type_ids'"):
        model(*text, token_type_ids=text[0])
    with pytest.raises(TypeError, match="unexpected keyword arguments: position_ids"):
        model.generate(*text[:1], position_ids=text[0])


def test_k6_ranks_and_sizes_that_a_graph_has_lost_are_put_back(model, inputs):
    inputs["labels"] = labels_of(inputs)
    expected = model(inputs)
    signature = {name: tf.TensorSpec(None, tf.as_dtype(value.dtype)) for name, value in inputs.items()}

    @tf.function(input_signature=[signature])
    def of_unknown_rank(given):
        output = model(given)
        return output.logits, output.loss

    logits, loss = of_unknown_rank({name: tf.constant(value) for name, value in inputs.items()})
    assert relative_error(logits, expected.logits) < FLOAT32_ACTIVATIONS
    assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
    wrong = {**inputs, "pixel_values": np.zeros((4, 2, 3, 14, 14), "float32")}
    with pytest.raises(tf.errors.InvalidArgumentError):
        of_unknown_rank({name: tf.constant(value) for name, value in wrong.items()})


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "attention_mask"), None])
def test_k6_a_functional_model_is_the_model(model, inputs, names, tmp_path):
    given = {name: inputs[name] for name in names or inputs}
    symbols = {name: keras.Input((None,) * (value.ndim - 1), dtype=value.dtype.name, name=name)
               for name, value in given.items() if name != "pixel_values"}  # fmt: skip
    if names is None:
        symbols["pixel_values"] = keras.Input((None, *inputs["pixel_values"].shape[2:]), name="pixel_values")
    output = model(symbols)
    assert output.past_key_values is None  # a layer gives the same tensors in every call, those of a cache change
    functional = keras.Model(symbols, output.logits)
    assert relative_error(functional.predict(given, verbose=0), model(given).logits) < FLOAT32_ACTIVATIONS
    functional.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    assert relative_error(loaded(given), model(given).logits) < FLOAT32_ACTIVATIONS


def test_k6_what_a_functional_model_has_no_place_for_is_refused(model):
    ids = keras.Input((None,), dtype="int32")
    with pytest.raises(ValueError, match="use_cache=True is not for text alone in a functional model"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="output_hidden_states=1 is not for a functional model"):
        model(ids, output_hidden_states=1)


@pytest.mark.parametrize("name", ["cache_implementation", "compile_config", "bos_token_id", "max_cache_len"])
def test_k5_generate_refuses_settings_that_have_no_effect(model, text, name):
    with pytest.raises(ValueError, match=f"{name}=7 has no effect in the Keras room"):
        model.generate(*text[:1], **{name: 7})


OVERRIDES = ("torch_dtype", "device_map", "architectures", "return_dict", "id2label", "to_dict", "transformers_version")


@pytest.mark.parametrize("keyword", OVERRIDES)
def test_k5_from_pretrained_refuses_what_it_does_not_use(model, keyword, tmp_path):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        TFIdeficsForVisionText2Text.from_pretrained(tmp_path, **{keyword: "bfloat16"})
    with pytest.raises(TypeError, match="config must be an IdeficsConfig, got a dict"):
        TFIdeficsForVisionText2Text.from_pretrained(tmp_path, config=model.config.to_dict())


def test_k5_every_field_of_a_configuration_can_be_changed_in_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    changes = {"output_attentions": True, "output_hidden_states": True, "use_cache": False, "image_token_id": 98}
    loaded = TFIdeficsForVisionText2Text.from_pretrained(tmp_path, **changes, dropout=0.5)
    assert {name: getattr(loaded.config, name) for name in changes} == changes
    output = loaded(np.array([[3, 4]]))
    assert len(output.attentions) == 1
    assert len(output.hidden_states) == 2
    assert output.past_key_values is None
    assert loaded.model.decoder_layers[0].dropout == IdeficsConfig.from_pretrained(tmp_path, dropout=0.5).dropout


def test_k6_legacy_hdf5_is_refused_before_a_byte_is_written(model, tmp_path):
    for name in ("x.h5", "x.hdf5"):
        with pytest.raises(ValueError, match=f"no legacy HDF5 file, got filepath .*{name}"):
            model.save(tmp_path / name)
        with pytest.raises(ValueError, match="reads no legacy HDF5 file"):
            model.load_weights(str(tmp_path / name))
    with pytest.raises(TypeError, match="include_optimizer"):
        model.save(tmp_path / "x.keras", include_optimizer=False)
    assert list(tmp_path.iterdir()) == []
