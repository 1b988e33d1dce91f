"""Measure what `idefics_common.scaling` predicts, for the benchmark's 370M model and the shipped one, on this machine.

Three rates of the machine come first, and they are all that the predictions know of it: bytes per second of
matrix-vector products, multiply-adds per second of a matrix product (`benchmarks.limits`), and what a layer takes
however small it is. The last comes from a model of the 370M one's depth with next to no width. Everything is float32.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import keep
from benchmarks.workers import Worker, peak_bytes_since_reset, reset_peak, resident_bytes
from benchmarks.workload import DEFAULT_CONFIG, prompts, random_model
from idefics_common.config_fields import read_config
from idefics_common.scaling import (
    PRECISIONS,
    Hardware,
    Workload,
    decode_seconds,
    first_token_seconds,
    inference_memory,
    weight_bytes,
)

SHIPPED = Path(__file__).parents[1] / "examples" / "fashion" / "checkpoint"
_FLOAT32 = PRECISIONS["float32"]
_NEW_TOKENS = 16
_NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
_SIZES = ((1, 1), (1, 4), (1, 16), (4, 4))
"""Rows and images per row of the prompts, 24 tokens for each image."""


class Measured:
    """One model in a process of its own; the framework is imported before anything is measured."""

    def __init__(self, directory: str):
        import torch

        from idefics_pt import IdeficsForVisionText2Text

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.torch, self.directory, self.model_class = torch, directory, IdeficsForVisionText2Text
        self.model = None

    def load(self) -> int:
        """Peak bytes of loading and of a first forward pass, over what the imports hold."""
        before = resident_bytes()
        reset_peak()
        self.model = self.model_class.from_pretrained(self.directory).eval()
        with self.torch.inference_mode():
            self.model(input_ids=self.torch.ones((1, 1), dtype=self.torch.long))
        return peak_bytes_since_reset() - before

    def prompt_peak(self, inputs: dict) -> int:
        """Peak bytes of a prompt, its pixels included, over the loaded model."""
        before = resident_bytes()
        reset_peak()
        tensors = self._tensors(inputs)
        with self.torch.inference_mode():
            outputs = self.model(**tensors, use_cache=True, logits_to_keep=1)
        peak = peak_bytes_since_reset() - before
        del outputs
        return peak

    def times(self, inputs: dict, repeats: int) -> tuple[float, float]:
        """Median seconds of reading a prompt, and of each of the tokens after it."""
        tensors = self._tensors(inputs)
        firsts, steps = [], []
        with self.torch.inference_mode():
            for repeat in range(repeats + 1):
                start = time.perf_counter()
                outputs = self.model(**tensors, use_cache=True, logits_to_keep=1)
                first, cache = time.perf_counter() - start, outputs.past_key_values
                ids, each = tensors["input_ids"][:, -1:], []
                for _ in range(_NEW_TOKENS):
                    start = time.perf_counter()
                    self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                    each.append(time.perf_counter() - start)
                if repeat:  # the first round warms up
                    firsts.append(first)
                    steps += each
        return statistics.median(firsts), statistics.median(steps)

    def _tensors(self, inputs):
        kept = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return {name: self.torch.tensor(value) for name, value in kept.items()}


def measure(threads: int, repeats: int) -> None:
    """Measure, print and keep as ``results/scaling.json``."""
    hardware = _hardware(threads, repeats)
    rows = []
    for name, directory in (("370M", random_model(DEFAULT_CONFIG)), ("shipped", SHIPPED)):
        config = read_config(directory)
        with Worker("benchmarks.scaling_measures:Measured", threads, directory=str(directory)) as worker:
            weights = sum(weight_bytes(config, _FLOAT32).values())
            rows.append(_row(f"{name}: load, MB", weights / 1e6, worker.call("load") / 1e6))
            for batch, images in _SIZES:
                inputs = _prompts(directory, batch, images)
                length = inputs["input_ids"].shape[1]
                workload = Workload(batch, images, length, _NEW_TOKENS, attended_images=1)
                memory = inference_memory(config, _FLOAT32, workload)
                what = f"{name}: {batch} x {images} images"
                peak = worker.call("prompt_peak", inputs)
                rows.append(_row(f"{what}, prompt, MB", (memory.peak - memory.weights) / 1e6, peak / 1e6))
                first, each = worker.call("times", inputs, repeats)
                expected = first_token_seconds(config, _FLOAT32, workload, hardware).total
                rows.append(_row(f"{what}, first token, ms", 1000 * expected, 1000 * first))
                middle = workload.text_tokens + _NEW_TOKENS // 2
                expected = decode_seconds(config, _FLOAT32, workload, hardware, middle)
                rows.append(_row(f"{what}, each token, ms", 1000 * expected, 1000 * each))
    rates = {name: value for name, value in vars(hardware).items() if isinstance(value, float)}
    keep("scaling", {"threads": threads, "repeats": repeats, **rates}, rows)


def _row(what: str, predicted: float, measured: float) -> dict:
    return {"what": what, "predicted": predicted, "measured": measured}


def _prompts(directory: Path, batch: int, images: int) -> dict[str, np.ndarray]:
    return prompts(json.loads((directory / "config.json").read_text(encoding="utf-8")), [images] * batch)


def _hardware(threads: int, repeats: int) -> Hardware:
    """The rates of this machine."""
    config = json.loads(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    with Worker("benchmarks.limits:Limits", threads, config=config) as limits:
        bandwidth = statistics.median(limits.call("bandwidth") for _ in range(3))
        rate = statistics.median(limits.call("multiply_adds") for _ in range(3))
    with tempfile.TemporaryDirectory() as scratch:
        narrow = Path(scratch) / "config.json"
        narrow.write_text(json.dumps(config | _NARROW), encoding="utf-8")
        directory = random_model(narrow)
        with Worker("benchmarks.scaling_measures:Measured", threads, directory=str(directory)) as worker:
            worker.call("load")
            _, each = worker.call("times", _prompts(directory, 1, 1), repeats)
    layers = config["num_hidden_layers"] * (1 + 1 / config["cross_layer_interval"])
    return Hardware("this machine", bandwidth, rate, each / layers)
