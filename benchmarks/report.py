"""How results are printed and kept: a table for people, one JSON line last, and a file with hardware and versions."""

import json
import os
import platform
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "tensorflow-cpu", "keras", "transformers", "numpy", "pillow")


def machine() -> dict:
    """Hardware and versions of the packages that are measured."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


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


def keep(name: str, options: dict, rows: list[dict]):
    """Write ``results/name.json`` and print the result as one JSON line."""
    # of a path the name: where it lies on this machine says nothing to others
    options = {key: value.name if isinstance(value, Path) else value for key, value in options.items()}
    result = {"benchmark": name, "options": options, "rows": rows, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def median(values) -> float:
    """The median of numbers."""
    return statistics.median(values)
