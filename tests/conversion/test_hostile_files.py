"""Files made to do harm, and files that are not whole: refused with the file named, before anything is written."""

import importlib.util
import json
import os
import pickle
import resource
import shutil

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion import convert, inspect, verify
from conversion.opening import open_model
from idefics_common.checkpoint import CheckpointError
from tests.conversion.checkpoints import FORMATS, write_checkpoint
from tests.requirements import needs_torch

PLACES = 50


@pytest.fixture(scope="module")
def converted(tmp_path_factory, checkpoint):
    """One checkpoint in every format, in two shards or more and in one file: (format, is_sharded) to directory."""
    directory = tmp_path_factory.mktemp("converted")
    directories = {}
    for target in FORMATS:
        if target == "bin" and importlib.util.find_spec("torch") is None:
            continue
        for is_sharded, size in ((False, "5GB"), (True, "100KB")):
            directories[target, is_sharded] = directory / f"{target}-{is_sharded}"
            convert(checkpoint, directories[target, is_sharded], to=target, max_shard_size=size, verify="none")
    return directories


@pytest.fixture
def keras(tmp_path, converted):
    """A directory of its own with a whole `model.weights.h5`, to be spoiled."""
    return shutil.copytree(converted["keras", False], tmp_path / "keras")


def refusal(directory) -> str:
    """The message with which a directory is refused; nothing appears and nothing is left behind."""
    before = sorted(directory.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(directory, directory.parent / "out", to="safetensors")
    assert sorted(directory.parent.iterdir()) == before
    assert str(caught.value) in inspect(directory).problems
    return str(caught.value)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("target", FORMATS)
def test_truncated_files_are_refused(tmp_path, converted, target, is_sharded):
    """Every file of every format, cut at 50 places: the error names it, or the index that cannot be read."""
    source = converted[target, is_sharded]
    directory = shutil.copytree(source, tmp_path / "cut")
    for path in sorted(source.iterdir()):
        if path.name == "conversion-report.json":
            continue
        size = path.stat().st_size
        # the last byte of a text file is the end of its last line, which nothing misses
        last = size - 2 if path.suffix == ".json" else size - 1
        cuts = {min(last, int(size * place / PLACES)) for place in range(PLACES)} | {last}
        for cut in sorted(cuts):
            shutil.copyfile(path, directory / path.name)
            os.truncate(directory / path.name, cut)
            with pytest.raises(CheckpointError) as caught:
                open_model(directory)
            assert path.name in str(caught.value), f"{path.name} cut at {cut}"
        shutil.copyfile(path, directory / path.name)
    with open_model(directory):
        pass


def soft_link(file):
    file["layers/more"] = h5py.SoftLink("/layers")


def external_link(file):
    file["layers/more"] = h5py.ExternalLink("/etc/passwd", "/")


def loop(file):
    file["layers/more"] = file["layers"]


def shared_values(file):
    file["layers/tf_idefics_model/layers/rms_norm/vars/1"] = file["layers/tf_idefics_model/layers/rms_norm/vars/0"]


def compressed(file):
    file.create_dataset("layers/bomb", (2**36,), "f4", compression="gzip", chunks=(2**20,))


def chunked(file):
    file.create_dataset("layers/bomb", (2**36,), "f4", chunks=(2**20,))


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("layers/more", layout)


def external_values(file):
    file.create_dataset("layers/more", (4,), "u1", external=[("/etc/passwd", 0, 4)])


def never_written(file):
    file.create_dataset("layers/more", (2**40,), "f4")


def opaque_without_mark(file):
    file.create_dataset("layers/more", data=np.zeros(3, "V2"))


def nested_deeply(file):
    file.create_group("/".join(["a"] * 100))


def named_type(file):
    file["layers/more"] = np.dtype("f4")


def big_endian(file):
    file.create_dataset("layers/more", data=np.zeros(3, ">f4"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (soft_link, "'layers/more' is a SoftLink"),
        (external_link, "'layers/more' is a ExternalLink"),
        (loop, "'layers/more' is linked to from two places"),
        (shared_values, "is linked to from two places"),
        (compressed, "'layers/bomb': refused: its values are compressed"),
        (chunked, "'layers/bomb': refused: its values are compressed, in chunks"),
        (virtual, "'layers/more': refused"),
        (external_values, "'layers/more': refused: its values are in another file"),
        (never_written, "do not lie in the file"),
        (opaque_without_mark, "is none of bfloat16 as Keras marks it"),
        (nested_deeply, "nested deeper than 32"),
        (named_type, "neither a group nor a dataset"),
        (big_endian, "is none of bfloat16"),
    ],
)
def test_hostile_hdf5_is_refused(keras, spoil, message):
    with h5py.File(keras / "model.weights.h5", "a") as file:
        spoil(file)
    assert message in refusal(keras)


def test_a_mark_of_bfloat16_that_is_said_to_be_4_gb_long(tmp_path):
    """HDF5 would take that memory to read it."""
    write_checkpoint(tmp_path / "source", dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "keras", to="keras")
    path = tmp_path / "keras" / "model.weights.h5"
    data = bytearray(path.read_bytes())
    # name, type and space of the attribute, then the length of its text
    length_at = data.index(len("bfloat16").to_bytes(4, "little"), data.index(b"dtype\0") + 32)
    data[length_at : length_at + 4] = b"\xff" * 4
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert verify(tmp_path / "source", tmp_path / "keras").same
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_tensors_that_are_not_the_models_are_refused(keras):
    with h5py.File(keras / "model.weights.h5", "a") as file:
        norm = file["layers/tf_idefics_model/layers/rms_norm/vars"]
        norm["7"] = np.zeros(3, np.float32)
        del norm["0"]
    message = refusal(keras)
    assert "- layers/tf_idefics_model/layers/rms_norm/vars/0 (24,)" in message
    assert "+ 'layers/tf_idefics_model/layers/rms_norm/vars/7' (3,)" in message


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(
    ("shard_name", "message"),
    [
        ("../secret{ending}", "refused: expected the name of a"),
        ("/etc/passwd", "refused: expected the name of a"),
        ("a\\b{ending}", "refused: expected the name of a"),
        ("link{ending}", "outside its directory"),
        ("gone{ending}", "is missing"),
    ],
)
def test_an_index_does_not_lead_outside(tmp_path, converted, target, shard_name, message):
    directory = shutil.copytree(converted[target, True], tmp_path / "source")
    index_path = next(path for path in directory.iterdir() if path.name.endswith((".index.json", ".weights.json")))
    index = json.loads(index_path.read_text())
    first = next(iter(index["weight_map"]))
    file_name = index["weight_map"][first]
    ending = ".weights.h5" if target == "keras" else os.path.splitext(file_name)[1]
    index["weight_map"][first] = shard_name.format(ending=ending)
    index_path.write_text(json.dumps(index))
    shutil.copyfile(directory / file_name, tmp_path / "outside")
    os.symlink(tmp_path / "outside", directory / f"link{ending}")
    assert message in refusal(directory)


def test_companions_do_not_lead_outside(tmp_path, converted):
    """A tokenizer.json that is a link to some other file of this machine is not copied."""
    directory = shutil.copytree(converted["safetensors", False], tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", directory / "tokenizer.json")
    with pytest.raises(CheckpointError, match="outside its directory"):
        convert(directory, tmp_path / "out", to="keras")
    assert not (tmp_path / "out").exists()


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@needs_torch
def test_a_pickle_runs_no_code(tmp_path, monkeypatch, converted):
    import torch

    monkeypatch.chdir(tmp_path)
    directory = shutil.copytree(converted["bin", False], tmp_path / "source")
    torch.save({"x": _Evil()}, directory / "pytorch_model.bin", pickle_protocol=2, pickle_module=pickle)
    assert "a pickle may run code" in refusal(directory)
    assert not (tmp_path / "evil").exists()


def test_a_header_of_2_to_the_63_bytes(tmp_path, converted):
    directory = shutil.copytree(converted["safetensors", False], tmp_path / "source")
    with open(directory / "model.safetensors", "r+b") as file:
        file.write((2**63).to_bytes(8, "little"))
    assert "the header is said to be 9223372036854775808 bytes long" in refusal(directory)


def test_a_tied_tensor_with_other_values_is_refused(tmp_path):
    tensors = write_checkpoint(tmp_path / "source", "tied")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    assert "set tie_word_embeddings to false" in refusal(tmp_path / "source")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (None, "is int8, as bitsandbytes in 8 bits writes it; expected floating point"),
        (
            {"load_in_8bit": True},
            "is int8, quantised by bitsandbytes in 8 bits: expected floating point. Load",
        ),
        ({"load_in_4bit": True}, "was written by bitsandbytes in 8 bits, and config.json says bitsandbytes in 4 bits"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_name(tmp_path, declared, message):
    """E2: as bitsandbytes stores one layer of it."""
    tensors, name = write_checkpoint(tmp_path / "source"), "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(np.int8)
    tensors[f"{name}.SCB"] = np.ones(24, np.float32)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": declared}))
    assert f"tensor '{name}.weight': {message}" in refusal(tmp_path / "source")


def test_a_quantisation_that_no_tensor_has_is_refused(tmp_path):
    """E2: what is written beside the converted tensors would say so, too."""
    write_checkpoint(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    values = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}}
    config.write_text(json.dumps(values))
    assert "says quantised by torchao, but all tensors are floating point" in refusal(tmp_path / "source")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: is missing"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b'{"model_type": "llama"}', "expected model_type 'idefics'"),
        (b'{"model_type": "idefics", "hidden_size": "x"}', "config.json"),
        (b"[" * 100_000, "config.json"),
        (b'{"vision_config": 3}', "expected an object of fields, got int"),
        (b'{"num_hidden_layers": 1000000000000}', "numbers of layers must be 10000 or less"),
        (b'{"vision_config": {"num_hidden_layers": "2"}}', "config.json: vision_config.num_hidden_layers must be"),
    ],
)
def test_unusable_configurations_are_refused(tmp_path, converted, content, message):
    directory = shutil.copytree(converted["keras", False], tmp_path / "source")
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    assert message in refusal(directory)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        convert(tmp_path / "nothing", tmp_path / "out", to="keras")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: looked for model\.safetensors"):
        convert(tmp_path, tmp_path / "out", to="keras")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"not in the cache, and the hub cannot be reached"):
        convert("nobody/nothing", tmp_path / "out", to="keras")
