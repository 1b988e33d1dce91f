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


def rows(columns: str, *cells) -> list[dict]:
    names = columns.split(" | ")
    return [dict(zip(names, row, strict=True)) for row in cells]


MADE_UP = {
    "generation": rows(
        "images | backend | ms per token | first token s | share of limit",
        ("1", "transformers", 80, 0.4, 0.45),
        ("1", "pt", 40, 0.2, 0.9),
        ("1", "tf", 44, 0.21, 0.81),
        ("4", "transformers", 100, 1.0, 0.35),
        ("4", "pt", 50, 0.6, 0.7),
        ("4", "tf", 70, 0.66, 0.5),
        ("16", "transformers", 160, 4.0, 0.2),
        ("16", "pt", 60, 2.0, 0.8),
        ("16", "tf", 66, 3.0, 0.6),
    ),
    "generation-batch4": rows(
        "images | backend | first token s | ms per token",
        ("8/1/1/1", "transformers", 2.0, 200),
        ("8/1/1/1", "pt", 0.6, 50),
    ),
    "generation-batch8": rows(
        "images | backend | ms per token",
        ("1", "transformers", 70),
        ("1", "tf", 48),
        ("1/1/1/1/1/1/1/1", "transformers", 300),
        ("1/1/1/1/1/1/1/1", "tf", 96),
    ),
    "generation-int8": rows("images | backend | ms per token", ("4", "transformers", 100), ("4", "pt", 25)),
    "generation-bfloat16": rows(
        "images | backend | first token s",
        ("16", "transformers", 3.0),
        ("16", "pt", 1.2),
        ("16", "pt float32", 2.0),
    ),
    "generation-xla": rows(
        "images | backend | ms per token",
        ("1", "tf", 50),
        ("1", "tf xla", 40),
        ("16", "tf", 60),
        ("16", "tf xla", 30),
    ),
    "conversation": rows(
        "backend | turn | of cold",
        ("transformers", "cold", 1.0),
        ("pt", "cold", 1.0),
        ("tf", "cold", 1.0),
        ("pt", "warm", 0.1),
        ("tf", "warm", 0.3),
    ),
    "beams": rows("backend | s", ("transformers", 20), ("pt", 12), ("tf", 8)),
    "training": rows(
        "images | backend | s | peak GB",
        ("4/1/1/1", "transformers", 10, 5),
        ("4/1/1/1", "pt", 4, 4),
        ("4/1/1/1", "tf", 5, 9),
        ("4/4/4/4", "transformers", 20, 6),
        ("4/4/4/4", "pt", 18, 6.6),
        ("4/4/4/4", "tf", 17, 8),
    ),
    "loading": rows(
        "backend | s | peak of model",
        ("transformers", 2, 1.3),
        ("pt", 3, 0.9),
        ("tf", 5, 1.1),
    ),
    "image-processing": rows("backend | s", ("transformers", 0.8), ("ours", 0.2)),
    "masks": rows("backend | s", ("transformers", 5), ("ours", 0.5)),
}
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
    for name, content in MADE_UP.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": content}))
    return tmp_path


def test_figures_are_read_off_their_rows(results):
    assert [row[0] for row in summary()] == [target.what for target in TARGETS]
    assert [row[3] for row in summary()] == [reached for _, reached, _ in FIGURES]
    assert [row[2] for row in summary()] == pytest.approx([figure for figure, _, _ in FIGURES])


@pytest.mark.parametrize("name", RUNS)
def test_without_a_result_its_figures_are_not_measured(name, results):
    (results / f"{name}.json").unlink()
    missing = [(row[2], row[3]) == (None, "not measured") for row in summary()]
    assert missing == [name in needed for _, _, needed in FIGURES]
    assert any(missing)


def test_what_a_failed_run_left_before_does_not_count(results):
    missing = [row[3] == "not measured" for row in summary(failed=["loading"])]
    assert missing == ["loading" in needed for _, _, needed in FIGURES]


def test_pages_show_the_figures_of_the_results():
    """The table of figures in full, and in the README the rows that are read off one column of results."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert with_summary(page) == page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def shown(label: str) -> list[float]:
        (cells,) = re.findall(rf"^\| {re.escape(label)} \|(.*)$", readme, re.MULTILINE)
        return [float(number) for number in re.findall(r"[\d.]+", cells.replace("float32", ""))]

    def measured(name: str, column: str, **where) -> list[float]:
        kept = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
        return [row[column] for row in kept if all(row[key] == wanted for key, wanted in where.items())]

    for label, found in {
        "ms per token, 1 image": measured("generation", "ms per token", images="1"),
        "ms per token, 16 images": measured("generation", "ms per token", images="16"),
        "first token, 16 images": measured("generation", "first token s", images="16"),
        "first token, four prompts with 8, 1, 1 and 1 images": measured("generation-batch4", "first token s"),
        "ms per token with int8 weights and activations, 4 images": measured("generation-int8", "ms per token"),
        "forward and backward, vision frozen, 4 x 256 tokens with 4 images each": measured(
            "training", "s", images="4/4/4/4"
        ),
        "its peak memory": measured("training", "peak GB", images="4/4/4/4"),
    }.items():
        numbers = shown(label)
        assert numbers == [
            round(value, 1 if number < 20 else None) for value, number in zip(found, numbers, strict=True)
        ]


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


@pytest.mark.parametrize(
    ("name", "dtype", "quantized", "expected"),
    [
        ("pt", "float32", False, 4),
        ("pt", "bfloat16", False, 2),
        ("pt float32", "bfloat16", False, 4),
        ("pt", "float32", True, 1),
        ("transformers", "float32", True, 4),
    ],
)
def test_bytes_of_a_step_are_those_of_its_precision(name, dtype, quantized, expected):
    assert generation.itemsize(name, argparse.Namespace(dtype=dtype, quantized=quantized)) == expected
