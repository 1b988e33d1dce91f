"""What is written loads where it should: in transformers, in Keras, in torch, and as transformers 4 wrote it."""

import warnings
import zipfile

import h5py
import numpy as np
import pytest

from conversion import convert
from conversion.formats import format_of
from conversion.formats.base import Output
from conversion.formats.legacy_format import MODEL_NAME
from conversion.opening import open_model
from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters import expand
from tests.conversion.checkpoints import LEGACY, assert_same_tensors, read_all, write_checkpoint
from tests.requirements import needs_torch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

CONFIG_9B = {"model_type": "idefics", "additional_vocab_size": 2, "use_resampler": True, "qk_layer_norms": True}
"""The shapes of the 9B model where they matter here: 32 layers, 32 gated blocks, a vision tower of 32 layers."""


def legacy_logits(model) -> np.ndarray:
    """Logits of a torch model on the inputs beside the legacy checkpoint."""
    import torch

    with np.load(LEGACY / "expected.npz") as arrays, torch.no_grad():
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "logits"}
        return model(**inputs).logits.numpy()


@needs_torch
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("target", ["safetensors", "bin"])
@pytest.mark.parametrize("library", ["transformers", "ours"])
def test_pytorch_loads_it_and_answers_as_before(tmp_path, library, target, shard_size):
    """From the legacy h5, of which transformers 4 itself made something else."""
    if library == "ours":
        from idefics_pt import IdeficsForVisionText2Text
    else:
        from transformers import IdeficsForVisionText2Text
    convert(LEGACY / "tf_model.h5", tmp_path / "out", to=target, max_shard_size=shard_size)
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path / "out").eval()
    with np.load(LEGACY / "expected.npz") as arrays:
        assert relative_error(legacy_logits(model), arrays["logits"]) < FLOAT32_ACTIVATIONS


@needs_torch
def test_torch_reads_a_bin_file_by_itself(tmp_path):
    import torch

    tensors = write_checkpoint(tmp_path / "source", dtype="mixed")
    convert(tmp_path / "source", tmp_path / "out", to="bin")
    path = tmp_path / "out" / "pytorch_model.bin"
    for mapped in (False, True):
        state = torch.load(path, weights_only=True, mmap=mapped)
        assert list(state) == list(tensors)
        for name, tensor in state.items():
            assert tensor.is_contiguous(), name
            assert tensor.shape == tensors[name].shape, name
            assert tensor.untyped_storage().nbytes() == tensors[name].nbytes, name
            assert str(tensor.dtype) == f"torch.{tensors[name].dtype.name}", name
            assert bytes(tensor.untyped_storage()) == tensors[name].tobytes(), name
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every CRC-32 is right


@pytest.mark.parametrize(("shard_size", "dtype"), [("5GB", "float32"), ("100KB", "bfloat16"), ("1KB", "float32")])
def test_keras_loads_it_by_itself(tmp_path, shard_size, dtype):
    """By `load_weights`: every variable gets its bits, bfloat16 too, also where shards cut layers in two."""
    import tests.tf.settings  # noqa: F401 - before TensorFlow runs anything
    from idefics_common import IdeficsConfig
    from idefics_tf import TFIdeficsForVisionText2Text
    from idefics_tf.weights import weights_by_name

    tensors = write_checkpoint(tmp_path / "source", dtype=dtype)
    report = convert(tmp_path / "source", tmp_path / "out", to="keras", max_shard_size=shard_size)
    model = TFIdeficsForVisionText2Text(IdeficsConfig.from_pretrained(tmp_path / "out"), dtype=dtype)
    name = "model.weights.h5" if len(report.files) == 1 else "model.weights.json"
    model.load_weights(tmp_path / "out" / name)
    found = {
        name: np.ascontiguousarray(weight.layout.inverse(weight.variable.numpy()))
        for name, weight in weights_by_name(model).items()
    }
    assert_same_tensors(found, tensors)


@pytest.mark.parametrize("shard_size", [None, 1e-4])
def test_what_keras_saved_is_read(tmp_path, shard_size):
    """The other way round, with the state of an optimizer and of dropout in the file."""
    import keras

    import tests.tf.settings  # noqa: F401
    from idefics_common import IdeficsConfig
    from idefics_tf import TFIdeficsForVisionText2Text

    write_checkpoint(tmp_path / "source")
    config = IdeficsConfig.from_pretrained(tmp_path / "source")
    config.dropout = 0.1
    model = TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "source", config=config)
    model.compile(optimizer=keras.optimizers.Adam())
    model.optimizer.build(model.trainable_variables)
    (tmp_path / "keras").mkdir()
    config.save_pretrained(tmp_path / "keras")
    name = "model.weights.h5" if shard_size is None else "model.weights.json"
    model.save_weights(tmp_path / "keras" / name, max_shard_size=shard_size)
    assert convert(tmp_path / "keras", tmp_path / "out", to="safetensors").ok
    assert_same_tensors(read_all(tmp_path / "out"), read_all(tmp_path / "source"))


