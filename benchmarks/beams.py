"""What does beam search cost in time and in memory, when a prompt brings many images?

    python -m benchmarks.beams [--backend transformers pt tf] [--beams 4] [--images 16] [--new-tokens 8]
                               [--dtype float32] [--config CONFIG] [--threads 2] [--repeats 5] [--device cpu]

Images are the same for all beams of a prompt. The bytes of their features and of their keys and values are those that
the search keeps from step to step, with one beam and with all of them: equal, where nothing is copied per beam.
transformers keeps none, and encodes the images of a prompt once per beam. Memory is the largest resident set in a
search, and what it adds to the set before; nothing, where the framework has kept what it took for the searches before.
The time per token is that of all tokens but the first. Tokens are compared before anything is timed.
"""

import argparse
import json

from benchmarks.options import add_common, common
from benchmarks.report import add_ratio, keep, median, median_of_known, print_table, timing
from benchmarks.rounds import in_turns, refuse_other, started
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
    with started(
        options,
        "benchmarks.beam_searches:searcher",
        directory=str(random_model(options.config)),
        dtype=options.dtype,
        device=options.device,
        fused=not options.unfused,
    ) as workers:
        reference = None
        for name, worker in workers.items():
            worker.call("prepare", prompts(config, [options.images]))
            ids = worker.call("search", options.new_tokens, options.beams)["ids"]  # the run that warms up and compiles
            reference = ids if reference is None else reference
            if options.dtype == "float32":
                refuse_other(ids, reference, name, "tokens")
        runs = in_turns(workers, options.repeats, "search", options.new_tokens, options.beams)
        # after the memory of searches, because what these take may stay with the process
        image_bytes = {
            name: [worker.call("image_bytes", beams) for beams in (1, options.beams)]
            for name, worker in workers.items()
        }
    rows = []
    for name, searches in runs.items():
        steps = [(search["seconds"] - search["first"]) / (options.new_tokens - 1) for search in searches]
        rows.append(
            {
                "backend": name,
                "beams": options.beams,
                "images": options.images,
                "first token s": median([search["first"] for search in searches]),
                "ms per token": 1000 * median(steps),
                **timing([search["seconds"] for search in searches]),
                "peak GB": _gigabytes(search["peak"] for search in searches),
                "added GB": _gigabytes(search["added"] for search in searches),
                "image bytes, 1 beam": image_bytes[name][0],
                f"image bytes, {options.beams} beams": image_bytes[name][1],
            }
        )
    add_ratio(rows, "s")
    add_ratio(rows, "peak GB", "peak ratio")
    columns = ["backend", "first token s", "ms per token", "s", "ratio", "peak GB", "added GB", "peak ratio"]
    columns += ["image bytes, 1 beam", f"image bytes, {options.beams} beams"]
    print_table(columns, [[row[column] for column in columns] for row in rows])
    keep("beams", vars(options), rows)


def _gigabytes(values) -> float | None:
    known = median_of_known(values)
    return None if known is None else known / 1e9


if __name__ == "__main__":
    main()
