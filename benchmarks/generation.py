"""How long until the first token, and how long for each token after it?

One row for each number of images and of prompts, or one for a list like ``8/1/1/1``: the images of each row of a batch.
All backends load the same weights and get the same prompts, 24 tokens for each image; logits and tokens are compared
with the first backend's before anything is timed. Repetitions are interleaved: one of each backend, then the next.
Around them the machine's bandwidth is measured three times, and the time per token is printed as a share of what
reading the weights once takes at the median. With --xla one row more is Keras with its loop compiled by XLA; with
--float32 one more is PyTorch in float32 beside another --dtype. What the first run of all takes beyond the second is
printed as time to compile; PyTorch only warms up in it.
"""

import json
from statistics import median

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, of_model
from benchmarks.limits import Limits, decoder_bytes
from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish
from benchmarks.rounds import LOGITS_BOUNDS, in_turns, refuse_above, refuse_others, started
from benchmarks.workers import Worker
from benchmarks.workload import prompts


def measure(workers: dict, limits: Worker, config: dict, images: list[int], options) -> list[dict]:
    """One row of the table for each backend."""
    compiling, logits, tokens = {}, {}, {}
    for name, worker in workers.items():
        worker.call("prepare", prompts(config, images))
        cold, _ = worker.call("generate", options.new_tokens)
        moments, tokens[name] = worker.call("generate", options.new_tokens)
        compiling[name] = max(0.0, cold[0] - moments[0])
        logits[name] = worker.call("logits")
    precision = "int8" if options.quantized else options.dtype
    differences = refuse_above(LOGITS_BOUNDS[precision], logits, "logits")
    if precision == "float32":
        refuse_others(tokens, "tokens")
    runs, bandwidths = {name: [] for name in workers}, [limits.call("bandwidth")]
    for repeats in (options.repeats - options.repeats // 2, options.repeats // 2):
        for name, generations in in_turns(workers, repeats, "generate", options.new_tokens).items():
            runs[name] += [moments for moments, _ in generations]
        bandwidths.append(limits.call("bandwidth"))
    rows = []
    for name, generations in runs.items():
        limit = decoder_bytes(config, itemsize(name, options)) / median(bandwidths)
        firsts = [moments[0] for moments in generations]
        steps = [median(np.diff(moments)) for moments in generations]
        rows.append(
            {
                "images": "/".join(map(str, images)),
                "backend": name,
                "first token s": median(firsts),
                "first spread": [min(firsts), max(firsts)],
                "ms per token": 1000 * median(steps),
                "spread": [1000 * min(steps), 1000 * max(steps)],
                "limit ms": 1000 * limit,
                "share of limit": limit / median(steps),
                "compile s": compiling[name],
                "logits differ": differences[name],
            }
        )
    add_ratio(rows, "first token s", "first ratio")
    add_ratio(rows, "ms per token")
    return rows


def itemsize(name: str, options) -> int:
    """Bytes of a weight that decoding reads."""
    if options.quantized and name == "pt":
        return 1
    return 4 if "float32" in (name.partition(" ")[2], options.dtype) else 2


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--images", nargs="+", default=["1", "4", "16"], help="per prompt, or 8/1/1/1 row by row")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="prompts, where --images is one number (1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate, at least 2 (16)")
    parser.add_argument("--quantized", action="store_true", help="ours with int8 weights (PyTorch)")
    parser.add_argument("--xla", action="store_true", help="also Keras with jit_compile=True")
    parser.add_argument("--float32", action="store_true", help="also PyTorch in float32, where --dtype is another")
    options = parsed(parser)
    options.backend += ["pt float32"] * options.float32 + ["tf xla"] * options.xla
    config = json.loads(options.config.read_text())
    settings = of_model(options) | {"quantized": options.quantized}
    with (
        started(options, TorchBackend, TensorFlowBackend, **settings) as workers,
        Worker(Limits, options.threads, config=config, device=options.device) as limits,
    ):
        rows = []
        for images in options.images:
            counts = [int(count) for count in images.split("/")]
            for batch in options.batch if len(counts) == 1 else [1]:
                rows += measure(workers, limits, config, counts * batch, options)
    columns = ["images", "backend", "first token s", "first ratio", "ms per token", "ratio", "share of limit"]
    finish("generation", options, rows, [*columns, "compile s", "logits differ"])


if __name__ == "__main__":
    main()
