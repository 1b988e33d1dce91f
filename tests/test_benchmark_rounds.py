"""In which order benchmarks measure, and what they make of it: a script answers in the place of workers.

Calls that warm up take a thousand times as long as the five that count. The median of those is 3 for ours, and
transformers takes ten times as long.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import generation, loading, report, rounds
from benchmarks.conversation_turns import IMAGE_WORK
from benchmarks.limits import decoder_bytes, prompt_seconds
from tests.models import SMALL

REPETITIONS = (1, 5, 2, 4, 3)
BANDWIDTHS = (2e6, 8e6, 4e6)


class Script:
    """Methods of all workers, with the backend as first argument.

    Args:
        warm_ups: how many calls come before those that count, by method; 0 for those that are not there.
        changed: the output that is another one for ours.
    """

    def __init__(self, warm_ups: dict[str, int], changed: str | None = None):
        self.warm_ups, self.changed = warm_ups, changed
        self.counts, self.timeline = Counter(), []

    def time(self, kind, key) -> float:
        number = self.counts[kind, key] - self.warm_ups.get(key, 0)
        self.counts[kind, key] += 1
        self.timeline += [(kind, key)] if number >= 0 else []
        return (10 if kind == "transformers" else 1) * (-1000 * number if number < 0 else REPETITIONS[number])

    def array(self, kind, name) -> np.ndarray:
        return np.array([[1, 2, 4 if kind != "transformers" and name == self.changed else 3]])

    def bandwidth(self, kind):
        self.timeline.append((kind, "bandwidth"))
        return BANDWIDTHS[self.timeline.count((kind, "bandwidth")) - 1]

    def multiply_adds(self, kind):
        self.timeline.append((kind, "multiply_adds"))
        return 100 * BANDWIDTHS[self.timeline.count((kind, "multiply_adds")) - 1]

    def prepare(self, kind, *inputs):
        """Nothing to hold."""

    def output(self, kind):
        return self.array(kind, "output")

    def seconds(self, kind):
        return self.time(kind, "seconds")

    def generate(self, kind, new_tokens):
        first = self.time(kind, "generate")
        return [first * (1 + number / 100) for number in range(new_tokens)], self.array(kind, "tokens")

    def logits(self, kind):
        return self.array(kind, "logits")

    def search(self, kind, new_tokens, beams):
        s = self.time(kind, "search")
        ids = self.array(kind, "tokens")
        return {"ids": ids, "first": s / 2, "seconds": s, "peak": 1e9 * (s + 10), "added": 1e8 * s}

    def image_bytes(self, kind, beams):
        return None if kind == "transformers" else 70 + beams

    def first_turn(self, kind, inputs, new_tokens):
        ids = np.concatenate((inputs["input_ids"], self.array(kind, "first answers")), axis=1)
        return ids, dict.fromkeys(IMAGE_WORK, 2)

    def answer(self, kind, new_tokens, is_warm):
        return self.array(kind, "cold answer")

    def counted_answer(self, kind, new_tokens):
        return self.array(kind, "warm answer"), dict.fromkeys(IMAGE_WORK, 0)

    def first_token(self, kind, is_warm):
        return self.time(kind, "warm") / 4 if is_warm else self.time(kind, "cold")

    def trainable(self, kind):
        return {"model.norm.weight", *(["other"] if kind == "pt" and self.changed == "parameters" else [])}

    def step(self, kind):
        s = self.time(kind, "step")
        return {"seconds": s, "peak": 1e9 * (s + 10)}

    def gradients(self, kind, names):
        return self.array(kind, "losses").sum(), {name: self.array(kind, "gradients") for name in names}

    def update(self, kind):
        return self.time(kind, "update")

    def load(self, kind, directory, inputs):
        s = self.time(kind, "load")
        return {"seconds": s, "imports": s / 10, "peak": 1e3 * s, "logits": self.array(kind, "logits")}


WARM_UPS = {
    "generation": {"generate": 2},
    "conversation": {"warm": 1, "cold": 1},
    "beams": {"search": 1},
    "training": {"step": 1},
    "loading": {"load": 1},
    "image_processing": {},
    "masks": {},
}
TIMED = {
    "generation": ["generate"],
    "conversation": ["cold", "warm"],
    "training": ["step", "update"],
    "beams": ["search"],
    "loading": ["load"],
    "image_processing": ["seconds"],
    "masks": ["seconds"],
}
"""The methods whose calls count, in their order."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a benchmark on a script and returns the script and the rows, or why it stopped."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(SMALL))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name, changed=None, *more):
        script = Script(WARM_UPS[name], changed)

        class ScriptedWorker(rounds.Worker):
            def __init__(self, target, threads, kind="limits", **kwargs):
                self.kind = kind

            def call(self, method, *args):
                return getattr(script, method)(self.kind, *args)

            def close(self):
                """There is no process."""

        for module in (rounds, generation, loading):
            monkeypatch.setattr(module, "Worker", ScriptedWorker)
        kept = []
        module = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(module, "keep", lambda benchmark, options, rows: kept.extend(rows))
        own = [] if "ours" in module.__doc__.split("]")[0] else ["--backend", "transformers", "pt"]
        own += ["--images", "1/1"] if name == "training" else ["--images", "1"] if name == "generation" else []
        own += ["--new-tokens", "5"] if name == "beams" else []
        monkeypatch.setattr(sys, "argv", [name, "--config", str(config), *own, *more])
        try:
            module.main()
        except SystemExit as stopped:
            return script, str(stopped)
        return script, kept

    return run


