"""Run all benchmarks one after another, and say which figures are reached.

    python -m benchmarks [--only NAME ...] [--summary] [--write PAGE]
                         [--threads 2] [--repeats 5] [--config CONFIG] [--device cpu]

Each script is a process of its own, prints its own table, and leaves its figures in ``benchmarks/results/``; the table
at the end is read off these files, and once more as one line of JSON. If one fails, the others still run, the figures
that need it are "not measured", and no page is written. Nothing else should run on the machine meanwhile. About 40
minutes on 2 cores; with --summary nothing is run.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path

from benchmarks.options import add_measuring, parsed
from benchmarks.pages import between_marks, markdown
from benchmarks.report import RESULTS, print_table
from benchmarks.targets import TARGETS

COLUMNS = ["", "bar", "figure", "reached"]
BEGIN, END = "<!-- figures: python -m benchmarks --summary --write docs/performance.md -->", "<!-- end of figures -->"
RUNS = {
    "generation": "generation",
    "generation-batch4": "generation --images 8/1/1/1 --backend transformers pt --label batch4",
    "generation-batch8": "generation --images 1 --batch 1 8 --backend transformers tf --label batch8",
    "generation-int8": "generation --images 4 --quantized --backend transformers pt --label int8",
    "generation-bfloat16": "generation --images 16 --dtype bfloat16 --float32 --label bfloat16 "
    "--backend transformers pt",
    "generation-xla": "generation --images 1 16 --xla --backend transformers tf --label xla",
    "conversation": "conversation",
    "beams": "beams",
    "training": "training",
    "loading": "loading",
    "image-processing": "processing images",
    "masks": "processing masks",
}
"""Script and options by the name of the file of results."""


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
        try:
            figure = float(target.figure(results))
            reached = "yes" if target.is_reached(figure) else "NO"
        except KeyError:
            figure, reached = None, "not measured"
        rows.append([target.what, f"{'<=' if target.at_most else '>='} {target.bar:g}", figure, reached])
    return rows


def with_summary(page: str) -> str:
    """A page with the table between its marks brought up to date."""
    cells = [
        [what, bar, "-" if figure is None else f"{figure:.2g}", reached] for what, bar, figure, reached in summary()
    ]
    return between_marks(page, BEGIN, END, markdown(COLUMNS, cells))


def run(name: str, options) -> bool:
    """Run one script; whether it succeeded."""
    script, *own = RUNS[name].split()
    shared = {key: str(vars(options)[key]) for key in ("threads", "repeats", "config", "device")}
    arguments = [part for key, setting in shared.items() for part in (f"--{key}", setting)]
    print(f"\n{name}", flush=True)
    begin = time.monotonic()
    status = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *own, *arguments]).returncode
    print(f"{name}: {'failed after ' if status else ''}{time.monotonic() - begin:.0f} s", flush=True)
    return status == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="which to run (all)")
    parser.add_argument("--summary", action="store_true", help="run nothing, print the table of figures and bars")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also put the table between the marks of a page")
    add_measuring(parser)
    options = parsed(parser)
    if options.write:
        with_summary(options.write.read_text(encoding="utf-8"))  # a page without marks is refused now, not at the end
    failed = [] if options.summary else [name for name in options.only if not run(name, options)]
    print()
    rows = summary(failed)
    print_table(COLUMNS, rows)
    print(json.dumps({what: figure for what, _, figure, _ in rows}))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if options.write:
        options.write.write_text(with_summary(options.write.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
