"""How long until a checkpoint is loaded and the first forward on one token has finished, and in how much memory?

    python -m benchmarks.loading [--backend transformers pt tf] [--dtype float32] [--threads 2] [--repeats 5]
                                 [--config CONFIG] [--device cpu]

Every repetition is a fresh process. Its imports are done before the clock starts, and printed apart; the files are in
the page cache. The token looks at one image, so that every weight is read (and because transformers refuses text
alone). Logits are compared in a first round, which is not timed.

Memory is the largest resident set since the imports, mapped pages of the files included, less what was resident then;
it is printed as a multiple of the bytes of the tensors.
"""

import argparse
import importlib
import json
import os
import time

import numpy as np

from benchmarks.options import add_common, common, tensorflow_device
from benchmarks.report import add_ratio, keep, median, median_of_known, print_table, timing
from benchmarks.rounds import LOGITS_BOUNDS, refuse_above, relative_difference
from benchmarks.workers import Peak, Worker
from benchmarks.workload import random_model


class Loader:
    """A process that has imported a backend and loaded nothing yet; lives in a worker."""

    def __init__(self, kind: str, dtype: str, device: str):
        begin = time.perf_counter()
        self._load = self._tensorflow(dtype, device) if kind == "tf" else self._torch(kind, dtype, device)
        self.import_seconds = time.perf_counter() - begin
        self._gpu = importlib.import_module("torch") if device == "cuda" and kind != "tf" else None

    @staticmethod
    def _torch(kind: str, dtype: str, device: str):
        import torch

        if kind == "transformers":
            from transformers import IdeficsForVisionText2Text
            from transformers import logging as transformers_logging

            transformers_logging.set_verbosity_error()
        else:
            from idefics_pt import IdeficsForVisionText2Text
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

        def load(directory, inputs):
            model = IdeficsForVisionText2Text.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
                return model(**tensors).logits[:, -1].float().cpu().numpy()

        return load

    @staticmethod
    def _tensorflow(dtype: str, device: str):
        import tensorflow as tf

        from idefics_tf import TFIdeficsForVisionText2Text

        tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["OMP_NUM_THREADS"]))

        def load(directory, inputs):
            with tf.device(tensorflow_device(device)):
                model = TFIdeficsForVisionText2Text.from_pretrained(directory, dtype=dtype)
                return np.asarray(model(inputs).logits[:, -1], np.float32)

        return load

    def load(self, directory: str, inputs: dict) -> dict:
        """Load and run one forward: seconds, seconds of the imports, bytes above them, and the logits (B, V)."""
        peak = Peak(self._gpu)
        begin = time.perf_counter()
        logits = self._load(directory, inputs)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "imports": self.import_seconds, "peak": peak.added(), "logits": logits}


def one_token(config: dict) -> dict:
    """One token that looks at one image, as numpy arrays."""
    size = config["vision_config"]["image_size"]
    return {
        "input_ids": np.full((1, 1), 11),
        "attention_mask": np.ones((1, 1), np.int64),
        "pixel_values": np.random.default_rng(0).standard_normal((1, 1, 3, size, size), dtype=np.float32),
        "image_attention_mask": np.ones((1, 1, 1), np.int64),
    }


def bytes_of_tensors(directory) -> int:
    """Bytes of all tensors of a checkpoint; reading the files puts them into the page cache."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            total += path.stat().st_size - 8 - header
            while file.read(2**24):
                continue
    return total


def load_fresh(kind: str, options, directory, inputs: dict) -> dict:
    """What `Loader.load` reports in a process of its own."""
    target = "benchmarks.loading:Loader"
    with Worker(target, options.threads, kind=kind, dtype=options.dtype, device=options.device) as worker:
        return worker.call("load", str(directory), inputs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common(parser, backends=("transformers", "pt", "tf"))
    options = common(parser)
    inputs = one_token(json.loads(options.config.read_text()))
    directory = random_model(options.config)
    nbytes = bytes_of_tensors(directory)
    reference, differences = None, {}
    for name in options.backend:
        logits = load_fresh(name, options, directory, inputs)["logits"]
        reference = logits if reference is None else reference
        difference = relative_difference(logits, reference)
        differences[name] = refuse_above(LOGITS_BOUNDS[options.dtype], difference, name, "logits")
    runs = {name: [] for name in options.backend}
    for _ in range(options.repeats):
        for name in options.backend:
            runs[name].append(load_fresh(name, options, directory, inputs))
    rows = []
    for name, measured in runs.items():
        peak = median_of_known(run["peak"] for run in measured)
        rows.append(
            {
                "backend": name,
                **timing([run["seconds"] for run in measured]),
                "imports s": median([run["imports"] for run in measured]),
                "peak bytes": peak,
                "peak of model": None if peak is None else peak / nbytes,
                "model bytes": nbytes,
                "logits differ": differences[name],
            }
        )
    add_ratio(rows, "s")
    columns = ["backend", "s", "ratio", "imports s", "peak of model"]
    print(f"{nbytes / 1e9:.2f} GB of tensors")
    print_table(columns, [[row[column] for column in columns] for row in rows])
    keep("loading", vars(options), rows)


if __name__ == "__main__":
    main()