def contents(path) -> dict:
    """Everything in an HDF5 file: groups, datasets with dtype and bytes, attributes with type, shape and value."""
    found = {}

    def describe(name, item):
        attributes = {}
        for key in item.attrs:
            identifier = item.attrs.get_id(key)
            stored = identifier.get_type()
            attributes[key] = (
                stored.get_class(),
                stored.get_size(),
                identifier.shape,
                np.asarray(item.attrs[key]).tolist(),
            )
        values = (item.shape, item.dtype.str, item[()].tobytes()) if isinstance(item, h5py.Dataset) else None
        found[name] = (attributes, values)

    with h5py.File(path) as file:
        describe("/", file)
        file.visititems(describe)
    return found


def test_a_legacy_file_is_as_transformers_4_wrote_it(tmp_path):
    """Names, shapes, values and attributes of a file of 4.57.6, from its PyTorch twin."""
    convert(LEGACY / "model.safetensors", tmp_path / "out", to="tf-h5")
    found, expected = contents(tmp_path / "out" / "tf_model.h5"), contents(LEGACY / "tf_model.h5")
    assert found.keys() == expected.keys()
    for name, described in expected.items():
        assert found[name] == described, name


def test_long_lists_of_names_come_in_parts(tmp_path):
    """A 9B model has more names than an attribute may have bytes; nothing but the lists is written here."""
    config = fields_from_dict(CONFIG_9B)
    format = format_of("tf-h5")
    outputs = [
        Output(parameter, format.stored_name(parameter), format.layout(parameter), np.dtype(np.float32))
        for parameter in expand(config)
    ]
    places = format.lay_out(tmp_path, [outputs])
    with h5py.File(tmp_path / "tf_model.h5") as file:
        attributes = file["model"].attrs
        assert sorted(attributes) == ["weight_names0", "weight_names1"]
        parts = [attributes[name] for name in sorted(attributes)]
        assert all(part.dtype.kind == "S" and part.nbytes <= 64_512 for part in parts)
        assert abs(len(parts[0]) - len(parts[1])) <= 1
        names = [name.decode() for part in parts for name in part]
        assert names == [f"{MODEL_NAME}/{output.name}" for output in outputs if output.name.startswith("model/")]
        last = outputs[-1]
        assert file[f"lm_head/{MODEL_NAME}/{last.name}"].id.get_offset() == places[last.name].offset
    assert (tmp_path / "tf_model.h5").stat().st_size > 4 * 8.9e9


def test_t13_gates_that_start_at_random_have_another_name(tmp_path):
    """transformers 4 called them alpha_type; the values come back under the right name."""
    tensors = write_checkpoint(tmp_path / "source")
    config = (tmp_path / "source" / "config.json").read_text().replace('"ones"', '"normal"')
    (tmp_path / "source" / "config.json").write_text(config)
    convert(tmp_path / "source", tmp_path / "tf", to="tf-h5")
    with h5py.File(tmp_path / "tf" / "tf_model.h5") as file:
        gates = file[f"model/{MODEL_NAME}/model/gated_cross_attn_layers.0"]
        expected = tensors["model.gated_cross_attn_layers.0.alpha_cross_attn"]
        np.testing.assert_array_equal(gates["alpha_type:0"], expected)
        assert "alpha_cross_attn:0" not in gates
        assert "alpha_dense:0" in gates
    convert(tmp_path / "tf", tmp_path / "out", to="safetensors")
    assert_same_tensors(read_all(tmp_path / "out"), tensors)


def test_shards_of_a_legacy_checkpoint(tmp_path):
    """As transformers 4 cut them: weights at the root of each, sorted, without the name of the model."""
    convert(LEGACY, tmp_path / "out", to="tf-h5", max_shard_size="100KB")
    shards = sorted((tmp_path / "out").glob("tf_model-*.h5"))
    assert [path.name for path in shards] == [f"tf_model-0000{i}-of-00004.h5" for i in range(1, 5)]
    with h5py.File(shards[0]) as file:
        names = list(file.attrs["layer_names"])
        assert names == sorted(names)
        assert "model/embed_tokens/embeddings:0" in names
        assert file["model/embed_tokens/embeddings:0"].shape == (96, 32)
    with open_model(tmp_path / "out") as model:
        assert model.path.name == "tf_model.h5.index.json"


def test_a_tied_head_is_written_where_the_format_wants_it(tmp_path):
    """transformers 4 looks for the head in tf_model.h5 all the same; other formats leave it to the configuration."""
    tensors = write_checkpoint(tmp_path / "source", "tied")
    convert(tmp_path / "source", tmp_path / "tf", to="tf-h5")
    with h5py.File(tmp_path / "tf" / "tf_model.h5") as file:
        head = file[f"lm_head/{MODEL_NAME}/lm_head"]
        np.testing.assert_array_equal(head["weight:0"], tensors["model.embed_tokens.weight"])
        np.testing.assert_array_equal(
            head["additional_fc/kernel:0"], tensors["model.embed_tokens.additional_embedding.weight"].T
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convert(tmp_path / "tf", tmp_path / "out", to="safetensors")
    assert any("lm_head.weight" in note and "not written twice" in note for note in report.notes)
    assert_same_tensors(read_all(tmp_path / "out"), tensors)
