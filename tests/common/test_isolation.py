"""What an import brings along: the core is free of frameworks, and no room needs the other's."""

import subprocess
import sys

import pytest

from tests.requirements import needs_torch

FRAMEWORKS = ("torch", "tensorflow", "keras", "transformers")
LIGHT = [
    "import idefics_common",
    "import idefics_common.parameters, idefics_common.configuration.fields, idefics_common.position_grid",
    "import idefics_common.checkpoint, idefics_common.prompts.image_masks, idefics_common.prompts.prompt",
]


def run(code: str, blocked=()):
    """Run code in a fresh interpreter in which some packages cannot be imported; returns the finished process."""
    source = f"import sys; sys.modules.update(dict.fromkeys({tuple(blocked)!r}))\n{code}"
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)


def imported(code: str) -> set[str]:
    """Which frameworks a piece of code imports."""
    finished = run(f"{code}\nimport sys; print('LOADED', *[name for name in {FRAMEWORKS!r} if name in sys.modules])")
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("code", LIGHT)
def test_the_core_imports_no_framework(code):
    assert imported(code) == set()


def test_the_detector_detects():
    assert "transformers" in imported("import idefics_common.parameters, transformers")
    assert "import of keras halted" in run("import keras", blocked=["keras"]).stderr


def test_the_processor_needs_no_torch_at_all():
    code = "from idefics_common import IdeficsConfig, IdeficsProcessor; IdeficsConfig()"
    finished = run(code, blocked=["torch", "tensorflow", "keras"])
    assert finished.returncode == 0, finished.stderr


@needs_torch
def test_the_pytorch_room_needs_no_tensorflow():
    finished = run("from idefics_pt import IdeficsForVisionText2Text", blocked=["tensorflow", "keras", "idefics_tf"])
    assert finished.returncode == 0, finished.stderr
