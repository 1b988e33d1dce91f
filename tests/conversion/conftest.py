"""A checkpoint that many tests read and none changes."""

import pytest

from tests.conversion.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The directory of a small float32 checkpoint, in safetensors."""
    directory = tmp_path_factory.mktemp("checkpoint") / "source"
    write_checkpoint(directory)
    return directory
