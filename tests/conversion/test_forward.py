"""`--verify forward`: both models run, in the room of their format, and a difference is traced to a block."""

import importlib.util

import pytest

import conversion.forward
import tests.tf.settings  # noqa: F401 - before TensorFlow runs anything
from conversion import ConversionError, convert, verify
from tests.conversion.checkpoints import write_checkpoint
from tests.conversion.test_verification import change
from tests.requirements import needs_torch


@needs_torch
@pytest.mark.parametrize(
    ("target", "dtype", "rooms"),
    [
        ("keras", "keep", ("idefics_pt", "idefics_tf")),
        ("bin", "bfloat16", ("idefics_pt", "idefics_pt")),
    ],
)
def test_the_same_answers(tmp_path, capsys, checkpoint, target, dtype, rooms):
    """A cast model answers as the source does with its values rounded alike."""
    report = convert(checkpoint, tmp_path / "out", to=target, dtype=dtype, verify="forward", progress=True)
    assert report.ok, report
    assert report.forward.rooms == rooms
    assert report.forward.error < 1e-5
    assert report.verdict.endswith("and the same answers")
    assert "of memory for one model at a time" in capsys.readouterr().err


def test_the_first_block_that_differs_is_named(tmp_path):
    """Every model agrees before layer 2, whose query is changed, and not after."""
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name)
    change(tmp_path / "b", "model.layers.2.self_attn.q_proj.weight", lambda array: array * 1.5)
    report = verify(tmp_path / "a", tmp_path / "b", forward=True)
    assert not report.same
    assert report.forward.first_difference == "decoder layer 2"
    change(tmp_path / "b", "model.perceiver_resampler.latents", lambda array: array * 2)
    report = verify(tmp_path / "a", tmp_path / "b", forward=True)
    assert report.forward.first_difference == "image features"


def test_a_model_that_answers_otherwise_is_not_published(tmp_path, monkeypatch, checkpoint):
    monkeypatch.setattr(conversion.forward, "TOLERANCE", -1.0)
    report = convert(checkpoint, tmp_path / "out", to="safetensors", verify="forward")
    assert not report.ok
    assert "logits differ by" in report.verdict
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_room_whose_framework_is_missing_is_not_needed(tmp_path, monkeypatch, checkpoint):
    installed = {"torch"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    report = convert(checkpoint, tmp_path / "out", to="keras", verify="forward")
    assert report.forward.rooms == ("idefics_pt", "idefics_pt")
    installed.clear()
    with pytest.raises(ConversionError, match="needs torch or tensorflow"):
        verify(checkpoint, tmp_path / "out", forward=True)
