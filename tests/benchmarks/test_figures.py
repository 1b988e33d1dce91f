"""Figures are what the results say: how rows are made of measures, which figure is read where, and what pages show.

Nothing is measured here: measures and results are made up, all numbers different, so that a figure of another row is
another figure.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as all_benchmarks
from benchmarks import generation, report, rounds, training
from benchmarks.__main__ import RUNS, summary, with_summary
from benchmarks.limits import decoder_bytes
from benchmarks.targets import TARGETS
from tests.models import SMALL

ROOT = Path(__file__).parents[2]
_EQUAL = {"images": "4/4/4/4"}


MADE_UP = [
    ("generation", {"images": "1"}, "ms per token", {"transformers": 80, "pt": 40, "tf": 44}),
    ("generation", {"images": "4"}, "ms per token", {"transformers": 100, "pt": 50, "tf": 70}),
    ("generation", {"images": "16"}, "ms per token", {"transformers": 160, "pt": 60, "tf": 66}),
    ("generation", {"images": "1"}, "first token s", {"transformers": 0.4, "pt": 0.2, "tf": 0.21}),
    ("generation", {"images": "4"}, "first token s", {"transformers": 1.0, "pt": 0.6, "tf": 0.66}),
    ("generation", {"images": "16"}, "first token s", {"transformers": 4.0, "pt": 2.0, "tf": 3.0}),
    ("generation", {"images": "1"}, "share of limit", {"transformers": 0.45, "pt": 0.9, "tf": 0.81}),
    ("generation", {"images": "4"}, "share of limit", {"transformers": 0.35, "pt": 0.7, "tf": 0.5}),
    ("generation", {"images": "16"}, "share of limit", {"transformers": 0.2, "pt": 0.8, "tf": 0.6}),
    ("generation-batch4", {"images": "8/1/1/1"}, "first token s", {"transformers": 2.0, "pt": 0.6}),
    ("generation-batch8", {"images": "1"}, "ms per token", {"transformers": 70, "tf": 48}),
    ("generation-batch8", {"images": "1/1/1/1/1/1/1/1"}, "ms per token", {"transformers": 300, "tf": 96}),
    ("generation-int8", {"images": "4"}, "ms per token", {"transformers": 100, "pt": 25}),
    ("generation-bfloat16", {"images": "16"}, "first token s", {"transformers": 3.0, "pt": 1.2, "pt float32": 2.0}),
    ("generation-xla", {"images": "1"}, "ms per token", {"tf": 50, "tf xla": 40}),
    ("generation-xla", {"images": "16"}, "ms per token", {"tf": 60, "tf xla": 30}),
    ("conversation", {"turn": "cold"}, "of cold", {"transformers": 1.0, "pt": 1.0, "tf": 1.0}),
    ("conversation", {"turn": "warm"}, "of cold", {"pt": 0.1, "tf": 0.3}),
    ("beams", {}, "s", {"transformers": 20, "pt": 12, "tf": 8}),
    ("training", {"images": "4/1/1/1"}, "s", {"transformers": 10, "pt": 4, "tf": 5}),
    ("training", {"images": "4/4/4/4"}, "s", {"transformers": 20, "pt": 18, "tf": 17}),
    ("training", {"images": "4/1/1/1"}, "peak GB", {"transformers": 5, "pt": 4, "tf": 9}),
    ("training", {"images": "4/4/4/4"}, "peak GB", {"transformers": 6, "pt": 6.6, "tf": 8}),
    ("loading", {}, "s", {"transformers": 2, "pt": 3, "tf": 5}),
    ("loading", {}, "peak of model", {"transformers": 1.3, "pt": 0.9, "tf": 1.1}),
    ("image-processing", {}, "s", {"transformers": 0.8, "ours": 0.2}),
    ("masks", {}, "s", {"transformers": 5, "ours": 0.5}),
]
"""File of results, what its rows have in common, a column, and its value for each backend."""


FIGURES = [
    (0.7, "NO", {"generation"}),
    (1.5, "NO", {"generation"}),
    (0.5, "yes", {"generation"}),
    (0.375, "yes", {"generation"}),
    (0.5, "yes", {"generation"}),
    (0.3, "yes", {"generation-batch4"}),
    (0.25, "yes", {"generation-int8"}),
    (0.6, "NO", {"generation-bfloat16"}),
    (1.4, "NO", {"generation"}),
    (1.5, "NO", {"generation"}),
    (0.8, "yes", {"generation-xla"}),
    (4.0, "yes", {"generation-batch8"}),
    (0.1, "yes", {"conversation"}),
    (0.3, "NO", {"conversation"}),
    (0.6, "NO", {"beams"}),
    (0.4, "yes", {"beams"}),
    (0.4, "yes", {"training"}),
    (0.9, "yes", {"training"}),
    (1.1, "NO", {"training"}),
    (1.5, "NO", {"loading"}),
    (2.5, "yes", {"loading"}),
    (0.9, "yes", {"loading"}),
    (1.1, "yes", {"loading"}),
    (0.25, "yes", {"image-processing"}),
    (0.1, "NO", {"masks"}),
]
"""Of each target in its order: the figure, whether it is reached, and the results that it needs."""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The directory of results, with those made up."""
    monkeypatch.setattr(all_benchmarks, "RESULTS", tmp_path)
    rows = {name: {} for name in RUNS}
    for name, where, column, values in MADE_UP:
        for backend, number in values.items():
            rows[name].setdefault((backend, *where.values()), {"backend": backend, **where})[column] = number
    for name, found in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [*found.values()]}))
    return tmp_path


