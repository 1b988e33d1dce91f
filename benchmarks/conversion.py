"""How fast and how large is a conversion, next to copying and comparing the same bytes?

    python -m benchmarks.conversion CONFIG [--layers 4] [--width 2] [--repeats 5] [--scratch DIRECTORY]

Random weights of a configuration are made on the spot, in three safetensors files. Each round runs, one after
another, ``cp`` and ``cmp`` of these files and each conversion, as processes of their own; medians are printed. Peak
memory is the maximum resident set that the kernel counts, pages of memory maps included. It is measured again on a
checkpoint with more layers and on one of more width.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.report import print_table
from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters import count_parameters, expand

_TARGETS = ("keras", "tf-h5")
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")


def copy_and_compare(source: Path, scratch: Path) -> float:
    """Seconds of `cp` and `cmp` of the tensors of a checkpoint."""
    target = scratch / "copy"
    target.mkdir()
    files = [path.name for path in sorted(source.glob("*.safetensors"))]
    start = time.perf_counter()
    subprocess.run(["cp", *(str(source / name) for name in files), str(target)], check=True)
    for name in files:
        subprocess.run(["cmp", str(source / name), str(target / name)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(source: Path, scratch: Path, target: str) -> dict:
    """Seconds and peak megabytes of a conversion in a process of its own, and the seconds of its steps."""
    command = [sys.executable, "-m", "conversion.cli", str(source), str(scratch / "out"), "--to", target, "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    report = json.loads((scratch / "out" / "conversion-report.json").read_text())
    shutil.rmtree(scratch / "out")
    return {"seconds": seconds, "megabytes": usage.ru_maxrss / 1024, "steps": report["seconds"]}


def in_rounds(config: dict, repeats: int, scratch: Path) -> tuple[list[float], dict[str, list[dict]]]:
    """What `copy_and_compare` gives, and what `convert` gives to each format, one after another in each round."""
    # three files, about
    size = 4 * sum(count_parameters(expand(fields_from_dict(config))).values()) // 3 + 2**24
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        source = Path(directory) / "source"
        write_random_checkpoint(source, config, size)
        # by another process: a child's maximum resident set starts from its parent's
        subprocess.run(["cat", *map(str, source.iterdir())], stdout=subprocess.DEVNULL, check=True)
        copies, runs = [], {target: [] for target in _TARGETS}
        for _ in range(repeats):
            copies.append(copy_and_compare(source, Path(directory)))
            for target in _TARGETS:
                runs[target].append(convert(source, Path(directory), target))
    return copies, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("--layers", type=int, default=4, help="factor of layers whose peak memory is measured (4)")
    parser.add_argument("--width", type=int, default=2, help="factor of width whose peak memory is measured (2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is space")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    copies, runs = in_rounds(config, options.repeats, options.scratch)
    rows = {}
    for target, measured in runs.items():
        seconds = [one["seconds"] for one in measured]
        rows[target] = {
            "to": target,
            "s": median(seconds),
            "spread": [min(seconds), max(seconds)],
            "cp and cmp s": median(copies),
            "ratio": median(seconds) / median(copies),
            "peak MB": max(one["megabytes"] for one in measured),
            "steps": measured[seconds.index(sorted(seconds)[len(seconds) // 2])]["steps"],
        }
    larger = {
        f"peak MB, {options.layers} x layers": {"num_hidden_layers": options.layers * config["num_hidden_layers"]},
        f"peak MB, {options.width} x width": {name: options.width * config[name] for name in _WIDTHS},
    }
    for column, changes in larger.items():
        for target, (one,) in in_rounds(config | changes, 1, options.scratch)[1].items():
            rows[target][column] = one["megabytes"]
    columns = ["to", "s", "cp and cmp s", "ratio", "peak MB", *larger]
    print_table(columns, [[row[column] for column in columns] for row in rows.values()])
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()
