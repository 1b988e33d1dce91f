"""The fine-tuning examples, end to end: the loss falls, and what was wrong becomes right and is kept in the files."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "fashion")]

import finetune_loop  # noqa: E402
import finetune_trainer  # noqa: E402
import new_question  # noqa: E402
from data import load_shipped  # noqa: E402

from idefics_common import IdeficsProcessor  # noqa: E402
from idefics_pt import IdeficsForVisionText2Text  # noqa: E402


def assert_learned(result):
    assert result["losses"][-1] < 0.1 * result["losses"][0]
    assert result["before"][new_question.QUESTION] == 0.0
    assert result["after"][new_question.QUESTION] >= 0.85
    known = new_question.NAMING[0]
    assert result["after"][known] >= result["before"][known] - 0.15


def assert_answers(folder, expected):
    model = IdeficsForVisionText2Text.from_pretrained(folder).eval()
    processor = IdeficsProcessor.from_pretrained(folder)
    assert new_question.accuracy(model, processor, load_shipped("test")) == pytest.approx(expected, abs=0.011)


def test_plain_loop(tmp_path, capsys):
    result = finetune_loop.main(["--out", str(tmp_path)])
    assert_learned(result)
    assert_answers(tmp_path, result["after"])
    printed = capsys.readouterr().out
    assert "vision tower" in printed
    assert f"{result['after'][new_question.QUESTION]:.0%}" in printed


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_trainer_with_adapters(tmp_path):
    result = finetune_trainer.main(["--out", str(tmp_path)])
    assert_learned(result)
    assert_answers(tmp_path / "merged", result["after"])
    base = IdeficsForVisionText2Text.from_pretrained(finetune_trainer.FASHION / "checkpoint")
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    merged = IdeficsForVisionText2Text.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
