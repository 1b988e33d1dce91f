"""A checkpoint at fault is refused by both rooms and by the converter, and in the same words."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.opening import open_model
from idefics_pt import IdeficsForVisionText2Text
from idefics_tf import TFIdeficsForVisionText2Text
from idefics_tf.weights import weights_by_name
from tests.conversion.checkpoints import write_checkpoint

LOADERS = {
    "pt": IdeficsForVisionText2Text.from_pretrained,
    "tf": TFIdeficsForVisionText2Text.from_pretrained,
    "converter": open_model,
}


def change(directory, change_tensors):
    tensors = load_file(directory / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def truncate(directory):
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-100])


def lose_a_shard(directory):
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


FAULTS = {
    "a tensor is missing": lambda d: change(d, lambda tensors: tensors.pop("model.norm.weight")),
    "a head is missing": lambda d: change(d, lambda tensors: tensors.pop("lm_head.weight")),
    "a tensor is not the model's": lambda d: change(d, lambda tensors: tensors.update(wait=np.ones(3, np.float32))),
    "another shape": lambda d: change(d, lambda t: t.update({"model.norm.weight": np.ones(25, np.float32)})),
    "another dtype": lambda d: change(d, lambda t: t.update({"model.norm.weight": np.ones(24, np.int32)})),
    "a truncated file": truncate,
    "a shard is missing": lose_a_shard,
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "no configuration": lambda d: (d / "config.json").unlink(),
    "a configuration that is no JSON": lambda d: (d / "config.json").write_text("{"),
    "a configuration of another model": lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_fault_the_same_sentence(tmp_path, fault):
    write_checkpoint(tmp_path / "model")
    FAULTS[fault](tmp_path / "model")
    messages = {}
    for loader, load in LOADERS.items():
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load(tmp_path / "model")
        messages[loader] = str(caught.value)
    assert str(tmp_path / "model") in messages["converter"]
    if fault == "no weights":
        # the converter looks for two formats more
        messages = {loader: message.partition(", model.weights.h5")[0] for loader, message in messages.items()}
    assert len(set(messages.values())) == 1, messages


def test_a_checkpoint_without_its_head_lacks_the_head_alone(tmp_path):
    """Bare names, as `IdeficsModel` is saved: the rest is found, and both rooms miss only what is not there."""
    tensors = write_checkpoint(tmp_path / "model")
    bare = {name.removeprefix("model."): array for name, array in tensors.items() if not name.startswith("lm_head.")}
    save_file(bare, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for loader in ("pt", "tf"):
        with pytest.raises(
            ValueError, match=r"2 missing\n  - lm_head\.weight .*\n  - lm_head\.additional_fc\.weight .*$"
        ):
            LOADERS[loader](tmp_path / "model")
    with open_model(tmp_path / "model") as model:
        assert not model.has_head


def test_a_tied_head_is_not_missed_in_either_room(tmp_path):
    tensors = write_checkpoint(tmp_path / "model", "tied")
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    save_file(bare, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    ours = LOADERS["pt"](tmp_path / "model").lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(ours, tensors["model.embed_tokens.weight"])
    theirs = weights_by_name(LOADERS["tf"](tmp_path / "model"))["model.embed_tokens.weight"].variable.numpy()
    np.testing.assert_array_equal(theirs, ours)
