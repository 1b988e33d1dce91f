"""How results are printed and kept: a table for people, one JSON line last, and a file with hardware and versions."""

import json
import os
import platform
from datetime import date
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "tensorflow-cpu", "keras", "transformers", "numpy", "pillow")


def machine() -> dict:
    """Hardware and versions of the packages that are measured; TensorFlow for GPUs is another package, and is None."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {package.metadata["Name"].replace("_", "-"): package.version for package in distributions()}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: versions.get(name) for name in _PACKAGES},
        "date": date.today().isoformat(),
    }


def print_table(columns: list[str], rows: list[list]):
    """Print right-aligned columns; floats with three digits, None as a dash."""
    cells = [columns, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def finish(benchmark: str, options, rows: list[dict], columns: list[str]):
    """Print a table of some columns of the rows; write all to ``results/benchmark.json``, or with a label to
    ``results/benchmark-label.json``, and print that as one JSON line.

    The file is there as a whole or not at all: a run that is cut off leaves an earlier one in its place.
    """
    print_table(columns, [[row[column] for column in columns] for row in rows])
    name = f"{benchmark}-{options.label}" if options.label else benchmark
    # of a path the name: where it lies on this machine says nothing to others
    options = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"benchmark": name, "options": options, "rows": rows, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(RESULTS / f"{name}.json")
    print(json.dumps(result))


def median_of_known(values, unit: float = 1) -> float | None:
    """The median of those that are not None, in units of `unit`; None if there are none."""
    known = [value / unit for value in values if value is not None]
    return median(known) if known else None


def timing(seconds: list[float]) -> dict:
    """Columns of a row: the median `s` of repetitions, and the least and the most of them as `spread`."""
    return {"s": median(seconds), "spread": [min(seconds), max(seconds)]}


def add_ratio(rows: list[dict], column: str, ratio: str = "ratio"):
    """Add to each row its value of a column as a multiple of the first row's; None where one of them is not known."""
    for row in rows:
        is_known = None not in (row[column], rows[0][column])
        row[ratio] = row[column] / rows[0][column] if is_known else None
