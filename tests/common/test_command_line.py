"""The command line of both rooms, as far as it comes without their frameworks."""

import subprocess
import sys

import pytest

from idefics_common.command_line import is_run

LARGE = ("torch", "tensorflow", "keras", "transformers", "numpy")


@pytest.mark.parametrize("room", ["idefics_pt", "idefics_tf"])
@pytest.mark.parametrize(
    ("arguments", "code", "written"),
    [
        (["--help"], 0, "generate"),
        (["generate", "--help"], 0, "--max-new-tokens"),
        (["generate", "--model", "x", "--prompt", "y", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
    ],
)
def test_arguments_are_read_before_anything_large_is_imported(room, arguments, code, written):
    command = [sys.executable, "-X", "importtime", "-m", room, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    times, others = [], []
    for line in finished.stderr.splitlines():
        (times if line.startswith("import time:") else others).append(line)
    imported = {line.rpartition("|")[2].strip() for line in times}
    assert finished.returncode == code
    assert written in finished.stdout + "\n".join(others)
    assert "idefics_common.command_line" in imported
    assert imported.isdisjoint(LARGE)


@pytest.mark.parametrize(
    ("started", "argv", "expected"),
    [
        (["python", "-m", "room", "generate"], ["-m", "generate"], True),
        (["python", "-X", "dev", "-Im", "room"], ["-m"], True),
        (["python", "-m", "room"], ["/site-packages/room/__main__.py"], False),  # the program runs already
        (["python", "-m", "other", "room"], ["-m", "room"], False),
        (["python", "-m", "other", "-m", "roomy"], ["-m", "-m", "roomy"], False),
        (["python"], [""], False),
        (["python", "-c", "import room"], ["-c"], False),
        ([], [], False),
    ],
)
def test_who_is_run_is_known(monkeypatch, started, argv, expected):
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", argv)
    assert is_run("room") is expected