def test_figures_are_read_off_their_rows(results):
    assert [row[0] for row in summary()] == [target.what for target in TARGETS]
    assert [row[3] for row in summary()] == [reached for _, reached, _ in FIGURES]
    assert [row[2] for row in summary()] == pytest.approx([figure for figure, _, _ in FIGURES])


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_a_run_that_failed_are_not_measured(name, results):
    """Nor without its file; what an earlier run has left does not count."""
    failed = summary(failed=[name])
    (results / f"{name}.json").unlink()
    missing = [(row[2], row[3]) == (None, "not measured") for row in failed]
    assert missing == [name in needed for _, _, needed in FIGURES]
    assert any(missing)
    assert failed == summary()


def test_pages_show_the_figures_of_the_results():
    """The table of figures in full, and in the README the rows that are read off one column of results."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert with_summary(page) == page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    for label, name, column, where in (
        ("ms per token, 1 image", "generation", "ms per token", {"images": "1"}),
        ("ms per token, 16 images", "generation", "ms per token", {"images": "16"}),
        ("first token, 16 images", "generation", "first token s", {"images": "16"}),
        ("first token, four prompts with 8, 1, 1 and 1 images", "generation-batch4", "first token s", {}),
        ("ms per token with int8 weights and activations, 4 images", "generation-int8", "ms per token", {}),
        ("forward and backward, vision frozen, 4 x 256 tokens with 4 images each", "training", "s", _EQUAL),
        ("its peak memory", "training", "peak GB", _EQUAL),
    ):
        (cells,) = re.findall(rf"^\| {re.escape(label)} \|(.*)$", readme, re.MULTILINE)
        shown = [float(number) for number in re.findall(r"[\d.]+", cells.replace("float32", ""))]
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
        found = [row[column] for row in rows if where.items() <= row.items()]
        assert shown == [round(value, 1 if value < 20 else None) for value in found], label


class Answers:
    """A worker that gives what it was told: for each method a list of results, one a call, or one for all calls."""

    def __init__(self, **answers):
        self.answers = {name: iter(value) if isinstance(value, list) else value for name, value in answers.items()}

    def call(self, method, *args):
        answer = self.answers[method]
        return next(answer) if hasattr(answer, "__next__") else answer


REPETITIONS = (1, 5, 2, 4, 3)
OPTIONS = argparse.Namespace(dtype="float32", quantized=False, new_tokens=4, repeats=5, tokens=8)


def test_generation_takes_medians_after_the_first_runs():
    def backend(factor):
        seconds = [factor * second for second in (2000, 1000, *REPETITIONS)]
        ids = np.array([[1, 2, 3]])
        runs = [([first * (1 + number / 100) for number in range(4)], ids) for first in seconds]
        return Answers(prepare=None, generate=runs, logits=np.array([[1.0, 2.0]]))

    limits = Answers(bandwidth=[2e6, 8e6, 4e6])
    theirs, ours = generation.measure({"transformers": backend(10), "pt": backend(1)}, limits, SMALL, [1], OPTIONS)
    assert ours["first token s"] == 3
    assert ours["first spread"] == [1, 5]
    assert ours["ms per token"] == pytest.approx(30)
    assert ours["spread"] == pytest.approx([10, 50])
    assert ours["compile s"] == 1000
    assert ours["limit ms"] == pytest.approx(1000 * decoder_bytes(SMALL) / 4e6)
    assert ours["share of limit"] == pytest.approx(decoder_bytes(SMALL) / 4e6 / 0.03)
    assert (ours["ratio"], ours["first ratio"], theirs["ratio"]) == pytest.approx((0.1, 0.1, 1))


def test_training_takes_medians_after_the_first_step():
    def backend(factor):
        steps = [{"seconds": factor * second, "peak": 1e9 * (second + factor)} for second in (1000, *REPETITIONS)]
        return Answers(prepare=None, step=steps, gradients=(2.0, {"model.norm.weight": np.array([1.0, 2.0])}))

    workers = {"transformers": backend(10), "pt": backend(1)}
    _, ours = training.measure(workers, SMALL, "1/1", OPTIONS, ["model.norm.weight"])
    assert (ours["s"], ours["spread"], ours["compile s"], ours["peak GB"]) == (3, [1, 5], 997, 4)
    assert (ours["ratio"], ours["peak ratio"]) == pytest.approx((0.1, 4 / 13))


def test_repetitions_are_in_turns():
    calls = []

    class Noted(Answers):
        def call(self, method, *args):
            calls.append((self.answers["name"], *args))

    workers = {name: Noted(name=name) for name in "ab"}
    assert rounds.in_turns(workers, 2, "run", 7) == {"a": [None, None], "b": [None, None]}
    assert calls == [("a", 7), ("b", 7), ("a", 7), ("b", 7)]


def test_ratios_of_what_is_not_known():
    rows = [{"s": 2, "peak": None}, {"s": 3, "peak": 7}]
    report.add_ratio(rows, "s")
    report.add_ratio(rows, "peak", "peak ratio")
    assert [(row["ratio"], row["peak ratio"]) for row in rows] == [(1, None), (1.5, None)]
    assert report.median_of_known([None, 4, 1, None, 2], 2) == 1
    assert report.median_of_known([None]) is None


def test_what_is_another_output_is_said():
    ids = np.array([[1, 2], [3, 4]])
    rounds.refuse_others({"transformers": ids, "pt": ids.copy()}, "tokens")
    with pytest.raises(SystemExit, match=r"pt: tokens differ .* in 1 of 4 places, the first at \(1, 0\): 9 against 3"):
        rounds.refuse_others({"transformers": ids, "pt": np.array([[1, 2], [9, 4]])}, "tokens")
    with pytest.raises(SystemExit, match=r"pt: tokens have shape \(1, 2\), the first backend's \(2, 2\)"):
        rounds.refuse_others({"transformers": ids, "pt": ids[:1]}, "tokens")
    assert rounds.refuse_above(0.1, {"a": ids, "b": ids + 0.2}, "logits") == pytest.approx({"a": 0, "b": 0.05})
    for bad in (0.5, float("nan")):
        with pytest.raises(SystemExit, match="tf: logits differ"):
            rounds.refuse_above(0.1, {"pt": ids, "tf": ids + bad}, "logits")


def test_bytes_of_a_step_are_those_of_its_precision():
    def itemsize(name, dtype, quantized=False):
        return generation.itemsize(name, argparse.Namespace(dtype=dtype, quantized=quantized))

    assert [itemsize("pt", dtype) for dtype in ("float32", "bfloat16", "float16")] == [4, 2, 2]
    assert itemsize("pt float32", "bfloat16") == 4
    assert [itemsize(name, "float32", quantized=True) for name in ("pt", "transformers")] == [1, 4]
