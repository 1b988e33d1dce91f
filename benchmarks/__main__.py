"""Run all benchmarks one after another, and say which figures are reached.

    python -m benchmarks [--only NAME ...] [--summary] [--write PAGE]
                         [--threads 2] [--repeats 5] [--config CONFIG] [--device cpu]

Each script is a process of its own, prints its own table, and leaves its figures in ``benchmarks/results/``; the table
at the end is read off these files. If one fails, the others still run, the figures that need it are "not measured", and
no page is written. Nothing else should run on the machine meanwhile. About 40 minutes on 2 cores; with --summary
nothing is run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path

from benchmarks.options import add_measuring, common
from benchmarks.pages import between_marks, markdown
from benchmarks.report import RESULTS, print_table
from benchmarks.targets import TARGETS

_GENERATION = "benchmarks.generation"
COLUMNS = ["", "bar", "figure", "reached"]
BEGIN, END = "<!-- figures: python -m benchmarks --summary --write docs/performance.md -->", "<!-- end of figures -->"
RUNS = {
    "generation": [_GENERATION],
    "generation-batch4": [_GENERATION, "--images", "8/1/1/1", "--backend", "transformers", "pt", "--label", "batch4"],
    "generation-batch8": [
        *(_GENERATION, "--images", "1", "--batch", "1", "8", "--backend", "transformers", "tf", "--label", "batch8")
    ],
    "generation-int8": [
        *(_GENERATION, "--images", "4", "--quantized", "--backend", "transformers", "pt", "--label", "int8")
    ],
    "generation-bfloat16": [
        *(_GENERATION, "--images", "16", "--dtype", "bfloat16", "--backend", "transformers", "pt"),
        *("--float32", "--label", "bfloat16"),
    ],
    "generation-xla": [
        *(_GENERATION, "--images", "1", "16", "--xla", "--backend", "transformers", "tf", "--label", "xla")
    ],
    "conversation": ["benchmarks.conversation"],
    "beams": ["benchmarks.beams"],
    "training": ["benchmarks.training"],
    "loading": ["benchmarks.loading"],
    "image-processing": ["benchmarks.image_processing"],
    "masks": ["benchmarks.masks"],
}
"""Module and options by the name of the file of results."""


def summary(failed: Container[str] = ()) -> list[list]:
    """Every figure beside its bar, and whether it is reached, from the files of results that there are.

    Args:
        failed: names of runs that did not finish; what earlier ones have left does not count.
    """
    results = {}
    for name in RUNS:
        path = RESULTS / f"{name}.json"
        if path.exists() and name not in failed:
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
    return rows


def with_summary(page: str) -> str:
    """A page with the table between its marks brought up to date."""
    cells = [
        [what, bar, "-" if figure is None else f"{figure:.2g}", reached] for what, bar, figure, reached in summary()
    ]
    return between_marks(page, BEGIN, END, markdown(COLUMNS, cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="which to run (all)")
    parser.add_argument("--summary", action="store_true", help="run nothing, print the table of figures and bars")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also put the table between the marks of a page")
    add_measuring(parser)
    options = common(parser)
    if options.write:
        with_summary(options.write.read_text(encoding="utf-8"))  # a page without marks is refused now, not at the end
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
        begin = time.monotonic()
        status = subprocess.run([sys.executable, "-m", module, *own, *arguments]).returncode
        print(f"{name}: {'failed after ' if status else ''}{time.monotonic() - begin:.0f} s", flush=True)
        if status:
            failed.append(name)
    print()
    print_table(COLUMNS, summary(failed))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if options.write:
        options.write.write_text(with_summary(options.write.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
