"""The benchmarks run, on a tiny model and one repetition, and keep what `benchmarks.targets` reads; no time is judged.

Workers are objects of this process here, so that frameworks are imported once; masks have a worker of their own.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from transformers import logging

from benchmarks import __main__ as all_benchmarks
from benchmarks import generation, limits, loading, masks, report, rounds
from benchmarks.targets import TARGETS
from benchmarks.training import training_batch
from benchmarks.workers import Worker
from tests.models import SMALL


class WorkerHere:
    """`benchmarks.workers.Worker` without a process."""

    def __init__(self, target, threads, **kwargs):
        module, name = target.split(":")
        self.served = getattr(importlib.import_module(module), name)(**kwargs)

    def call(self, method, *args, **kwargs):
        return getattr(self.served, method)(*args, **kwargs)

    def close(self):
        del self.served

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the main function of a benchmark with the tiny model and returns the rows that it keeps."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(SMALL))
    for module in (report, all_benchmarks):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(limits, "_LEAST_BYTES", 0)
    for module in (rounds, generation, loading):
        monkeypatch.setattr(module, "Worker", WorkerHere)
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
    "conversation": ("--images", "2", "--question", "4", "--new-tokens", "2", *PYTORCH),
    "beams": ("--images", "2", "--new-tokens", "3", *PYTORCH),
    "training": ("--images", "4/1/1/1", "4/4/4/4", "--tokens", "16", *PYTORCH),
    "loading": PYTORCH,
    "image_processing": ("--images", "2", "--size", "48", "32"),
}
FIGURES = {
    "generation": {},
    "conversation": {"conversation, first token of the second turn, warm against cold, PyTorch"},
    "beams": {"beams, bytes of images with 4 beams against 1, PyTorch"},
    "training": {target.what for target in TARGETS if target.what.startswith("training")},
    "loading": {"loading against transformers, PyTorch", "loading, peak above the imports in models, PyTorch"},
    "image_processing": {"image processing against transformers"},
}
"""What of the table of figures each of them is enough for; ratios of generation need more images than fit here."""


def figures_of(results):
    found = {}
    for target in TARGETS:
        try:
            found[target.what] = target.figure(results)
        except KeyError:
            continue
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_keeps_its_figures(name, run, capsys):
    results = run(importlib.import_module(f"benchmarks.{name}"), *BENCHMARKS[name])
    (rows,) = results.values()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert [row["backend"] for row in rows[:2]] == (
        ["transformers", "ours"] if "processing" in name else list(PYTORCH[1:])
    )
    figures = figures_of(results)
    assert set(figures) == set(FIGURES[name])
    assert all(np.isfinite(figure) and figure >= 0 for figure in figures.values())
    if name == "beams":
        assert set(figures.values()) == {1.0}
    if name == "conversation":
        warm = next(row for row in rows if row["turn"] == "warm")
        assert [warm["vision tower"], warm["resampler"], warm["image keys/values"]] == [0, 0, 0]


def test_a_worker_process_and_the_summary(run, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "Worker", Worker)
    results = run(masks, "--prompts", "2", "--tokens", "64")
    (figure,) = figures_of(results).values()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--summary"])
    all_benchmarks.main()
    lines = capsys.readouterr().out.strip().splitlines()[1:]
    assert len(lines) == len(TARGETS)
    reached = [line for line in lines if "not measured" not in line]
    assert [line.split() for line in reached] == [
        ["masks", "against", "transformers", "<=", "0.05", f"{figure:.3g}", "yes" if figure <= 0.05 else "NO"]
    ]


def test_other_outputs_are_not_timed(run, monkeypatch):
    def all_zeros(ids_BT, num_images):
        return np.zeros((*ids_BT.shape, num_images), dtype=np.int64)

    monkeypatch.setattr(masks.MaskBuilder, "_ours", staticmethod(lambda image_token_id: all_zeros))
    with pytest.raises(SystemExit, match="ours: the mask differs from the first backend's"):
        run(masks, "--prompts", "2", "--tokens", "64")


def test_a_training_batch_has_rows_of_one_length():
    batch = training_batch(SMALL, [2, 1], tokens=16)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["attention_mask"].all()
    assert batch["pixel_values"].shape[:2] == batch["image_attention_mask"].shape[::2] == (2, 2)
    assert batch["image_attention_mask"].sum(axis=1).tolist() == [[8, 7], [15, 0]]
    assert not batch["pixel_values"][1, 1].any()
    is_image = batch["input_ids"] >= SMALL["vocab_size"]
    assert np.array_equal(batch["labels"] == -100, is_image)
    with pytest.raises(SystemExit, match="3 images do not share 16 tokens equally"):
        training_batch(SMALL, [3], tokens=16)


def test_the_page_shows_the_figures_of_the_results():
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all_benchmarks.with_summary(page) == page
