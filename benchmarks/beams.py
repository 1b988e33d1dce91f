"""What does beam search cost in time and in memory, when a prompt brings many images?

    python -m benchmarks.beams [--backend transformers pt tf] [--beams 4] [--images 16] [--new-tokens 8]
                               [--dtype float32] [--config CONFIG] [--threads 2] [--repeats 5] [--device cpu]

Images are the same for all beams of a prompt. The bytes of their features and of their keys and values are those that
the search keeps from step to step, with one beam and with all of them: equal, where nothing is copied per beam.
transformers keeps none. Memory is the largest resident set in a search, and what it adds to the set before.
The time per token is that of all tokens but the first. Tokens are compared before anything is timed.
"""

import argparse
import json

import numpy as np

from benchmarks.options import add_common, common, result_name
from benchmarks.report import keep, median, print_table
from benchmarks.rounds import close, in_turns, start
from benchmarks.workload import prompts, random_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common(parser, backends=("transformers", "pt", "tf"))
    parser.add_argument("--beams", type=int, default=4, help="beams (4)")
    parser.add_argument("--images", type=int, default=16, help="images of the prompt (16)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate (8)")
    parser.add_argument("--unfused", action="store_true", help="ours without fused projections")
    options = common(parser)
    config = json.loads(options.config.read_text())
    workers = start(
        options,
        "benchmarks.beam_searches:searcher",
        directory=str(random_model(options.config)),
        dtype=options.dtype,
        device=options.device,
        fused=not options.unfused,
    )
    reference, image_bytes = None, {}
    for name, worker in workers.items():
        worker.call("prepare", prompts(config, [options.images]))
        ids = worker.call("tokens", options.new_tokens, options.beams)
        reference = ids if reference is None else reference
        if options.dtype == "float32" and not np.array_equal(ids, reference):
            raise SystemExit(f"{name}: tokens differ from the first backend's: {ids} against {reference}.")
        image_bytes[name] = [worker.call("image_bytes", beams) for beams in (1, options.beams)]
        worker.call("search", 1, options.beams)  # a graph's first run compiles it
    short = in_turns(workers, options.repeats, "search", 1, options.beams)
    long = in_turns(workers, options.repeats, "search", options.new_tokens, options.beams)
    close(workers)
    rows = []
    for name, runs in long.items():
        first = median([run["seconds"] for run in short[name]])
        seconds = median([run["seconds"] for run in runs])
        rows.append(
            {
                "backend": name,
                "beams": options.beams,
                "images": options.images,
                "first token s": first,
                "ms per token": 1000 * (seconds - first) / (options.new_tokens - 1),
                "s": seconds,
                "spread": [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)],
                "peak GB": _gigabytes(run["peak"] for run in runs),
                "added GB": _gigabytes(run["added"] for run in runs),
                "image bytes, 1 beam": image_bytes[name][0],
                f"image bytes, {options.beams} beams": image_bytes[name][1],
            }
        )
    for row in rows:
        row["ratio"] = row["s"] / rows[0]["s"]
        row["peak ratio"] = row["peak GB"] / rows[0]["peak GB"] if row["peak GB"] else None
    columns = ["backend", "first token s", "ms per token", "s", "ratio", "peak GB", "added GB", "peak ratio"]
    columns += ["image bytes, 1 beam", f"image bytes, {options.beams} beams"]
    print_table(columns, [[row[column] for column in columns] for row in rows])
    keep(result_name("beams", options), vars(options), rows)


def _gigabytes(values) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) / 1e9 if known else None


if __name__ == "__main__":
    main()
