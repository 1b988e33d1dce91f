"""Checkpoints from the hub, of which these tests have a cache like huggingface_hub's and no network."""

import os
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from conversion import convert
from idefics_common.checkpoint import CheckpointError
from idefics_common.checkpoint.hub import looks_like_hub_id
from tests.conversion.checkpoints import assert_same_tensors, read_all


def test_a_snapshot_of_the_cache_is_converted(tmp_path, monkeypatch, checkpoint):
    """Its files are links to blobs outside the snapshot, which no other directory's may be."""
    repository = tmp_path / "models--someone--idefics"
    snapshot = repository / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint, repository / "blobs")
    asked = []

    def download(repo_id, allow_patterns):
        asked.append(repo_id)
        for name in os.listdir(repository / "blobs"):
            is_wanted = any(name == pattern for pattern in allow_patterns)
            if is_wanted and not (snapshot / name).exists():
                (snapshot / name).symlink_to(f"../../blobs/{name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    report = convert("someone/idefics", tmp_path / "out", to="safetensors")
    assert report.source == "someone/idefics"
    assert asked == ["someone/idefics"]
    assert_same_tensors(read_all(tmp_path / "out"), read_all(checkpoint))
    (repository / "blobs" / "model.safetensors").unlink()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"the repository holds no checkpoint: looked for model\.safetensors, .*tf_model\*\.h5"
    ):
        convert("someone/idefics", tmp_path / "other", to="safetensors")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "it is not in the cache, and the hub cannot be reached"),
        (OSError("no route"), "the hub cannot be reached: no route"),
    ],
)
def test_what_the_hub_does_not_give(tmp_path, monkeypatch, error, message):
    def download(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=f"^someone/idefics: no such file or directory.*{message}"):
        convert("someone/idefics", tmp_path / "out", to="bin")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("someone/idefics", True),
        ("gpt2", True),
        ("a/b/c", False),
        ("/data/idefics", False),
        ("../idefics", False),
        ("./idefics", False),
        ("~/idefics", False),
        ("idefics/", False),
    ],
)
def test_what_looks_like_an_id(source, expected):
    assert looks_like_hub_id(source) == expected
