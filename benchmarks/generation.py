"""How long until the first token, and how long for each token after it?

    python -m benchmarks.generation [--backend pt transformers tf] [--dtype float32] [--batch 1] [--images 1 4 16]
                                    [--new-tokens 16] [--xla] [--float32] [--config CONFIG] [--threads 2] [--repeats 5]
                                    [--device cpu]

One row for each number of images and of prompts, or one for a list like ``8/1/1/1``: the images of each row of a batch.
All backends load the same weights and get the same prompts, 24 tokens for each image; logits and tokens are compared
with the first backend's before anything is timed. Repetitions are interleaved: one of each backend, then the next.
Around them the machine's limits are measured three times. The time per token is printed as a share of what reading the
weights once takes at the median bandwidth of matrix-vector products; the first token as a share of what its
multiply-adds take at the median rate of a float32 matrix product, which bfloat16 can beat. With --xla one row more is
Keras with its loop compiled by XLA; with --float32 one more is PyTorch in float32 beside another --dtype. What the
first run of all takes beyond the second is printed as time to compile; PyTorch only warms up in it.
"""

import argparse
import json

import numpy as np

from benchmarks.limits import decoder_bytes, prompt_seconds
from benchmarks.options import add_common, common
from benchmarks.report import add_ratio, keep, median, print_table
from benchmarks.rounds import LOGITS_BOUNDS, in_turns, refuse_above, refuse_other, relative_difference, started
from benchmarks.workers import Worker
from benchmarks.workload import prompts, random_model


def measure(workers: dict, limits: Worker, config: dict, images: list[int], options) -> list[dict]:
    """One row of the table for each backend."""
    inputs = prompts(config, images)
    compiling, reference, differences = {}, None, {}
    for name, worker in workers.items():
        worker.call("prepare", inputs)
        cold, _ = worker.call("generate", options.new_tokens)
        moments, ids = worker.call("generate", options.new_tokens)
        compiling[name] = max(0.0, cold[0] - moments[0])
        logits = worker.call("logits")
        if reference is None:
            reference = logits, ids
        differences[name] = relative_difference(logits, reference[0])
        precision = "int8" if options.quantized else options.dtype
        refuse_above(LOGITS_BOUNDS[precision], differences[name], name, "logits")
        if precision == "float32":
            refuse_other(ids, reference[1], name, "tokens")
    runs = {name: [] for name in workers}
    bandwidths, rates = [limits.call("bandwidth")], [limits.call("multiply_adds")]
    for repeats in (options.repeats - options.repeats // 2, options.repeats // 2):
        for name, generations in in_turns(workers, repeats, "generate", options.new_tokens).items():
            runs[name] += [moments for moments, _ in generations]
        bandwidths.append(limits.call("bandwidth"))
        rates.append(limits.call("multiply_adds"))
    first_limit = prompt_seconds(config, images, median(bandwidths), median(rates))
    rows = []
    for name, generations in runs.items():
        limit = decoder_bytes(config, _itemsize(name, options)) / median(bandwidths)
        firsts = [moments[0] for moments in generations]
        steps = [median(np.diff(moments)) for moments in generations]
        rows.append(
            {
                "images": "/".join(map(str, images)),
                "backend": name,
                "first token s": median(firsts),
                "ms per token": 1000 * median(steps),
                "spread": [1000 * min(steps), 1000 * max(steps)],
                "share of limit": limit / median(steps),
                "first spread": [min(firsts), max(firsts)],
                "limit ms": 1000 * limit,
                "first share": first_limit / median(firsts),
                "first limit s": first_limit,
                "compile s": compiling[name],
                "logits differ": differences[name],
            }
        )
    add_ratio(rows, "first token s", "first ratio")
    add_ratio(rows, "ms per token")
    return rows


def _itemsize(name: str, options) -> int:
    """Bytes of a weight that decoding reads."""
    if options.quantized and name == "pt":
        return 1
    return 4 if "float32" in (name.partition(" ")[2], options.dtype) else 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common(parser, backends=("transformers", "pt", "tf"))
    parser.add_argument("--images", nargs="+", default=["1", "4", "16"], help="per prompt, or 8/1/1/1 row by row")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="prompts, where --images is one number (1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate, at least 2 (16)")
    parser.add_argument("--unfused", action="store_true", help="ours without fused projections")
    parser.add_argument("--quantized", action="store_true", help="ours with int8 weights (PyTorch)")
    parser.add_argument("--xla", action="store_true", help="also Keras with jit_compile=True")
    parser.add_argument("--float32", action="store_true", help="also PyTorch in float32, where --dtype is another")
    options = common(parser)
    if options.float32:
        options.backend.append("pt float32")
    if options.xla:
        options.backend.append("tf xla")
    config = json.loads(options.config.read_text())
    with (
        started(
            options,
            "benchmarks.backends:backend",
            directory=str(random_model(options.config)),
            dtype=options.dtype,
            device=options.device,
            fused=not options.unfused,
            quantized=options.quantized,
        ) as workers,
        Worker("benchmarks.limits:Limits", options.threads, config=config, device=options.device) as limits,
    ):
        rows = []
        for images in options.images:
            counts = [int(count) for count in images.split("/")]
            for batch in options.batch if len(counts) == 1 else [1]:
                rows += measure(workers, limits, config, counts * batch, options)
    columns = ["images", "backend", "first token s", "first ratio", "first share", "ms per token", "ratio"]
    columns += ["share of limit", "compile s", "logits differ"]
    print_table(columns, [[row[column] for column in columns] for row in rows])
    keep("generation", vars(options), rows)


if __name__ == "__main__":
    main()
