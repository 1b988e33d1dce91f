"""The benchmarks run, on a tiny model and one repetition, and keep what `benchmarks.targets` reads; no time is judged.

Workers are objects of this process here, so that frameworks are imported once; masks have a worker of their own.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from transformers import logging

from benchmarks import generation, limits, loading, processing, report, rounds
from benchmarks.backends import TensorFlowBackend, TorchBackend
from benchmarks.targets import TARGETS
from benchmarks.training import training_batch
from benchmarks.workers import Peak, Worker
from benchmarks.workload import prompts, random_model
from tests.models import SMALL


class WorkerHere:
    """`benchmarks.workers.Worker` without a process."""

    def __init__(self, served, threads, **kwargs):
        self.served = served(**kwargs)

    def call(self, method, *args):
        return getattr(self.served, method)(*args)

    def seconds(self, method, *args):
        begin = time.perf_counter()
        self.call(method, *args)
        return time.perf_counter() - begin

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        del self.served


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the main function of a benchmark with the tiny model and returns the rows that it keeps."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(SMALL))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(limits, "_LEAST_BYTES", 0)
    for name, few in {"_PHOTOGRAPHS": 2, "_WIDTH": 48, "_HEIGHT": 32, "_PROMPTS": 2, "_TOKENS": 64}.items():
        monkeypatch.setattr(processing, name, few)
    for module in (rounds, generation, loading):
        monkeypatch.setattr(module, "Worker", WorkerHere)
    for kind in ("intra", "inter"):
        # can be set once in a process
        monkeypatch.setattr(f"tensorflow.config.threading.set_{kind}_op_parallelism_threads", lambda threads: None)
    processors, verbosity = os.sched_getaffinity(0), logging.get_verbosity()

    def run(module, *options):
        shared = ("--config", str(config), "--repeats", "1", "--threads", "1")
        monkeypatch.setattr(sys, "argv", [module.__name__, *shared, *options])
        module.main()
        (path,) = (tmp_path / "results").iterdir()
        return {path.stem: json.loads(path.read_text())["rows"]}

    yield run
    os.sched_setaffinity(0, processors)
    logging.set_verbosity(verbosity)


PYTORCH = ("--backend", "transformers", "pt")
BENCHMARKS = {
    "generation": ("--images", "1", "2", "--new-tokens", "2", *PYTORCH),
    "conversation": ("--images", "2", "--question", "4", "--new-tokens", "2"),
    "beams": ("--images", "2", "--new-tokens", "3"),
    "training": ("--images", "4/1/1/1", "4/4/4/4", "--tokens", "16", *PYTORCH),
    "loading": PYTORCH,
    "processing": ("images",),
}
FIGURES = {"generation": 0, "conversation": 2, "beams": 2, "training": 3, "loading": 2, "processing": 1}
"""How many of the table of figures each is enough for; ratios of generation need more images than fit here."""


def figures_of(results):
    found = []
    for target in TARGETS:
        with contextlib.suppress(KeyError):
            found.append(target.figure(results))
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_keeps_its_figures(name, run, capsys):
    results = run(importlib.import_module(f"benchmarks.{name}"), *BENCHMARKS[name])
    (rows,) = results.values()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert list(results) == ["image-processing" if name == "processing" else name]
    assert [row["backend"] for row in rows[:2]] == ["transformers", "ours" if name == "processing" else "pt"]
    figures = figures_of(results)
    assert len(figures) == FIGURES[name]
    assert all(np.isfinite(figure) and figure > 0 for figure in figures)


def test_a_worker_process(run, monkeypatch):
    monkeypatch.setattr(rounds, "Worker", Worker)
    (figure,) = figures_of(run(processing, "masks"))
    assert figure > 0


@pytest.mark.parametrize("name", ["generation", "conversation", "beams", "training", "loading"])
def test_of_a_model_that_says_something_else_nothing_is_kept(name, run, monkeypatch):
    load = TorchBackend.load

    def load_another(backend, *args, **kwargs):
        load(backend, *args, **kwargs)
        if backend.is_ours:
            backend.model.lm_head.weight.data.neg_()

    monkeypatch.setattr(TorchBackend, "load", load_another)
    with pytest.raises(SystemExit, match=r"^pt: .* differ"):
        run(importlib.import_module(f"benchmarks.{name}"), *BENCHMARKS[name], *PYTORCH)
    assert not report.RESULTS.exists()


@pytest.fixture
def tiny(run, tmp_path):
    """Arguments of a backend with the tiny model, whose workers are objects of this process."""
    return {"directory": str(random_model(tmp_path / "tiny.json")), "dtype": "float32", "device": "cpu"}


def test_xla_is_used_and_gives_the_same_tokens(tiny, monkeypatch):
    plain, compiled = (TensorFlowBackend(kind, **tiny) for kind in ("tf", "tf xla"))
    calls, ids = [], []
    generate = type(compiled.model).generate

    def noted(model, *args, **kwargs):
        calls.append((kwargs.get("jit_compile", False), kwargs["max_new_tokens"]))
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(compiled.model), "generate", noted)
    for each in (plain, compiled):
        each.prepare(prompts(SMALL, [2]))
        moments, tokens = each.generate(4)
        assert len(moments) == 4
        ids.append(tokens)
    assert np.array_equal(*ids)
    assert calls == [(False, 4), (True, 1), (True, 4)]


def test_float32_stands_beside_another_precision(tiny):
    half, single = (TorchBackend(kind, **{**tiny, "dtype": "bfloat16"}).model for kind in ("pt", "pt float32"))
    assert (half.dtype, single.dtype) == (torch.bfloat16, torch.float32)


def test_a_peak_is_of_its_own_time_alone():
    outer = Peak()
    values = np.ones(2**23)
    inner_before = Peak()
    assert inner_before.before - outer.before > 0.9 * values.nbytes
    more = np.ones(2**23)
    del more
    if inner_before.bytes() is None:
        pytest.skip("this system does not tell the peak")
    assert inner_before.added() > 0.9 * values.nbytes
    assert inner_before.bytes() == inner_before.before + inner_before.added()
    assert Peak().added() < 0.1 * values.nbytes


def test_a_training_batch_has_rows_of_one_length():
    batch = training_batch(SMALL, [2, 1], tokens=16)
    assert batch["attention_mask"].tolist() == [[1] * 16] * 2
    assert batch["image_attention_mask"].sum(axis=1).tolist() == [[8, 7], [15, 0]]
    assert batch["pixel_values"].any(axis=(2, 3, 4)).tolist() == [[True, True], [True, False]]
    assert np.array_equal(batch["labels"] == -100, batch["input_ids"] >= SMALL["vocab_size"])
    with pytest.raises(SystemExit, match="3 images do not share 16 tokens equally"):
        training_batch(SMALL, [3], tokens=16)
