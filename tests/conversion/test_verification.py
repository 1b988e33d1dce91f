"""Proof that the proof can fail: what is wrong in an output, or differs between two checkpoints, is found and named."""

import json

import numpy as np
import pytest

import conversion.streaming
from conversion import convert, verify
from conversion.opening import open_model
from tests.conversion.checkpoints import read_all as read_safetensors
from tests.conversion.checkpoints import write_checkpoint


def change(directory, name, change_array):
    """Rewrite one tensor of a safetensors checkpoint."""
    from safetensors.numpy import save_file

    tensors = read_safetensors(directory)
    tensors[name] = change_array(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


SQUARE = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change_array", "difference"),
    [
        (lambda array: np.ascontiguousarray(array.T), f"{SQUARE}: largest difference"),
        (lambda array: np.nextafter(array, np.float32(9)), f"{SQUARE}: largest difference"),
        (lambda array: array.astype(np.float64), f"{SQUARE}: float32 and float64; largest difference 0"),
    ],
    ids=["transposed", "last bit", "dtype"],
)
def test_a_single_tensor_that_differs_is_named(tmp_path, change_array, difference):
    """A missing transpose of a square kernel has the right shape; the last bit of one value counts."""
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b")
    assert verify(tmp_path / "a", tmp_path / "b").same
    change(tmp_path / "b", SQUARE, change_array)
    convert(tmp_path / "b", tmp_path / "c", to="keras")
    report = verify(tmp_path / "a", tmp_path / "c")
    assert not report.same
    assert len(report.differences) == 1
    assert report.differences[0].startswith(difference)


def test_configurations_are_compared_too(tmp_path):
    """As far as they decide what a model computes."""
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name)
    path = tmp_path / "b" / "config.json"
    values = json.loads(path.read_text()) | {"dropout": 0.5, "use_cache": False}
    path.write_text(json.dumps(values))
    assert verify(tmp_path / "a", tmp_path / "b").same
    path.write_text(json.dumps(values | {"rms_norm_eps": 1e-5}))
    assert verify(tmp_path / "a", tmp_path / "b").differences == ["config.json: rms_norm_eps is 1e-06 and 1e-05"]


def test_models_of_another_make(tmp_path):
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", "no_qk_norms")
    report = verify(tmp_path / "a", tmp_path / "b")
    assert not report.same
    name = "model.gated_cross_attn_layers.0.cross_attn.q_layer_norm.weight"
    assert f"{name} is only in {tmp_path / 'a'}" in report.differences


def forget_to_transpose(out, view):
    out[...] = view.T if out.shape == view.T.shape else view


def drop_the_last_row(out, view):
    out[...] = view
    out[-1] = 0


@pytest.mark.parametrize("broken", [forget_to_transpose, drop_the_last_row])
def test_a_broken_writer_is_caught(tmp_path, monkeypatch, checkpoint, broken):
    """The output is verified by reading it back, so an error in writing is found, and nothing is published."""
    monkeypatch.setattr(conversion.streaming, "transpose_into", broken)
    report = convert(checkpoint, tmp_path / "out", to="keras")
    assert not report.ok
    assert not report.written
    assert any(problem.startswith(SQUARE) for problem in report.problems)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_opened_is_caught(tmp_path, monkeypatch, checkpoint):
    import conversion.formats.safetensors_format as module

    real = module.safetensors_header
    monkeypatch.setattr(module, "safetensors_header", lambda tensors: real(dict(list(tensors.items())[:-1])))
    report = convert(checkpoint, tmp_path / "out", to="safetensors")
    assert report.verdict.startswith("FAILED, nothing was written: the output cannot be read back")
    assert list(tmp_path.iterdir()) == []


def test_stale_buffers_are_left_out_and_named(tmp_path):
    from safetensors.numpy import save_file

    tensors = write_checkpoint(tmp_path / "a")
    stale = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    save_file(tensors | stale, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    report = convert(tmp_path / "a", tmp_path / "b", to="keras")
    assert set(report.ignored) == set(stale)
    with open_model(tmp_path / "b") as model:
        assert model.tensors.ignored == ()
    assert verify(tmp_path / "a", tmp_path / "b").same
