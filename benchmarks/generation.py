"""How long until the first token, and how long for each token after it?

    python -m benchmarks.generation [--backend pt transformers tf] [--dtype float32] [--batch 1] [--images 1 4 16]
                                    [--new-tokens 16] [--config CONFIG] [--threads 2] [--repeats 5] [--device cpu]

One row for each number of images, or one for a list like ``8/1/1/1``: the images of each row of a batch. All backends
load the same weights and get the same prompts, 24 tokens for each image; logits and tokens are compared with the first
backend's before anything is timed. Repetitions are interleaved: one of each backend, then the next. Around them the
bandwidth of matrix-vector products is measured three times, and the time per token is printed as a share of what
reading the weights once takes at their median.
"""

import argparse
import json

import numpy as np

from benchmarks.limits import decoder_bytes
from benchmarks.options import add_common, common
from benchmarks.report import keep, median, print_table
from benchmarks.workers import Worker
from benchmarks.workload import prompts, random_model

_LOGITS = {"float32": 1e-4, "bfloat16": 0.12, "float16": 0.02}  # relative; the tests have the bounds of exactness


def measure(workers: dict, limits: Worker, config: dict, images: list[int], options) -> list[dict]:
    """One row of the table for each backend."""
    inputs = prompts(config, images)
    firsts, steps = {name: [] for name in workers}, {name: [] for name in workers}
    compiling, reference, differences = {}, None, {}
    for name, worker in workers.items():
        worker.call("prepare", inputs)
        # a graph's first run compiles it
        cold = worker.call("generate", options.new_tokens)[0][0]
        moments, ids = worker.call("generate", options.new_tokens)
        compiling[name] = max(0.0, cold - moments[0])
        logits = worker.call("logits")
        if reference is None:
            reference = logits, ids
        differences[name] = float(np.abs(logits - reference[0]).max() / np.abs(reference[0]).max())
        if not options.quantized and differences[name] > _LOGITS[options.dtype]:
            raise SystemExit(
                f"{name}: logits differ from the first backend's by {differences[name]:.1e} of their scale."
            )
        if options.dtype == "float32" and not options.quantized and not np.array_equal(ids, reference[1]):
            raise SystemExit(f"{name}: tokens differ from the first backend's: {ids} against {reference[1]}.")
    bandwidths = [limits.call("bandwidth")]
    for repeat in range(options.repeats):
        for name, worker in workers.items():
            moments, _ = worker.call("generate", options.new_tokens)
            firsts[name].append(moments[0])
            steps[name].append(median(np.diff(moments)))
        if repeat == options.repeats // 2:
            bandwidths.append(limits.call("bandwidth"))
    bandwidths.append(limits.call("bandwidth"))
    limit = decoder_bytes(config) / median(bandwidths)
    return [
        {
            "images": "/".join(map(str, images)),
            "backend": name,
            "first token s": median(firsts[name]),
            "ms per token": 1000 * median(steps[name]),
            "spread": [1000 * min(steps[name]), 1000 * max(steps[name])],
            "share of limit": limit / median(steps[name]),
            "first spread": [min(firsts[name]), max(firsts[name])],
            "limit ms": 1000 * limit,
            "compile s": compiling[name],
            "logits differ": differences[name],
        }
        for name in workers
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common(parser, backends=("transformers", "pt", "tf"))
    parser.add_argument("--images", nargs="+", default=["1", "4", "16"], help="per prompt, or 8/1/1/1 row by row")
    parser.add_argument("--batch", type=int, default=1, help="prompts, where --images is one number (1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate (16)")
    parser.add_argument("--unfused", action="store_true", help="ours without fused projections")
    parser.add_argument("--quantized", action="store_true", help="ours with int8 weights (PyTorch)")
    options = common(parser)
    config = json.loads(options.config.read_text())
    directory = str(random_model(options.config))
    workers = {}
    for kind in options.backend:
        own = {"fused": not options.unfused, "quantized": options.quantized} if kind == "pt" else {}
        dtype = "float32" if kind == "transformers" and options.quantized else options.dtype
        workers[kind] = Worker(
            "benchmarks.backends:backend",
            options.threads,
            kind=kind,
            directory=directory,
            dtype=dtype,
            device=options.device,
            **own,
        )
    limits = Worker("benchmarks.limits:Limits", options.threads, config=config)
    rows = []
    for images in options.images:
        counts = [int(count) for count in images.split("/")]
        rows += measure(workers, limits, config, counts if len(counts) > 1 else counts * options.batch, options)
    base = {}
    table = []
    for row in rows:
        first = base.setdefault(row["images"], row)
        table.append(
            [
                row["images"],
                row["backend"],
                row["first token s"],
                row["first token s"] / first["first token s"],
                row["ms per token"],
                row["ms per token"] / first["ms per token"],
                row["share of limit"],
                row["compile s"],
                f"{row['logits differ']:.0e}",
            ]
        )
    print_table(
        [
            "images",
            "backend",
            "first token s",
            "ratio",
            "ms per token",
            "ratio",
            "share of limit",
            "compile s",
            "logits",
        ],
        table,
    )
    keep(f"generation-{options.label}" if options.label else "generation", vars(options), rows)


if __name__ == "__main__":
    main()
