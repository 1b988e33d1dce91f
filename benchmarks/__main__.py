"""Run all benchmarks one after another, and say which figures are reached.

    python -m benchmarks [--only NAME ...] [--summary] [--threads 2] [--repeats 5] [--config CONFIG] [--device cpu]

Each script is a process of its own, prints its own table, and leaves its figures in ``benchmarks/results/``; the table
at the end is read off these files. Nothing else should run on the machine meanwhile. About 40 minutes on 2 cores; with
--summary nothing is run.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.options import add_measuring, common
from benchmarks.report import RESULTS, print_table
from benchmarks.targets import TARGETS

_GENERATION = "benchmarks.generation"
RUNS = {
    "generation": [_GENERATION],
    "generation-batch4": [_GENERATION, "--images", "8/1/1/1", "--backend", "transformers", "pt", "--label", "batch4"],
    "generation-batch8": [
        *(_GENERATION, "--images", "1", "--batch", "8", "--backend", "transformers", "tf", "--label", "batch8")
    ],
    "generation-int8": [
        *(_GENERATION, "--images", "4", "--quantized", "--backend", "transformers", "pt", "--label", "int8")
    ],
    "generation-bfloat16": [
        *(_GENERATION, "--images", "16", "--dtype", "bfloat16", "--backend", "transformers", "pt"),
        *("--label", "bfloat16"),
    ],
    "conversation": ["benchmarks.conversation"],
    "beams": ["benchmarks.beams"],
    "training": ["benchmarks.training"],
    "loading": ["benchmarks.loading"],
    "image-processing": ["benchmarks.image_processing"],
    "masks": ["benchmarks.masks"],
}
"""Module and options by the name of the file of results."""


def print_summary():
    """Every figure beside its bar, from the files of results that there are."""
    results = {}
    for name in RUNS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows = []
    for target in TARGETS:
        sign = "<=" if target.at_most else ">="
        try:
            figure = float(target.figure(results))
        except KeyError:
            figure = None
        reached = "not measured" if figure is None else "yes" if target.is_reached(figure) else "NO"
        rows.append([target.what, f"{sign} {target.bar:g}", figure, reached])
    print_table(["", "bar", "figure", "reached"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="which to run (all)")
    parser.add_argument("--summary", action="store_true", help="run nothing, print the table of figures and bars")
    add_measuring(parser)
    options = common(parser)
    failed = []
    for name in () if options.summary else options.only:
        module, *own = RUNS[name]
        shared = {
            "threads": options.threads,
            "repeats": options.repeats,
            "config": options.config,
            "device": options.device,
        }
        arguments = [part for key, setting in shared.items() for part in (f"--{key}", str(setting))]
        print(f"\n{name}", flush=True)
        if subprocess.run([sys.executable, "-m", module, *own, *arguments]).returncode:
            failed.append(name)
    print()
    print_summary()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
