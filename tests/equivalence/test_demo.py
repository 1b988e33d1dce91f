"""`make demo`: both rooms answer alike, TensorFlow's from converted files alone, and a difference fails the demo."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "fashion")]

import demo  # noqa: E402
import rooms  # noqa: E402
from data import load_shipped  # noqa: E402
from prompts import Turn, naming, ordinal  # noqa: E402

CHECKPOINT = EXAMPLES / "fashion" / "checkpoint"


def test_both_rooms_answer_alike(tmp_path, capfd):
    directory = tmp_path / "keras"
    directory.mkdir()
    (directory / "config.json").write_text("{}")  # what an earlier demo has written is replaced
    rooms.convert_to_keras(CHECKPOINT, directory)
    assert (
        "verified: 173 tensors read back and compared with the source, and the same answers" in capfd.readouterr().out
    )
    assert not list(directory.glob("*.safetensors"))
    panel = rooms.Panel({"PyTorch": rooms.pytorch_room(CHECKPOINT), "TensorFlow": rooms.tensorflow_room(directory)})
    photographs = load_shipped("test")
    labels = photographs.labels.tolist()
    dialogues = [naming(number, labels[number]) for number in range(0, 200, 20)]
    dialogues += [ordinal([18, 2], [labels[18], labels[2]], which) for which in (0, 1)]
    given = panel.ask(dialogues, photographs)
    assert panel.first_difference is None
    assert panel.count == len(dialogues)
    assert given["TensorFlow"] == given["PyTorch"]
    assert len(set(given["TensorFlow"])) > 5
    assert panel.ask([[Turn(("What do you run in?",), "")]])["TensorFlow"] == ["A sneaker."]


def room(**exceptions):
    """Answers "Yes." to all prompts but those whose last question is one of the exceptions."""
    return lambda prompts: [exceptions.get(prompt[-2], "Yes.") for prompt in prompts]


@pytest.mark.parametrize("exceptions", [{}, {"What do you run in?": "A sandal.", "Where do you wear a coat?": "No."}])
def test_the_demo_fails_where_rooms_differ(monkeypatch, tmp_path, capsys, exceptions):
    fakes = {"PyTorch": {}, "TensorFlow": {f"User: {question}": answer for question, answer in exceptions.items()}}
    monkeypatch.setattr(demo, "open_room", lambda name, checkpoint, out: room(**fakes[name]))
    status = demo.main(["--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert (tmp_path / "contact-sheet.png").is_file()
    if exceptions:
        assert status == 1
        difference = "question 17, What do you run in?: PyTorch: 'Yes.', TensorFlow: 'A sandal.'"
        assert printed.err.endswith(f"The rooms differ: {difference}\n")
        assert "same" not in printed.out
    else:
        assert status == 0
        assert printed.out.endswith("PyTorch and TensorFlow gave the same 218 answers\n")
