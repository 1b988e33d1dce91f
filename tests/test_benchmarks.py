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
import tensorflow as tf
import torch
from transformers import logging

from benchmarks import __main__ as all_benchmarks
from benchmarks import generation, limits, loading, masks, report, rounds
from benchmarks.backends import backend
from benchmarks.beam_searches import TorchSearcher, searcher
from benchmarks.conversation import second_turn
from benchmarks.conversation_turns import IMAGE_WORK, conversation
from benchmarks.targets import TARGETS
from benchmarks.training import training_batch
from benchmarks.workers import Peak, Worker
from benchmarks.workload import prompts, random_model
from idefics_tf.decoding import CachedDecoder
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
    "image_processing": ("--images", "2", "--size", "48", "32"),
}
FIGURES = {
    "generation": {},
    "conversation": {target.what for target in TARGETS if target.what.startswith("conversation")},
    "beams": {target.what for target in TARGETS if target.what.startswith("beams")},
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
    assert list(results) == [name.replace("_", "-")]
    assert [row["backend"] for row in rows[:2]] == (
        ["transformers", "ours"] if "processing" in name else list(PYTORCH[1:])
    )
    figures = figures_of(results)
    assert set(figures) == set(FIGURES[name])
    assert all(np.isfinite(figure) and figure >= 0 for figure in figures.values())
    if name == "beams":
        assert set(figures.values()) == {1.0}
        assert rows[0]["image bytes, 4 beams"] is None
    if name == "conversation":
        counts = {(row["backend"], row["turn"]): [row.get(work) for work in IMAGE_WORK] for row in rows}
        gated_blocks = SMALL["num_hidden_layers"] // SMALL["cross_layer_interval"]
        assert counts == {
            ("transformers", "cold"): [None, None, None],
            **{(backend, "cold"): [1, 1, gated_blocks] for backend in ("pt", "tf")},
            **{(backend, "warm"): [0, 0, 0] for backend in ("pt", "tf")},
        }


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


@pytest.fixture
def tiny(run, tmp_path):
    """Arguments of a backend with the tiny model, whose workers are objects of this process."""
    return {"directory": str(random_model(tmp_path / "tiny.json")), "fused": True, "dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize("kind", ["pt", "tf"])
def test_images_copied_per_beam_would_be_seen(kind, tiny, monkeypatch):
    searches = searcher(kind, **tiny)
    searches.prepare(prompts(SMALL, [2]))
    once = searches.image_bytes(1)
    assert once == searches.image_bytes(3) > 0

    search, begin = TorchSearcher._search, CachedDecoder.__init__

    def search_with_copies(searches, new_tokens, beams):
        found = search(searches, new_tokens, beams)
        found.past_key_values.image_memory = found.past_key_values.image_memory.rows(torch.zeros(beams, dtype=int))
        return found

    def begin_with_copies(decoder, model, prompt, copies, *args):
        begin(decoder, model, prompt, copies, *args)
        decoder.image_memory = decoder.image_memory.rows(tf.zeros(copies, tf.int32))

    monkeypatch.setattr(TorchSearcher, "_search", search_with_copies)
    monkeypatch.setattr(CachedDecoder, "__init__", begin_with_copies)
    assert searches.image_bytes(1) == once
    assert searches.image_bytes(3) > 2 * once


def test_calls_are_counted_in_the_graphs_that_run(tiny):
    """Counted where Python traces; the graphs say the same: of all modules the vision tower alone has a convolution."""
    turns = conversation("tf", **tiny)
    first, graphs = prompts(SMALL, [2]), turns.model.generation_graphs
    convolutions = []

    def count_convolutions():
        traced = list(graphs.on([variable.value for variable in turns.model.weights]).values())[-1]
        definition = traced.graph.as_graph_def()
        bodies = [definition.node, *(function.node_def for function in definition.library.function)]
        convolutions.append(sum(node.op == "Conv2D" for nodes in bodies for node in nodes))

    ids, counts = turns.first_turn(first, 2)
    count_convolutions()
    turns.prepare(second_turn(first, ids, np.full((1, 3), 11)))
    _, warm_counts = turns.counted_answer(2)
    count_convolutions()
    assert [counts["vision tower"], warm_counts["vision tower"]] == convolutions == [1, 0]
    with pytest.raises(RuntimeError, match="No graph was traced"):
        turns.counted_answer(2)


def test_xla_is_used_and_gives_the_same_tokens(tiny, monkeypatch):
    plain, compiled = (backend(kind, **tiny) for kind in ("tf", "tf xla"))
    jit_compile, lengths = [], []
    generate = type(compiled.model).generate

    def noted(model, *args, **kwargs):
        jit_compile.append(kwargs.get("jit_compile", False))
        lengths.append(kwargs["max_new_tokens"])
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(compiled.model), "generate", noted)
    ids = []
    for each in (plain, compiled):
        each.prepare(prompts(SMALL, [2]))
        moments, tokens = each.generate(4)
        assert len(moments) == 4
        ids.append(tokens)
    assert np.array_equal(*ids)
    assert (jit_compile, lengths) == ([False, True, True], [4, 1, 4])


def test_float32_stands_beside_another_precision(tiny):
    half, single = (backend(kind, **{**tiny, "dtype": "bfloat16"}).model for kind in ("pt", "pt float32"))
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