EXPECTED = {
    "generation": [
        {
            "first token s": 3,
            "first ratio": 0.1,
            "first spread": [1, 5],
            "compile s": 1000,
            "ms per token": 30,
            "ratio": 0.1,
            "spread": [10, 50],
            "logits differ": 0,
            "limit ms": 1000 * decoder_bytes(SMALL) / 4e6,
            "share of limit": decoder_bytes(SMALL) / 4e6 / 0.03,
            "first limit s": prompt_seconds(SMALL, [1], 4e6, 4e8),
            "first share": prompt_seconds(SMALL, [1], 4e6, 4e8) / 3,
        }
    ],
    "conversation": [
        {"turn": "cold", "s": 3, "spread": [1, 5], "of cold": 1, "ratio": 0.1, **dict.fromkeys(IMAGE_WORK, 2)},
        {"turn": "warm", "s": 0.75, "spread": [0.25, 1.25], "of cold": 0.25, "ratio": 0.025}
        | dict.fromkeys(IMAGE_WORK, 0),
    ],
    "beams": [
        {
            "s": 3,
            "spread": [1, 5],
            "ratio": 0.1,
            "first token s": 1.5,
            "ms per token": 375,
            "peak GB": 13,
            "peak ratio": 13 / 40,
            "added GB": 0.3,
            "image bytes, 1 beam": 71,
            "image bytes, 4 beams": 74,
        }
    ],
    "training": [
        {
            "s": 3,
            "spread": [1, 5],
            "ratio": 0.1,
            "peak GB": 13,
            "peak ratio": 13 / 40,
            "compile s": 997,
            "optimiser s": 3,
            "optimiser ratio": 0.1,
            "gradients differ": 0,
        }
    ],
    "loading": [{"s": 3, "spread": [1, 5], "ratio": 0.1, "imports s": 0.3, "peak bytes": 3000}],
    "image_processing": [{"s": 3, "spread": [1, 5], "ratio": 0.1}],
    "masks": [{"s": 3, "spread": [1, 5], "ratio": 0.1}],
}
"""Columns of the rows of ours."""


@pytest.mark.parametrize("name", WARM_UPS)
def test_medians_of_what_came_after_the_warm_up(name, run):
    _, rows = run(name)
    ours = [row for row in rows if row["backend"] != "transformers"]
    assert len(ours) == len(EXPECTED[name])
    for row, expected in zip(ours, EXPECTED[name], strict=True):
        for column, value in expected.items():
            assert row[column] == (value if isinstance(value, str) else pytest.approx(value)), column
    assert rows[0]["backend"] == "transformers"
    assert rows[0]["ratio"] == 1
    assert rows[0].get("s", rows[0].get("first token s")) == 30


