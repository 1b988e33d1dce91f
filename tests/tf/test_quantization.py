"""Keras's int8, int4 and float8: that they compute what they say, what stays float, what a quantized model refuses."""

import gc
import itertools
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.fashion.data import load_shipped
from examples.fashion.prompts import NAMING, naming, to_prompt
from idefics_common import IdeficsProcessor
from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
from idefics_tf.lora import enable_lora, merge_adapters
from idefics_tf.quantization import quick_deletion
from tests.models import MATRIX, SMALL, batch, labels_of
from tests.tf.random_models import tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, INT8, relative_error

CHECKPOINT = Path(__file__).parents[2] / "examples" / "fashion" / "checkpoint"
TINY = {"num_hidden_layers": 2, "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1}}
MISFIT = r"expected \d+ variables, but received \d+ variables"
IN_8_BITS = re.compile(r"[^/]*/model/(layers_\d+|gated_cross_attn_layers_\d+)/.*_proj/kernel|[^/]*/lm_head/base/kernel")


@pytest.mark.parametrize("variant", ["base", "tied", "no_added_vocabulary"])
def test_the_kernels_that_text_runs_through_are_int8_and_logits_move_little(variant):
    model = tf_model(**MATRIX[variant])
    inputs = batch(model.config)
    expected = model(inputs).logits
    is_kernel = {variable.path: bool(IN_8_BITS.fullmatch(variable.path)) for variable in model.weights}
    assert sum(is_kernel.values()) == 4 * 7 + 2 * 7 + (variant != "tied")
    model.quantize("int8")
    assert model.is_quantized
    for variable in model.weights:
        if not variable.path.endswith("kernel_scale"):
            assert variable.dtype == ("int8" if is_kernel[variable.path] else "float32"), variable.path
    assert 1e-3 < relative_error(model(inputs).logits, expected) < INT8["small"]


def test_kernels_alone_in_8_bits_are_the_rounded_kernels():
    quantized, rounded = tf_model(**TINY), tf_model(**TINY)
    quantized.quantize(config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None))
    kernels = {variable.path.partition("/")[2]: variable.numpy() for variable in quantized.weights}
    changed = 0
    for variable in rounded.weights:
        path = variable.path.partition("/")[2]
        if f"{path}_scale" in kernels:
            kernel = kernels[path] / kernels[f"{path}_scale"]
            assert np.abs(kernel - variable.numpy()).max() <= 0.501 / kernels[f"{path}_scale"].min()
            variable.assign(kernel)
            changed += 1
    assert changed == 2 * 7 + 7 + 1
    inputs = batch(rounded.config)
    assert relative_error(quantized(inputs).logits, rounded(inputs).logits) < FLOAT32_ACTIVATIONS


INT4 = {
    "int4": {"mode": "int4"},
    "blocks": {"config": keras.quantizers.Int4QuantizationConfig(block_size=8)},
    "whole_columns": {"config": keras.quantizers.Int4QuantizationConfig(block_size=None)},
}


