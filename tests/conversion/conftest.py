"""A checkpoint that many tests read and none changes, and what needs torch."""

import importlib.util

import pytest

from tests.conversion.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def bin_files_need_torch(request):
    """Skip the cases of a test that write and read `.bin` files, where torch is not installed."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and "bin" in callspec.params.values() and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The directory of a small float32 checkpoint, in safetensors."""
    directory = tmp_path_factory.mktemp("checkpoint") / "source"
    write_checkpoint(directory)
    return directory
