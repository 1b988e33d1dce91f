"""How long until a checkpoint is loaded and the first forward on one token has finished, and in how much memory?

Every repetition is a fresh process. Its imports are done before the clock starts, and printed apart; the files are in
the page cache. The token looks at one image, so that every weight is read (and because transformers refuses text
alone). Logits are compared in a first round, which is not timed.

Memory is the largest resident set since the imports, mapped pages of the files included, less what was resident then;
it is printed as a multiple of the bytes of the files.
"""

import json
import time
from pathlib import Path
from statistics import median

from benchmarks.backends import TensorFlowBackend, TorchBackend, of_model
from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, median_of_known, timing
from benchmarks.rounds import LOGITS_BOUNDS, refuse_above
from benchmarks.workers import Worker
from benchmarks.workload import prompts


class _Loader:
    """A process that has imported a backend and loaded nothing yet; lives in a worker."""

    inter_op_threads = 0  # as many as TensorFlow sees fit

    def __init__(self, kind: str, **kwargs):
        begin = time.perf_counter()
        super().__init__(kind, fused=False, **kwargs)
        self.import_seconds = time.perf_counter() - begin

    def first_forward(self, directory: str, inputs: dict) -> dict:
        """Load and run one forward: seconds, seconds of the imports, bytes above them, and the logits (B, V)."""
        peak = self.peak()
        begin = time.perf_counter()
        self.load(directory)
        self.prepare(inputs)
        logits = self.logits()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "imports": self.import_seconds, "peak": peak.added(), "logits": logits}


class TorchLoader(_Loader, TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""


class TensorFlowLoader(_Loader, TensorFlowBackend):
    """Keras."""


def one_token(config: dict) -> dict:
    """One token that looks at one image, as numpy arrays."""
    return {name: array if name == "pixel_values" else array[:, 1:2] for name, array in prompts(config, [1]).items()}


def load_fresh(kind: str, options, directory, inputs: dict) -> dict:
    """What `first_forward` reports in a process of its own."""
    loader = TensorFlowLoader if kind == "tf" else TorchLoader
    with Worker(loader, options.threads, kind=kind, dtype=options.dtype, device=options.device) as worker:
        return worker.call("first_forward", directory, inputs)


def main():
    options = parsed(parser_of(__doc__))
    directory, inputs = of_model(options)["directory"], one_token(json.loads(options.config.read_text()))
    # reading them puts them into the page cache
    nbytes = sum(len(path.read_bytes()) for path in Path(directory).glob("*.safetensors"))
    logits = {name: load_fresh(name, options, directory, inputs)["logits"] for name in options.backend}
    differences = refuse_above(LOGITS_BOUNDS[options.dtype], logits, "logits")
    runs = {name: [] for name in options.backend}
    for _ in range(options.repeats):
        for name in options.backend:
            runs[name].append(load_fresh(name, options, directory, inputs))
    rows = []
    for name, measured in runs.items():
        rows.append(
            {
                "backend": name,
                **timing([run["seconds"] for run in measured]),
                "imports s": median(run["imports"] for run in measured),
                "peak bytes": median_of_known(run["peak"] for run in measured),
                "peak of model": median_of_known((run["peak"] for run in measured), nbytes),
                "model bytes": nbytes,
                "logits differ": differences[name],
            }
        )
    add_ratio(rows, "s")
    print(f"{nbytes / 1e9:.2f} GB of weights")
    finish("loading", options, rows, ["backend", "s", "ratio", "imports s", "peak of model"])


if __name__ == "__main__":
    main()
