"""Measure what `idefics_common.scaling` predicts, for the benchmark's 370M model and the shipped one, on this machine.

What the predictions of time know of the machine is measured here too, and on no model that is predicted: each
operation alone (`benchmarks.kernel_times`), and what calls take besides, on models with narrow layers of several
depths. All of it takes turns in one process, round after round, so that a slow minute of a shared machine slows both
sides. Everything is float32.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.report import keep
from benchmarks.workers import Worker, peak_bytes_since_reset, reset_peak, resident_bytes
from benchmarks.workload import DEFAULT_CONFIG, TOKENS_PER_IMAGE, prompts, random_model
from idefics_common.configuration.fields import fields_from_dict, read_config
from idefics_common.scaling import (
    PRECISIONS,
    CallSeconds,
    Parts,
    Workload,
    decode_kernels,
    expected_decode_seconds,
    expected_first_token_seconds,
    first_token_kernels,
    inference_memory,
    kernel_seconds,
    weight_bytes,
)

SHIPPED = Path(__file__).parents[1] / "examples" / "fashion" / "checkpoint"
SIZES = ((1, 1), (1, 4), (1, 16), (4, 4))
"""Rows and images per row of the prompts, 24 tokens for each image."""
_FLOAT32 = PRECISIONS["float32"]
_NEW_TOKENS = 8
_FEW_TOKENS = 8  # per image in the prompts of models with narrow layers
_NARROW = 96  # their width
_DEPTHS = (
    {},
    {"vision_layers": 10},
    {"resampler_depth": 9},
    {"layers": 10, "interval": 5},
    {"layers": 10},
)
"""Of the models with narrow layers, as arguments of `narrow_config`: each part of a model once in another number."""
_TURNS = {"370M": 1, "shipped": 3, "narrow": 3}
"""How often it is the turn of the models of each name, and of their operations, in a round."""


def narrow_config(layers=2, interval=1, vision_layers=2, resampler_depth=1) -> dict:
    """Content of a config.json: the 370M model's, but narrow, and with images of 65 tokens."""
    config = json.loads(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    vision = {"embed_dim": _NARROW, "intermediate_size": 2 * _NARROW, "image_size": 64, "patch_size": 8}
    vision |= {"num_attention_heads": 4, "num_hidden_layers": vision_layers}
    perceiver = {"resampler_n_latents": 8, "resampler_n_heads": 4, "resampler_head_dim": _NARROW // 4}
    return config | {
        "hidden_size": _NARROW,
        "intermediate_size": 2 * _NARROW,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "num_hidden_layers": layers,
        "cross_layer_interval": interval,
        "vision_config": config["vision_config"] | vision,
        "perceiver_config": config["perceiver_config"] | perceiver | {"resampler_depth": resampler_depth},
    }


class Case:
    """A model, one prompt for it, and what the clock has said of them.

    Attributes:
        config: fields. workload: of the prompt.
        firsts, steps: seconds of reading the prompt, and of each token after it.
    """

    def __init__(self, config, model, inputs: dict, workload: Workload):
        self.config, self.workload = config, workload
        self._model, self._inputs = model, inputs
        self.weight_count = sum(weight_bytes(config, _FLOAT32).values()) // 4
        self.firsts, self.steps = [], []

    def kernels(self, is_step: bool):
        """The operations of reading the prompt, or of the token in the middle of the new ones."""
        if is_step:
            return decode_kernels(self.config, self.workload, self.middle)
        return first_token_kernels(self.config, self.workload)

    @property
    def middle(self) -> int:
        """The position of that token."""
        return self.workload.text_tokens + self.workload.new_tokens // 2

    def read(self):
        """Read the prompt; returns the cache."""
        return self._model(**self._inputs, use_cache=True, logits_to_keep=1).past_key_values

    def run(self):
        """Read the prompt and write the new tokens, on the clock."""
        start = time.perf_counter()
        cache = self.read()
        self.firsts.append(time.perf_counter() - start)
        ids = self._inputs["input_ids"][:, -1:]
        for _ in range(self.workload.new_tokens):
            start = time.perf_counter()
            self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            self.steps.append(time.perf_counter() - start)

    def input_bytes(self) -> int:
        """Bytes of what the model is given."""
        return sum(x.nbytes for x in self._inputs.values())


class Measures:
    """All models in one process; lives in a worker."""

    def __init__(self):
        import torch

        from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.torch, self.config_class, self.model_class = torch, IdeficsConfig, IdeficsForVisionText2Text
        self.cases: dict[str, list[Case]] = {}
        self.timers, self.seconds = {}, defaultdict(list)

    def load(self, directory: str) -> int:
        """Peak bytes of loading a checkpoint and of a first token that looks at an image, by the resident set."""
        config = _content(directory)
        image = self.torch.zeros(1, 1, 3, *2 * [config["vision_config"]["image_size"]])
        token = self.torch.ones(1, 1, dtype=self.torch.long)
        self.model = None
        gc.collect()
        before = resident_bytes()
        reset_peak()
        self.model = self.model_class.from_pretrained(directory).eval()
        with self.torch.inference_mode():
            self.model(input_ids=token, pixel_values=image, image_attention_mask=token.unsqueeze(-1))
        return peak_bytes_since_reset() - before

    def add_loaded(self, name: str, directory: str) -> list[int]:
        """Let the loaded model, fused, read each prompt: peak bytes of what it is given and of all tensors it makes.

        Without oneDNN, whose products take scratch memory from the same allocator.
        """
        self._add(name, _content(directory), self.model, TOKENS_PER_IMAGE)
        return [self._peak(case) for case in self.cases[name]]

    def add_narrow(self, name: str) -> None:
        """Make the models with narrow layers."""
        for depth in _DEPTHS:
            config = narrow_config(**depth)
            self._add(name, config, self.model_class(self.config_class(**config)).eval(), _FEW_TOKENS)

    def _add(self, name, config, model, tokens_per_image):
        model.fuse_projections()
        fields = fields_from_dict(config)
        for batch, images in SIZES:
            made = prompts(config, [images] * batch, tokens_per_image)
            inputs = {key: self.torch.from_numpy(made[key]) for key in made if key != "attention_mask"}
            workload = Workload(batch, images, tokens_per_image * images, _NEW_TOKENS, attended_images=1)
            self.cases.setdefault(name, []).append(Case(fields, model, inputs, workload))

    def _peak(self, case: Case) -> int:
        profiler = self.torch.profiler
        recorded = profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True)
        with self.torch.inference_mode(), self.torch.backends.mkldnn.flags(enabled=False), recorded as profile:
            case.read()
        with tempfile.TemporaryDirectory() as scratch:
            trace = Path(scratch) / "trace.json"
            profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        events = [event for event in events if event.get("name") == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event["ts"]):
            now += event["args"]["Bytes"]
            peak = max(peak, now)
        return peak + case.input_bytes()

    def round(self) -> None:
        """Time everything once more; before the first round, everything runs once."""
        with self.torch.inference_mode():
            if not self.timers:
                self._prepare()
            for turn in range(max(_TURNS.values())):
                for name, cases in self.cases.items():
                    if turn < _TURNS[name]:
                        timer, kernels = self.timers[name]
                        for kernel in kernels:
                            self.seconds[name, kernel] += timer.seconds(kernel)
                        cases[0].read()  # the first one after the operations finds nothing in the caches
                        for case in cases:
                            case.run()

    def _prepare(self):
        from benchmarks.kernel_times import KernelTimes

        counts = {name: max(case.weight_count for case in cases) for name, cases in self.cases.items()}
        numbers = self.torch.full((max(counts.values()),), 0.01)
        for name, cases in self.cases.items():
            kernels = dict.fromkeys(kernel for case in cases for is_step in (0, 1) for kernel in case.kernels(is_step))
            self.timers[name] = KernelTimes(numbers[: counts[name]], cases[0].config), list(kernels)
            for case in cases:
                case.read()

    def calls(self, name: str, is_step: bool) -> list[CallSeconds]:
        """What calls of the models of that name take besides their operations, for each of `SIZES`."""
        found = []
        for number in range(len(SIZES)):
            calls = []
            for case in self.cases[name][number :: len(SIZES)]:
                parts = Parts.of_step(case.config) if is_step else Parts.of_prompt(case.config, case.workload)
                whole = statistics.median(case.steps if is_step else case.firsts)
                calls.append((parts, whole - kernel_seconds(case.kernels(is_step), self._alone(name))))
            found.append(CallSeconds.fitted(calls))
        return found

    def times(self, name: str, calls_of: str) -> list[tuple[float, float, float, float]]:
        """For each of `SIZES`, expected and measured seconds of the first token, and of each token after it.

        Args:
            calls_of: name of the models from which calls are known.
        """
        found, alone = [], self._alone(name)
        prompt, step = self.calls(calls_of, False), self.calls(calls_of, True)
        for case, of_prompt, of_step in zip(self.cases[name], prompt, step, strict=True):
            first = expected_first_token_seconds(case.config, case.workload, alone, of_prompt)
            each = expected_decode_seconds(case.config, case.workload, alone, of_step, case.middle)
            found.append((first, statistics.median(case.firsts), each, statistics.median(case.steps)))
        return found

    def _alone(self, name: str) -> dict:
        """Median seconds of each operation of a model."""
        return {kernel: statistics.median(self.seconds[name, kernel]) for kernel in self.timers[name][1]}


def measure(threads: int, repeats: int) -> None:
    """Measure, print and keep as ``results/scaling.json``."""
    models = {"370M": random_model(DEFAULT_CONFIG), "shipped": SHIPPED}
    rows = []
    with Worker("benchmarks.scaling_measures:Measures", threads) as worker:
        worker.call("load", str(SHIPPED))  # code and tables that stay from a first load are not the model's
        loads, peaks = {}, {}
        for name, directory in reversed(models.items()):
            loads[name] = worker.call("load", str(directory))
            peaks[name] = worker.call("add_loaded", name, str(directory))
        worker.call("add_narrow", "narrow")
        for _ in range(repeats):
            worker.call("round")
        for name, directory in models.items():
            config = read_config(directory)
            memory = sum(weight_bytes(config, _FLOAT32).values())
            rows.append(_row(f"{name}: load, MB", memory / 1e6, loads[name] / 1e6))
            times = worker.call("times", name, "narrow")
            for (batch, images), peak, found in zip(SIZES, peaks[name], times, strict=True):
                workload = Workload(batch, images, TOKENS_PER_IMAGE * images, _NEW_TOKENS, attended_images=1)
                memory = inference_memory(config, _FLOAT32, workload)
                what = f"{name}: {batch} x {images} images"
                rows.append(_row(f"{what}, prompt, MB", (memory.peak - memory.weights) / 1e6, peak / 1e6))
                rows.append(_row(f"{what}, first token, ms", 1000 * found[0], 1000 * found[1]))
                rows.append(_row(f"{what}, each token, ms", 1000 * found[2], 1000 * found[3]))
        calls = {
            what: [
                {part: round(1e6 * seconds, 1) for part, seconds in vars(found).items()}
                for found in worker.call("calls", "narrow", what == "step")
            ]
            for what in ("prompt", "step")
        }
    keep("scaling", {"threads": threads, "repeats": repeats, "calls, us": calls}, rows)


def _row(what: str, predicted: float, measured: float) -> dict:
    return {"what": what, "predicted": predicted, "measured": measured}


def _content(directory: str) -> dict:
    return json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
