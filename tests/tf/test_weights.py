"""Names, and state in and out: home format, Keras formats, strictness, dtypes, and what loading costs."""

import contextlib
import json
import subprocess
import sys
import time

import h5py
import huggingface_hub
import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import idefics_tf.pretrained
import idefics_tf.saving
import idefics_tf.weights
from conversion import convert
from idefics_common.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters import expand
from idefics_common.parameters.layouts import KERAS_LAYOUTS
from idefics_tf import IdeficsConfig, TFIdeficsForVisionText2Text, TFIdeficsModel
from idefics_tf.host_memory import aligned_empty
from idefics_tf.initialization import values_follow
from tests.models import MATRIX, batch, small_config
from tests.tf.random_models import canonical, tf_model
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.fixture(scope="module")
def model():
    return tf_model()


@pytest.fixture(scope="module")
def home(model, tmp_path_factory):
    """A directory in the home format, not to be changed."""
    directory = tmp_path_factory.mktemp("home") / "model"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def copy(home, tmp_path):
    """The same as `home`, to be changed."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for file in home.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def datasets(path) -> dict[str, tuple]:
    """Shapes of all datasets of an h5 file by path."""
    shapes = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: shapes.update({name: item.shape}) if isinstance(item, h5py.Dataset) else None
        )
    return shapes


def test_golden_names(request):
    """Keras names are formats on disk: this list may grow, but what stands in it may not change."""
    lines = (request.config.rootpath / "tests" / "fixtures" / "keras_names.tsv").read_text().splitlines()
    parameters = expand(fields_from_dict(small_config()))
    assert [f"{p.name}\t{p.keras_path}\t{p.h5_path}" for p in parameters] == lines


@pytest.mark.parametrize("variant", MATRIX)
def test_variables_and_h5_datasets_are_the_table(variant, tmp_path):
    config = IdeficsConfig(**small_config(**MATRIX[variant]))
    model = TFIdeficsForVisionText2Text(config)
    table = [p for p in expand(config) if p.tied_to is None]
    shapes = {p.name: KERAS_LAYOUTS[p.kind].shape(p.shape) for p in table}
    paths = [variable.path for variable in model.weights]
    assert len(set(paths)) == len(paths)
    assert {variable.path: tuple(variable.shape) for variable in model.weights} == {
        f"{model.name}/{p.keras_path}": shapes[p.name] for p in table
    }
    model.save_weights(tmp_path / "x.weights.h5")
    assert datasets(tmp_path / "x.weights.h5") == {p.h5_path: shapes[p.name] for p in table}


def test_the_real_9b_model_is_its_table(request):
    """All 8.9 billion parameters by path and shape; their memory is reserved and never touched."""
    config = IdeficsConfig.from_pretrained(
        request.config.rootpath / "tests" / "fixtures" / "configs" / "config-9b.json"
    )
    with values_follow():
        model = TFIdeficsForVisionText2Text(config, dtype="bfloat16", name="big")
    shapes = {f"big/{p.keras_path}": KERAS_LAYOUTS[p.kind].shape(p.shape) for p in expand(config)}
    assert {variable.path: tuple(variable.shape) for variable in model.weights} == shapes
    assert model.count_params() == 8_929_679_632


def _reload_home(model, directory, **kwargs):
    model.save_pretrained(directory / "home", **kwargs)
    return TFIdeficsForVisionText2Text.from_pretrained(directory / "home")


def _reload_sharded(model, directory):
    reloaded = _reload_home(model, directory, max_shard_size="30KB")
    assert len(list((directory / "home").glob("model-*.safetensors"))) > 5
    return reloaded


def _reload_keras(model, directory):
    model.save(directory / "x.keras")
    return keras.saving.load_model(directory / "x.keras")


def _reload_weights(model, directory):
    model.save_weights(directory / "x.weights.h5")
    other = TFIdeficsForVisionText2Text(model.config)
    other.load_weights(directory / "x.weights.h5")
    return other


@pytest.mark.parametrize(
    ("variant", "reload"),
    [
        ("base", _reload_home),
        ("base", _reload_sharded),
        ("base", _reload_keras),
        ("base", _reload_weights),
        ("tied", _reload_home),
        ("tied", _reload_keras),
        ("vector_alphas", _reload_weights),
    ],
)
def test_t1_reload_keeps_every_weight(variant, reload, tmp_path):
    model = tf_model(**MATRIX[variant])
    reloaded = reload(model, tmp_path)
    before, after = canonical(model), canonical(reloaded)
    assert list(before) == list(after)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []
    inputs = batch(model.config)
    assert np.array_equal(model(inputs).logits, reloaded(inputs).logits)


def test_a_checkpoint_of_transformers_4(request):
    directory = request.config.rootpath / "tests" / "fixtures" / "legacy_tf_tiny"
    expected = dict(np.load(directory / "expected.npz"))
    logits = expected.pop("logits")
    model = TFIdeficsForVisionText2Text.from_pretrained(directory)
    kept = expected["attention_mask"] == 1  # what stands at padding depends on the attention kernel
    assert relative_error(model(expected).logits.numpy()[kept], logits[kept]) < FLOAT32_ACTIVATIONS


def test_bin_files_need_torch_and_load(copy, model):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    file = copy / "model.safetensors"
    tensors = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(file).items()}
    file.unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    loaded = canonical(TFIdeficsForVisionText2Text.from_pretrained(copy))
    assert all(np.array_equal(value, loaded[name]) for name, value in canonical(model).items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_t14_dtypes_are_kept_or_converted(home, tmp_path, dtype):
    half = TFIdeficsForVisionText2Text.from_pretrained(home, dtype=dtype)
    assert {variable.dtype for variable in half.weights} == {dtype}
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    with open_checkpoint(tmp_path / "half") as checkpoint:
        assert {info.dtype.name for info in checkpoint.infos.values()} == {dtype}
    assert TFIdeficsForVisionText2Text.from_pretrained(tmp_path / "half").dtype == dtype


def test_t10_a_global_policy_is_followed(home, model):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = TFIdeficsForVisionText2Text.from_pretrained(home)
    finally:
        keras.config.set_dtype_policy(before)
    assert {variable.dtype for variable in mixed.weights} == {"float32"}
    assert mixed(batch(model.config)).logits.dtype == "bfloat16"
    assert keras.config.dtype_policy() == before


def test_t13_alphas_have_their_own_names_and_initializer():
    model = tf_model(alpha_type="vector", num_hidden_layers=2)
    config = IdeficsConfig(
        **small_config(alpha_initializer="normal", alphas_initializer_range=0.1, alpha_type="vector")
    )
    model = TFIdeficsForVisionText2Text(config)
    block = model.model.gated_cross_attn_layers[0]
    assert [v.name for v in block.weights if v.name.startswith("alpha")] == ["alpha_cross_attn", "alpha_dense"]
    values = np.concatenate([b.alpha_dense.numpy() for b in model.model.gated_cross_attn_layers], axis=None)
    assert 0.05 < values.std() < 0.2
    zeros = TFIdeficsForVisionText2Text(IdeficsConfig(**small_config(alpha_initializer="zeros", num_hidden_layers=2)))
    assert not zeros.model.gated_cross_attn_layers[0].alpha_cross_attn.numpy().any()


def test_the_base_model_loads_from_both_kinds_of_checkpoint(home, model, tmp_path):
    base = TFIdeficsModel.from_pretrained(home)
    base.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert "norm.weight" in checkpoint
    again = canonical(TFIdeficsModel.from_pretrained(tmp_path))
    full = canonical(model)
    assert set(full) - set(again) == {"lm_head.weight", "lm_head.additional_fc.weight"}
    assert all(np.array_equal(full[name], again[name]) for name in again)


def test_weights_are_apart_from_the_file_and_can_be_trained(copy):
    """What is loaded without a copy trains as what was assigned, and neither shows in the file nor sees it change."""
    model = TFIdeficsForVisionText2Text.from_pretrained(copy)
    file = copy / "model.safetensors"
    content = file.read_bytes()
    start = canonical(model)
    inputs = batch(model.config)
    optimizer = keras.optimizers.AdamW(0.01)
    optimizer.build(model.trainable_variables)
    state = [(variable, variable.numpy()) for variable in (*model.weights, *optimizer.variables)]
    model.compile(optimizer=optimizer)

    def train():
        model.fit({**inputs, "labels": inputs["input_ids"]}, batch_size=4, shuffle=False, verbose=0)

    train()
    assert file.read_bytes() == content
    with open(file, "r+b") as stream:  # the same file, where `write_bytes` on a new one would prove nothing
        stream.seek(len(content) // 2)
        stream.write(bytes(len(content) // 2))
    after = canonical(model)
    unused = {f"model.vision_model.post_layernorm.{name}" for name in ("weight", "bias")}
    assert {name for name in start if np.array_equal(after[name], start[name])} == unused
    for variable, value in state:
        variable.assign(value)
    train()
    expected = canonical(model)
    assert [name for name in start if not np.array_equal(after[name], expected[name])] == []


def test_reading_ahead_is_bounded(home, monkeypatch):
    """Where variables are elsewhere, no more than three tensors are in host memory, however slow assigning is."""
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [kind] if kind == "GPU" else [])
    total, begun, taken, most = len(open_checkpoint(home)), [], [], 0
    end = time.monotonic() + 300  # so that no reading ahead fails the test instead of hanging it
    take_over = idefics_tf.weights.take_over

    def count_begun(shape, dtype):
        begun.append(shape)
        return aligned_empty(shape, dtype)

    def count_taken(array):
        nonlocal most
        while len(begun) < min(len(taken) + 2, total) and time.monotonic() < end:
            time.sleep(0.001)
        most = max(most, len(begun) - len(taken))
        taken.append(array.shape)
        return take_over(array)

    monkeypatch.setattr(idefics_tf.weights, "aligned_empty", count_begun)
    monkeypatch.setattr(idefics_tf.weights, "take_over", count_taken)
    model = TFIdeficsForVisionText2Text.from_pretrained(home)
    assert len(taken) == len(begun) == len(model.weights)
    assert 2 <= most <= 3


def test_tensors_of_many_blocks_are_read_whole(home, model, monkeypatch):
    monkeypatch.setattr(idefics_tf.weights, "_BLOCK", 1)
    loaded = canonical(TFIdeficsForVisionText2Text.from_pretrained(home))
    assert [name for name, value in canonical(model).items() if not np.array_equal(loaded[name], value)] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_memory_that_is_there_early_is_used(home, monkeypatch, dtype):
    """With all of it there before the first tensor is read, no more is allocated, and values are the same."""
    expected = canonical(TFIdeficsForVisionText2Text.from_pretrained(home, dtype=dtype))
    asked = {}

    @contextlib.contextmanager
    def provided(sizes):
        asked.update(sizes)
        yield {name: aligned_empty((nbytes,), np.dtype(np.uint8)) for name, nbytes in sizes.items()}

    def refuse(shape, dtype):
        raise AssertionError(f"more memory was asked for, {shape} of {dtype}")

    monkeypatch.setattr(idefics_tf.pretrained, "provided", provided)
    monkeypatch.setattr(idefics_tf.weights, "aligned_empty", refuse)
    model = TFIdeficsForVisionText2Text.from_pretrained(home, dtype=dtype)
    assert sum(asked.values()) == sum(variable.value.numpy().nbytes for variable in model.weights)
    loaded = canonical(model)
    assert [name for name in expected if not np.array_equal(loaded[name], expected[name])] == []


def test_an_error_while_reading_ahead_is_raised(home, monkeypatch):
    def fail(checkpoint, name, *rows):
        raise CheckpointError(checkpoint.path, "the disk is gone", name)

    monkeypatch.setattr(Checkpoint, "read_rows", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        TFIdeficsForVisionText2Text.from_pretrained(home)


def _change(directory, change):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def _quantize(directory, declared):
    """As bitsandbytes stores one layer (E2)."""
    name = "model.layers.0.self_attn.q_proj.weight"
    added = {name: np.zeros((288, 1), np.uint8), f"{name}.absmax": np.ones(9, np.float32)}
    _change(directory, lambda tensors: tensors.update(added))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))


def _truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _change(d, lambda t: t.pop("model.norm.weight")), r"1 missing\n.*- model.norm.weight \(24,\)"),
        (lambda d: _change(d, lambda t: t.update(wait=np.ones(3, "f4"))), r"1 unexpected\n.*\+ 'wait' \(3,\)"),
        (
            lambda d: _change(d, lambda t: t.update({"model.norm.weight": np.ones(25, "f4")})),
            r"! model.norm.weight expected \(24,\), found \(25,\)",
        ),
        (_truncate, "model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "config.json: is missing"),
        (lambda d: _quantize(d, None), "q_proj.weight': is uint8, as bitsandbytes in 4 bits writes it; expected float"),
        (
            lambda d: _quantize(d, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
            r"q_proj.weight': is uint8, quantised by bitsandbytes in 4 bits: expected float.*dequantize\(\)",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TFIdeficsForVisionText2Text.from_pretrained(copy)


def test_fields_of_the_configuration_can_be_overridden(home):
    model = TFIdeficsForVisionText2Text.from_pretrained(home, freeze_text_layers=True, dtype="auto", name="mine")
    assert model.config.freeze_text_layers
    assert not any(variable.trainable for variable in model.model.norm.weights)
    assert {variable.path.partition("/")[0] for variable in model.weights} == {"mine"}
    with pytest.raises(TypeError, match="unexpected keyword argument 'freeze_txt_layers'"):
        TFIdeficsForVisionText2Text.from_pretrained(home, freeze_txt_layers=True)
    with pytest.raises(ValueError, match="num_hidden_layers must be a multiple of cross_layer_interval"):
        TFIdeficsForVisionText2Text.from_pretrained(home, cross_layer_interval=3)


def test_stale_buffers_are_ignored(copy, model):
    stale = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4"),
        "model.vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    _change(copy, lambda tensors: tensors.update(stale))
    assert set(canonical(TFIdeficsForVisionText2Text.from_pretrained(copy))) == set(canonical(model))


def test_saving_into_a_directory_replaces_the_model_and_nothing_else(copy, model):
    (copy / "tokenizer.json").write_text("{}")
    model.save_pretrained(copy, max_shard_size="100KB")
    names = {file.name for file in copy.iterdir()}
    assert {"tokenizer.json", "config.json", "model.safetensors.index.json"} < names
    assert "model.safetensors" not in names
    model.save_pretrained(copy)
    kept = {"tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in copy.iterdir()} == kept
    TFIdeficsForVisionText2Text.from_pretrained(copy)


def test_an_interrupted_save_leaves_everything_as_it_was(copy, model, monkeypatch):
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    written = []

    def interrupt(path, tensors):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        path.write_bytes(b"half a model")

    monkeypatch.setattr(idefics_tf.saving, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(copy, max_shard_size="30KB")
    with pytest.raises(FileNotFoundError):
        written[0].stat()
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert [file.name for file in copy.parent.iterdir()] == ["copy"]


def test_a_hub_id_downloads_just_what_is_needed(home, monkeypatch):
    calls = []

    def download(repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return str(home.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    TFIdeficsForVisionText2Text.from_pretrained("org/name", subfolder="model", revision="abc", token="t", cache_dir="c")
    (repo_id, kwargs), *others = calls
    assert others == []
    assert repo_id == "org/name"
    assert (kwargs["revision"], kwargs["token"], kwargs["cache_dir"]) == ("abc", "t", "c")
    assert "model/config.json" in kwargs["allow_patterns"]
    assert "model/model-*.safetensors" in kwargs["allow_patterns"]
    assert not any(pattern.endswith(".bin") for pattern in kwargs["allow_patterns"])


@pytest.mark.parametrize("size", ["5", "GB", "5TBs", "1.5GB"])
def test_a_shard_size_that_is_none_is_refused(model, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be"):
        model.save_pretrained(tmp_path / "x", max_shard_size=size)


MEASURE = """
import sys, threading, time
import tensorflow as tf
from idefics_tf import TFIdeficsForVisionText2Text
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
peak, done, before = 0, False, resident()
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = TFIdeficsForVisionText2Text.from_pretrained(sys.argv[1])
done = True
thread.join()
sizes = [variable.value.numpy().nbytes for variable in model.weights]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("to", [None, "keras"])
def test_peak_memory_of_loading(tmp_path, to):
    """Above what the imports take: at most 1.15 times the model plus the largest tensor, in Keras's own format too."""
    kwargs = small_config(vocab_size=30_000, hidden_size=480, intermediate_size=3000, num_hidden_layers=4)
    config = IdeficsConfig(**{**kwargs, "num_attention_heads": 4, "use_resampler": False})
    config.save_pretrained(tmp_path)
    zeros = {p.name: np.zeros(p.shape, np.float32) for p in expand(config) if p.tied_to is None}
    safetensors.numpy.save_file(zeros, tmp_path / "model.safetensors", metadata={"format": "pt"})
    directory = tmp_path
    if to is not None:
        directory = tmp_path / to
        convert(tmp_path, directory, to=to, verify="none")
    finished = subprocess.run([sys.executable, "-c", MEASURE, directory], capture_output=True, text=True, check=True)
    peak, model_bytes, largest = map(int, finished.stdout.split())
    assert model_bytes > 200e6
    assert peak < 1.15 * model_bytes + largest
