"""The Keras fine-tuning example, end to end: the loss falls, and the saved model has it."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "fashion")]

import finetune_keras  # noqa: E402

from idefics_common import IdeficsCollator, IdeficsProcessor  # noqa: E402
from idefics_tf import TFIdeficsForVisionText2Text  # noqa: E402
from idefics_tf.lora import adapted_layers, load_adapters  # noqa: E402


def losses(model, processor):
    """The loss on the photographs that the example evaluates on."""
    prompts = finetune_keras.answered_prompts(finetune_keras.load_shipped("test"))[::4]
    dataset = finetune_keras.batches(IdeficsCollator(processor, return_tensors="np"), prompts, 25)
    model.compile(run_eagerly=True)  # tracing takes longer than these few batches
    return model.evaluate(dataset, verbose=0)


def test_the_example_learns_and_saves(tmp_path, capsys):
    result = finetune_keras.main(["--out", str(tmp_path), "--steps", "4"])
    assert result["after"]["loss"] < 0.75 * result["before"]["loss"]
    assert result["after"]["accuracy"] > result["before"]["accuracy"]
    assert "vision tower" in capsys.readouterr().out
    saved = TFIdeficsForVisionText2Text.from_pretrained(tmp_path)
    processor = IdeficsProcessor.from_pretrained(tmp_path)
    assert losses(saved, processor) == pytest.approx(result["after"]["loss"], rel=1e-3)
    assert not (tmp_path / "adapters").exists()


def test_the_example_learns_adapters_and_saves(tmp_path, capsys):
    result = finetune_keras.main(["--out", str(tmp_path), "--steps", "12", "--lora"])
    assert result["after"]["loss"] < 0.6 * result["before"]["loss"]
    assert result["after"]["accuracy"] > result["before"]["accuracy"]
    assert "vision tower" in capsys.readouterr().out
    processor = IdeficsProcessor.from_pretrained(tmp_path)
    saved = TFIdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert losses(saved, processor) == pytest.approx(result["after"]["loss"], rel=1e-3)
    adapted = TFIdeficsForVisionText2Text.from_pretrained(EXAMPLES / "fashion" / "checkpoint")
    load_adapters(adapted, tmp_path / "adapters")
    assert len(adapted_layers(adapted)) == 4 * 7 + 2 * 7
    assert losses(adapted, processor) == pytest.approx(result["after"]["loss"], rel=1e-3)
