"""Benchmarks on a GPU: refused where there is none, and measured there, not on the host, where there is one."""

import importlib
import sys

import pytest
import torch

from benchmarks.__main__ import RUNS
from benchmarks.limits import Limits
from benchmarks.options import tensorflow_device
from benchmarks.workers import Peak
from tests.models import SMALL

SCRIPTS = sorted({module for module, *_ in RUNS.values()} | {"benchmarks.__main__"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can be used here")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there_is_refused_at_once(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--device", "cuda"])
    with pytest.raises(SystemExit) as refusal:
        importlib.import_module(script).main()
    assert refusal.value.code == 2
    assert f"--device cuda needs a GPU that PyTorch can use; torch {torch.__version__} finds none" in (
        capsys.readouterr().err
    )


def test_tensorflow_does_not_compute_on_the_cpu_instead():
    tf = pytest.importorskip("tensorflow")
    assert tensorflow_device("cpu") == "/CPU:0"
    if tf.config.list_physical_devices("GPU"):
        assert tensorflow_device("cuda") == "/GPU:0"
        return
    with pytest.raises(ValueError, match="--device cuda needs a GPU that TensorFlow can use"):
        tensorflow_device("cuda")


def test_memory_is_that_of_the_gpu(monkeypatch):
    """The peak is asked of CUDA's allocator, since when the measure was made."""
    calls = []
    for name, answer in (("reset_peak_memory_stats", None), ("memory_allocated", 5), ("max_memory_allocated", 12)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, answer=answer: calls.append(name) or answer)
    peak = Peak(torch)
    assert set(calls) == {"reset_peak_memory_stats", "memory_allocated"}
    assert (peak.bytes(), peak.added()) == (12, 7)


def test_the_limits_wait_for_the_gpu(monkeypatch):
    """A kernel that was only queued has taken no time: the clock stands between two waits."""
    events = []
    monkeypatch.setattr("benchmarks.limits._LEAST_BYTES", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device: events.append(device) or randn(*shape))
    limits = Limits(SMALL, device="cuda")
    assert set(events) == {"cuda"}
    monkeypatch.setattr("benchmarks.limits._KERNELS", (lambda x, matrix: events.append("kernel"),))
    events.clear()
    limits.multiply_adds()
    assert events == ["wait", "kernel", "wait"] * 5
    events.clear()
    limits.bandwidth()
    assert events == ["wait", *["kernel"] * len(limits.matrices), "wait"] * 5
