"""Peak memory of a conversion does not grow with the largest tensor, nor with the checkpoint."""

import json
import subprocess
import sys

import pytest

from benchmarks.random_checkpoint import write_random_checkpoint
from tests.conversion.checkpoints import small_fields


def peak(directory, vocab_size: int, target: str) -> int:
    """Peak memory in bytes of converting, in a process of its own, a model with two matrices of this many rows."""
    config = small_fields()[0] | {"vocab_size": vocab_size, "hidden_size": 96}
    nbytes = write_random_checkpoint(directory / "source", config, 10**9)
    assert nbytes > 2 * 4 * 96 * vocab_size
    command = [
        sys.executable,
        "-m",
        "conversion.cli",
        str(directory / "source"),
        str(directory / "out"),
        "--to",
        target,
    ]
    subprocess.run([*command, "--workers", "1", "--quiet"], check=True)
    return json.loads((directory / "out" / "conversion-report.json").read_text())["peak_memory_bytes"]


@pytest.mark.parametrize("target", ["safetensors", "keras", "tf-h5"])
def test_peak_memory_is_bounded(tmp_path, target):
    """Twice the rows are 38 MB more in each of two tensors; blocks of 16 MiB do not care."""
    small, large = (peak(tmp_path / str(rows), rows, target) for rows in (100_000, 200_000))
    assert large < 200 * 10**6
    assert large - small < 10 * 10**6