@pytest.mark.parametrize("name", WARM_UPS)
def test_repetitions_are_in_turns(name, run):
    script, _ = run(name)
    backends = ("transformers", "ours" if name in ("masks", "image_processing") else "pt")
    expected = [
        (kind, key)
        for key in TIMED[name]
        for _ in REPETITIONS
        for kind in (backends[1:] if key == "warm" else backends)
    ]
    if name == "generation":
        for place in (0, 8, 14):  # before, in the middle and after
            expected[place:place] = [("limits", "bandwidth"), ("limits", "multiply_adds")]
    assert script.timeline == expected


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("generation", "logits"),
        ("generation", "tokens"),
        ("conversation", "first answers"),
        ("conversation", "warm answer"),
        ("beams", "tokens"),
        ("training", "parameters"),
        ("training", "losses"),
        ("training", "gradients"),
        ("loading", "logits"),
        ("image_processing", "output"),
        ("masks", "output"),
    ],
)
def test_nothing_is_timed_if_an_output_is_another_one(name, changed, run):
    script, why = run(name, changed)
    who, what = why.split(": ", 1)
    assert who == ("ours" if changed == "output" else "pt")
    assert changed.split()[-1].removesuffix("s") in what or changed in ("output", "warm answer")
    assert script.timeline == []


def test_ratios_of_what_is_not_known():
    rows = [{"s": 2, "peak": None}, {"s": 3, "peak": 7}]
    report.add_ratio(rows, "s")
    report.add_ratio(rows, "peak", "peak ratio")
    assert [(row["ratio"], row["peak ratio"]) for row in rows] == [(1, None), (1.5, None)]
    assert report.median_of_known([None, 4, 1, None, 2]) == 2
    assert report.median_of_known([None]) is None


def test_the_peak_of_loading_is_a_multiple_of_the_tensors(run, tmp_path):
    _, rows = run("loading")
    (directory,) = tmp_path.glob("idefics-benchmark-*")
    tensors = [tensor for file in directory.glob("*.safetensors") for tensor in load_file(file).values()]
    assert rows[1]["model bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert rows[1]["peak of model"] == rows[1]["peak bytes"] / rows[1]["model bytes"]


def test_what_is_another_output_is_said():
    ids = np.array([[1, 2], [3, 4]])
    rounds.refuse_other(ids, ids.copy(), "pt", "tokens")
    with pytest.raises(SystemExit, match=r"pt: tokens differ .* in 1 of 4 places, the first at \(1, 0\): 3 against 9"):
        rounds.refuse_other(ids, np.array([[1, 2], [9, 4]]), "pt", "tokens")
    with pytest.raises(SystemExit, match=r"pt: tokens have shape \(1, 2\), the first backend's \(2, 2\)"):
        rounds.refuse_other(ids[:1], ids, "pt", "tokens")
    for bad in (0.2, float("nan")):
        with pytest.raises(SystemExit, match="tf: logits differ"):
            rounds.refuse_above(0.1, bad, "tf", "logits")


def test_an_int8_model_that_says_something_else_is_refused(run):
    _, rows = run("generation", None, "--quantized")
    assert rows
    _, rows = run("generation", "tokens", "--quantized")
    assert rows  # a rounded model may write other words
    _, message = run("generation", "logits", "--quantized")
    assert "logits" in message


def test_the_limit_of_a_prompt_counts_images_that_are_encoded():
    def seconds(*images, bandwidth=1e30, rate=1e9):
        return prompt_seconds(SMALL, list(images), bandwidth, rate)

    padded, full, text = seconds(2, 1), seconds(2, 2), seconds(2, 0)
    assert full - padded == pytest.approx(padded - text)
    assert padded - text > 0
    assert seconds(2, 1, rate=2e9) == pytest.approx(padded / 2)
    assert seconds(2, 1, rate=1e30, bandwidth=1e9) > 0


def test_bytes_of_a_step_are_those_of_its_precision():
    def itemsize(name, dtype, quantized=False):
        return generation._itemsize(name, argparse.Namespace(dtype=dtype, quantized=quantized))

    assert [itemsize("pt", dtype) for dtype in ("float32", "bfloat16", "float16")] == [4, 2, 2]
    assert [itemsize("pt float32", dtype) for dtype in ("float32", "bfloat16", "float16")] == [4, 4, 4]
    assert itemsize("pt", "float32", quantized=True) == 1
    assert itemsize("transformers", "float32", quantized=True) == 4