@pytest.mark.parametrize("name", INT4)
def test_k6_int4_multiplies_by_the_kernels_of_plain_keras_layers(name, tmp_path):
    model, rounded = tf_model(**TINY), tf_model(**TINY)
    model.quantize(**INT4[name])
    changed = [variable for variable in rounded.weights if IN_8_BITS.fullmatch(variable.path)]
    assert len(changed) == 2 * 7 + 7 + 1
    with quick_deletion():
        for variable in changed:
            rows, columns = variable.shape
            plain = keras.layers.Dense(columns, use_bias=False)
            plain.build((None, rows))
            plain.kernel.assign(variable)
            plain.quantize(**INT4[name])
            variable.assign(plain(np.eye(rows, dtype="float32")))
    inputs = batch(rounded.config)
    logits = model(inputs).logits
    assert relative_error(logits, rounded(inputs).logits) < FLOAT32_ACTIVATIONS
    model.save(tmp_path / "x.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "x.keras")(inputs).logits, logits)


def test_k6_float8_goes_on_training_and_comes_back(tmp_path):
    model = tf_model(**TINY)
    inputs = batch(model.config)
    expected = model(inputs).logits
    model.quantize("float8")
    assert 1e-3 < relative_error(model(inputs).logits, expected) < 5 * INT8["small"]
    model.compile(keras.optimizers.SGD(0.05))
    losses = model.fit({**inputs, "labels": labels_of(inputs)}, epochs=3, verbose=0).history["loss"]
    assert losses[2] < losses[0]
    model.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    assert np.array_equal(loaded(inputs).logits, model(inputs).logits)
    assert {v.path for v in loaded.trainable_variables} == {v.path for v in model.trainable_variables}


FILTERS = {
    "q_proj": lambda path: path.endswith("q_proj/kernel"),
    ("^k_proj$", "down"): lambda path: path.endswith(("/k_proj/kernel", "down_proj/kernel")),
    lambda layer: "layers_1/" in layer.path: lambda path: "/layers_1/" in path,
}


@pytest.mark.parametrize("filters", FILTERS)
def test_k6_filters_choose_the_layers_and_the_file_keeps_the_choice(filters, tmp_path):
    model = tf_model(**TINY)
    inputs = batch(model.config)
    wanted = {v.path for v in model.weights if IN_8_BITS.fullmatch(v.path) and FILTERS[filters](v.path)}
    assert 0 < len(wanted) < 2 * 7 + 7 + 1
    model.quantize("int8", filters=filters, type_check=False)
    assert {v.path for v in model.weights if v.dtype == "int8"} == wanted
    model.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    assert {v.path for v in loaded.weights if v.dtype == "int8"} == wanted
    assert np.array_equal(loaded(inputs).logits, model(inputs).logits)


def test_k6_layers_that_users_quantize_come_back_and_stay_out_of_the_home_format(tmp_path):
    model = tf_model(**TINY)
    inputs = batch(model.config)
    decoder = model.model
    decoder.embed_tokens.base.quantize("int8")
    decoder.vision_model.encoder.layers[0].mlp.fc1.quantize("float8")
    decoder.decoder_layers[0].mlp.up_proj.quantize("int4")
    model.save(tmp_path / "x.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "x.keras")(inputs).logits, model(inputs).logits)
    with pytest.raises(ValueError, match="writes no quantized weights"):
        model.save_pretrained(tmp_path / "home")
    tied = tf_model(**TINY, tie_word_embeddings=True)
    tied.model.embed_tokens.base.quantize("int8")
    with pytest.raises(ValueError, match="embed_tokens/base is quantized"):
        tied(inputs)


def test_the_shipped_model_gives_the_same_answers():
    processor = IdeficsProcessor.from_pretrained(CHECKPOINT)
    photographs = load_shipped("test")
    dialogues = [naming(i, int(label), NAMING[i % 4]) for i, label in enumerate(photographs.labels)]
    inputs = dict(processor([to_prompt(dialogue, photographs) for dialogue in dialogues], return_tensors="np"))
    model = TFIdeficsForVisionText2Text.from_pretrained(CHECKPOINT)

    def logits_and_answers():
        tokens = model.generate(**inputs, max_new_tokens=10, disable_compile=True).numpy()
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return model(inputs).logits.numpy()[inputs["attention_mask"] == 1], [text.strip() for text in texts]

    expected_logits, expected = logits_and_answers()
    model.quantize("int8")
    logits, answers = logits_and_answers()
    assert 1e-3 < relative_error(logits, expected_logits) < INT8["fashion"]
    assert sum(map(str.__eq__, answers, expected)) >= 198
    right = sum(answer == dialogue[-1].answer for answer, dialogue in zip(answers, dialogues, strict=True))
    assert right >= 180


def test_quantizing_and_merging_wait_for_no_garbage_collection(monkeypatch):
    """Keras collects garbage for every variable that it takes from a layer, which took minutes in a long process."""
    model = tf_model(**TINY)
    enable_lora(model, "text", r=2)
    gc.collect()
    old, frozen = len(gc.get_objects()), []
    calls = itertools.count()

    def collect():
        if next(calls) % 8 == 0:  # counting takes long too
            frozen.append(gc.get_freeze_count())

    monkeypatch.setattr(gc, "collect", collect)
    merge_adapters(model)
    model.quantize("int8")
    assert next(calls) >= 2 * 2 * 7 + 2 * 7 + 7 + 1
    assert min(frozen) > 0.9 * old
    assert gc.get_freeze_count() == 0


def test_a_quantized_model_generates_and_comes_back_from_files(tmp_path):
    model = tf_model(**TINY)
    inputs = batch(model.config)
    settings = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(**inputs, **settings).numpy()
    model.quantize("int8")
    logits = model(inputs).logits.numpy()
    tokens = model.generate(**inputs, **settings).numpy()
    assert not np.array_equal(tokens, before)  # the random model is no more decided than that
    assert np.array_equal(tokens, model.generate(**inputs, **settings, disable_compile=True))

    model.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    assert loaded.is_quantized
    assert np.array_equal(loaded(inputs).logits, logits)

    model.save_weights(tmp_path / "x.weights.h5")
    other = tf_model(seed=1, **TINY)
    other.save_weights(tmp_path / "float.weights.h5")
    with pytest.raises(ValueError, match=MISFIT):
        other.load_weights(tmp_path / "x.weights.h5")
    other.quantize("int8")
    with pytest.raises(ValueError, match=MISFIT):
        other.load_weights(tmp_path / "float.weights.h5")
    other.load_weights(tmp_path / "x.weights.h5")
    assert np.array_equal(other(inputs).logits, logits)


def test_a_quantized_model_is_exported(tmp_path):
    model = tf_model(**TINY)
    inputs = batch(model.config)
    before = model(inputs).logits
    model.quantize("int8")
    model.export(tmp_path / "exported")
    exported = tf.saved_model.load(tmp_path / "exported")
    assert sum(weight.dtype == tf.int8 for weight in exported.weights) == 2 * 7 + 7 + 1
    logits = exported.signatures["serving_default"](**{name: tf.constant(value) for name, value in inputs.items()})
    assert relative_error(logits["logits"], model(inputs).logits) < FLOAT32_ACTIVATIONS
    assert relative_error(logits["logits"], before) > 1e-3


def test_a_model_without_a_head_is_quantized_too():
    model = tf_model(model_class=TFIdeficsModel, **TINY)
    inputs = batch(model.config)
    expected = model(inputs).last_hidden_state
    model.quantize("int8")
    assert 1e-3 < relative_error(model(inputs).last_hidden_state, expected) < INT8["small"]


def test_what_cannot_be_is_refused(tmp_path):
    model = tf_model(**TINY)
    gptq = keras.quantizers.GPTQConfig(dataset=["text"], tokenizer=str.split)
    with pytest.raises(ValueError, match="can be quantized to int8, int4, float8; got mode 'gptq'"):
        model.quantize(config=gptq)
    for filters, message in {"no_such": "lets no layer pass; names are base, down_proj", 3: "filters must be"}.items():
        with pytest.raises(ValueError, match=message):
            model.quantize("int8", filters=filters)
    assert not model.is_quantized
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize("int8")
    with pytest.raises(ValueError, match="writes no quantized weights: call it before quantizing"):
        model.save_pretrained(tmp_path / "home")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="resize it before quantizing"):
        model.resize_token_embeddings(104)
    with pytest.raises(ValueError, match="takes no adapters"):
        enable_lora(model, "text")
    adapted = tf_model(**TINY)
    enable_lora(adapted, "text")
    with pytest.raises(ValueError, match="merge_adapters before quantizing"):
        adapted.quantize("int8")
    assert not adapted.is_quantized
    with pytest.raises(ValueError, match="doesn't work well with compute_dtype='float16'"):
        tf_model(dtype="mixed_float16", **TINY).quantize("int8")
    with pytest.raises(ValueError, match="make or load the model in floating point, and call quantize"):
        tf_model(dtype="int8_from_float32", **TINY)
