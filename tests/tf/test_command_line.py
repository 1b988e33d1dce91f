"""``python -m idefics_tf generate`` writes what `generate` does; `tests/pt` tests what is common to both rooms."""

import subprocess
import sys

import pytest
from PIL import Image

from idefics_common import IdeficsProcessor, sample_checkpoint, sample_photograph
from idefics_tf import TFIdeficsForVisionText2Text
from idefics_tf.__main__ import main

QUESTION = "What is this?"


def test_it_writes_what_generate_does(capsys):
    arguments = ["generate", "--model", str(sample_checkpoint()), "--image", str(sample_photograph())]
    assert main([*arguments, "--prompt", QUESTION, "--chat", "--dtype", "bfloat16", "--max-new-tokens", "4"]) == 0
    written = capsys.readouterr().out
    processor = IdeficsProcessor.from_pretrained(sample_checkpoint())
    model = TFIdeficsForVisionText2Text.from_pretrained(sample_checkpoint(), dtype="bfloat16")
    processor.generation_config(model)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=prompt, images=[Image.open(sample_photograph())], return_tensors="tf")
    tokens = model.generate(inputs, do_sample=False, max_new_tokens=4, disable_compile=True)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written.strip() == expected.strip() != ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/nowhere/at/all"}, "/nowhere/at/all: config.json cannot be loaded"),
        ({"--image": "/nowhere/photograph.png"}, "/nowhere/photograph.png"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be at least 1, got 0"),
        ({"--device": "toaster"}, "--device toaster cannot be used: TensorFlow has cpu:0"),
        ({"--device": "cpu:7"}, "--device cpu:7 cannot be used: TensorFlow has cpu:0"),
    ],
)
def test_errors_are_one_message(change, message, capsys):
    options = {
        "--model": str(sample_checkpoint()),
        "--image": str(sample_photograph()),
        "--prompt": QUESTION,
        "--max-new-tokens": "1",
        **change,
    }
    assert main(["generate", *(part for option in options.items() for part in option)]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line.lower())
    assert line.startswith("error: ")
    assert message in line


def test_as_a_program(tmp_path):
    """In a process of its own, which knows only TensorFlow; and in one that has no TensorFlow."""
    arguments = ["generate", "--model", str(sample_checkpoint()), "--chat", "--image", str(sample_photograph())]
    command = [sys.executable, "-m", "idefics_tf", *arguments, "--prompt", QUESTION]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout.strip()) == (0, "An ankle boot."), finished.stderr
    (tmp_path / "tensorflow.py").write_text("raise ImportError('no tensorflow')")
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.stderr == "error: Keras on TensorFlow cannot be used: no tensorflow\n"
