"""Opening what a person has: directories, shards with an index, single files, the hub cache."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from idefics_common.checkpoint import CheckpointError, TensorSource, open_checkpoint

REPOSITORY = Path(__file__).parents[2]
_rng = np.random.default_rng(0)
SHARDS = {
    "model-00001-of-00002.safetensors": {
        "embed": _rng.normal(size=(6, 4)).astype(ml_dtypes.bfloat16),
        "norm": _rng.normal(size=4).astype(np.float32),
    },
    "model-00002-of-00002.safetensors": {"head": _rng.normal(size=(6, 4)).astype(np.float16)},
}
FIRST, SECOND = SHARDS
TENSORS = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}
INDEX = "model.safetensors.index.json"


def write_sharded(directory: Path, shards=SHARDS, index=None) -> Path:
    directory.mkdir(exist_ok=True)
    for shard_name, tensors in shards.items():
        save_file(tensors, directory / shard_name)
    if index is None:
        index = make_index()
    (directory / INDEX).write_text(json.dumps(index))
    return directory


def make_index(**changes) -> dict:
    weight_map = {name: shard_name for shard_name, shard in SHARDS.items() for name in shard}
    total_size = sum(tensor.nbytes for tensor in TENSORS.values())
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map | changes}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def assert_holds(checkpoint, tensors):
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        ours = checkpoint.read(name)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())


@pytest.mark.parametrize("what", ["directory", "index"])
def test_sharded(tmp_path, what):
    directory = write_sharded(tmp_path / "sharded")
    with open_checkpoint(directory if what == "directory" else directory / INDEX) as checkpoint:
        assert isinstance(checkpoint, TensorSource)
        assert checkpoint.format == "safetensors"
        assert checkpoint.files == (directory / FIRST, directory / SECOND)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
        assert checkpoint.notes == ()
        assert_holds(checkpoint, TENSORS)
        assert list(checkpoint) == list(checkpoint.infos)
        assert list(checkpoint)[-1] == "head", "iteration goes file by file"
        assert checkpoint.infos["head"] == checkpoint.info("head")
        assert checkpoint.info("head").file == directory / SECOND
        assert "head" in checkpoint
        assert "heads" not in checkpoint
        assert len(checkpoint) == 3
        assert checkpoint.read_rows("head", 2, 4).tobytes() == TENSORS["head"][2:4].tobytes()
        with pytest.raises(CheckpointError, match="tensor 'heads': not in this checkpoint of 3 tensors"):
            checkpoint.read("heads")
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("head")


def test_precedence_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    names = {
        "model.safetensors": lambda path: save_file({"single": np.ones(1)}, path),
        INDEX: lambda path: write_sharded(path.parent),
        "pytorch_model.bin": lambda path: torch.save({"bin": torch.ones(1)}, path),
        "pytorch_model.bin.index.json": lambda path: (
            torch.save({"shard": torch.ones(1)}, path.parent / "pytorch_model-00001-of-00001.bin"),
            path.write_text(json.dumps({"weight_map": {"shard": "pytorch_model-00001-of-00001.bin"}})),
        ),
    }
    first_names = []
    for name, write in reversed(names.items()):
        write(tmp_path / name)
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.path == tmp_path / name
            first_names.append((checkpoint.format, list(checkpoint)[-1]))
    assert first_names == [("bin", "shard"), ("bin", "bin"), ("safetensors", "head"), ("safetensors", "single")]


def test_sharded_bin_with_tied_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    embed = torch.randn(6, 4).bfloat16()
    torch.save({"embed": embed, "head": embed}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"norm": torch.ones(4)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"embed": 1, "head": 1, "norm": 2}
    weight_map = {name: f"pytorch_model-0000{number}-of-00002.bin" for name, number in weight_map.items()}
    for total_size in (48 + 16, 48 + 48 + 16):
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.format == "bin"
            assert checkpoint.notes == ()
            values = embed.float().numpy().astype(ml_dtypes.bfloat16)
            assert_holds(checkpoint, {"embed": values, "head": values, "norm": np.ones(4, np.float32)})


@pytest.mark.parametrize("name", ["adapter.safetensors", FIRST])
def test_a_single_file_of_any_name(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    with open_checkpoint(str(tmp_path / name)) as checkpoint:
        assert checkpoint.files == (tmp_path / name,)
        assert_holds(checkpoint, TENSORS)


def test_wrong_total_size_is_a_warning_for_nothing_depends_on_it(tmp_path):
    index = make_index()
    index["metadata"]["total_size"] += 1
    directory = write_sharded(tmp_path / "sharded", index=index)
    with pytest.warns(UserWarning, match="total_size is 113, but its tensors take 112 bytes") as caught:
        checkpoint = open_checkpoint(directory)
    assert caught[0].filename == __file__
    with checkpoint:
        assert checkpoint.notes == (f"{directory / INDEX}: total_size is 113, but its tensors take 112 bytes",)
        assert_holds(checkpoint, TENSORS)


BAD_INDEXES = {
    "missing shard": (
        make_index(head="model-00003-of-00003.safetensors"),
        f"{INDEX}: shard model-00003-of-00003.safetensors is missing, in which 1 of its 3 entries lie",
    ),
    "tensor that no shard holds": (
        make_index(ghost=FIRST),
        f"{FIRST}: tensor 'ghost': is not in this shard, where {INDEX} puts it",
    ),
    "tensor in another shard": (
        make_index(head=FIRST, norm=SECOND),
        f"{FIRST}: tensor 'norm': is in this shard, but {INDEX} puts it in {SECOND}",
    ),
    "tensor that the index does not name": (
        {"weight_map": {name: shard for name, shard in make_index()["weight_map"].items() if name != "norm"}},
        f"{FIRST}: tensor 'norm': is in this shard, but {INDEX} does not name it",
    ),
    "no weight map": ({"metadata": {}}, f"{INDEX}: weight_map must map tensor names to shard names, got None"),
    "empty weight map": ({"weight_map": {}}, f"{INDEX}: weight_map must map"),
    "weight map a list": ({"weight_map": [FIRST]}, f"{INDEX}: weight_map must map"),
    "shard name a number": (make_index(head=7), f"{INDEX}: tensor 'head': the name of its shard must be a string"),
    "not an object": ([], f"{INDEX}: is not usable JSON: expected an object {{...}}, got list"),
} | {
    f"shard name {name!r}": (make_index(head=name), f"{INDEX}: shard {name!r} refused: expected the name of a")
    for name in [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/model.safetensors",
        "./" + SECOND,
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "..",
        "",
        "model.bin",
        "a\0b.safetensors",
        "\x1b[2J.safetensors",
    ]
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused_by_name(tmp_path, case):
    index, message = BAD_INDEXES[case]
    save_file({"head": TENSORS["head"]}, tmp_path / "outside.safetensors")
    directory = write_sharded(tmp_path / "sharded", index=index)
    (directory / "sub").mkdir()
    assert refusal(directory).startswith(f"{directory}/{message}")


def test_index_that_is_no_json(tmp_path):
    directory = write_sharded(tmp_path / "sharded")
    text = (directory / INDEX).read_text()
    for damaged, message in [
        (text[:-1], "is not usable JSON"),
        (text.replace('"norm"', '"embed"'), "'embed' appears twice"),
        (text + " " * 2**24, "at most 16777216 are read"),
    ]:
        (directory / INDEX).write_text(damaged)
        assert message in refusal(directory)


def test_damaged_shard_is_named(tmp_path):
    directory = write_sharded(tmp_path / "sharded")
    content = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes(content[:-1])
    assert refusal(directory).startswith(f"{directory / SECOND}: tensor 'head': lies at 0:48 of the data")


@pytest.mark.parametrize("name", [SECOND, INDEX])
def test_link_that_leads_outside_is_refused(tmp_path, name):
    directory = write_sharded(tmp_path / "sharded")
    outside = tmp_path / f"secret-{name}"
    shutil.move(directory / name, outside)
    (directory / name).symlink_to(outside)
    assert refusal(directory) == (f"{directory / name}: refused: it is a link to '{outside}', outside its directory")


def test_links_inside_and_a_linked_directory_are_followed(tmp_path):
    directory = write_sharded(tmp_path / "sharded")
    (directory / "real.safetensors").symlink_to(shutil.move(directory / SECOND, directory / "real"))
    (directory / SECOND).symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(directory)
    with open_checkpoint(tmp_path / "link") as checkpoint:
        assert_holds(checkpoint, TENSORS)


def test_links_that_lead_nowhere(tmp_path):
    directory = write_sharded(tmp_path / "sharded")
    (directory / SECOND).unlink()
    (directory / SECOND).symlink_to("gone.safetensors")
    assert refusal(directory) == f"{directory / SECOND}: cannot be opened: No such file or directory"
    (directory / SECOND).unlink()
    (directory / SECOND).symlink_to(SECOND)
    assert refusal(directory).startswith(f"{directory / SECOND}: cannot be opened: Too many levels")


def test_hub_cache_snapshot_whose_files_are_links_to_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    write_sharded(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = shutil.move(file, repository / "blobs" / f"{number:064x}")
        file.symlink_to(Path("../../blobs") / blob.name)
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.files == (snapshot / FIRST, snapshot / SECOND)
        assert_holds(checkpoint, TENSORS)
    secret = shutil.move(repository / "blobs" / f"{0:064x}", tmp_path / "secret")
    (repository / "blobs" / f"{0:064x}").symlink_to(secret)
    assert "outside its directory" in refusal(snapshot)


def test_nothing_to_open(tmp_path):
    assert refusal(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such file or directory"
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no checkpoint: looked for model.safetensors, {INDEX}, pytorch_model.bin, "
        "pytorch_model.bin.index.json"
    )
    for name in ("config.json", "model.gguf", "tf_model.h5.index.json"):
        (tmp_path / name).write_text("{}")
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: the file name ends in none of .safetensors")


def test_error_survives_pickling_between_processes():
    error = CheckpointError(Path("model.safetensors"), "leaves a gap", "w")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "model.safetensors: tensor 'w': leaves a gap"
    assert (again.file, again.problem, again.tensor) == ("model.safetensors", "leaves a gap", "w")


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_index_is_refused_or_changes_nothing(tmp_path_factory, data):
    directory = write_sharded(tmp_path_factory.getbasetemp() / "mutated")
    text = json.dumps({"weight_map": make_index()["weight_map"]})
    pieces = ["", "../", "/", "\\", "\0", '"', "{", "}", "[", "]", ",", ":", "1", "2", "null", "é", "\\ud800", " "]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.sampled_from(pieces)) + text[place + data.draw(st.integers(0, 2)) :]
    (directory / INDEX).write_text(text)
    try:
        checkpoint = open_checkpoint(directory)
    except CheckpointError as error:
        assert str(error).startswith(str(directory))  # noqa: PT017 - either outcome is right
        return
    with checkpoint:
        assert_holds(checkpoint, TENSORS)


def test_reading_imports_no_framework_and_not_safetensors_either(tmp_path):
    directory = write_sharded(tmp_path / "sharded")
    program = (
        "import sys, ml_dtypes\n"
        "from idefics_common.checkpoint import open_checkpoint\n"
        "with open_checkpoint(sys.argv[1]) as checkpoint:\n"
        "    for name in checkpoint: print(name, checkpoint.read(name).dtype, checkpoint.info(name).shape)\n"
        "others = {'torch', 'tensorflow', 'keras', 'transformers', 'safetensors'}\n"
        "print(sorted(others & set(sys.modules)))\n"
        "import safetensors\n"
        "print(sorted(others & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, directory], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    *tensors, without, detected = done.stdout.splitlines()
    assert sorted(tensors) == ["embed bfloat16 (6, 4)", "head float16 (6, 4)", "norm float32 (4,)"]
    assert without == "[]"
    assert detected == "['safetensors']", "the detector sees none of them, even when one is there"
