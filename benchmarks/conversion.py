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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.random_checkpoint import write_random_checkpoint
from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters import count_parameters

_TARGETS = ("keras", "tf-h5")
_LAYERS = ("num_hidden_layers",)
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return seconds, usage.ru_maxrss / 1024


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
    """Seconds and peak megabytes of a conversion, and the seconds of its steps."""
    command = [sys.executable, "-m", "conversion.cli", str(source), str(scratch / "out"), "--to", target, "--quiet"]
    seconds, megabytes = run(command)
    report = json.loads((scratch / "out" / "conversion-report.json").read_text())
    shutil.rmtree(scratch / "out")
    return {"seconds": seconds, "megabytes": megabytes, "steps": report["seconds"]}


def scaled(config: dict, layers: int, width: int) -> dict:
    """A configuration with more layers and more width of its decoder."""
    return config | {name: config[name] * layers for name in _LAYERS} | {name: config[name] * width for name in _WIDTHS}


def measure(config: dict, options, scratch: Path) -> dict:
    source = scratch / "source"
    nbytes = write_random_checkpoint(source, config, write_size(config))
    # by another process: a child's maximum resident set starts from its parent's
    subprocess.run(["cat", *map(str, source.iterdir())], stdout=subprocess.DEVNULL, check=True)
    copies, runs = [], {target: [] for target in _TARGETS}
    for _ in range(options.repeats):
        copies.append(copy_and_compare(source, scratch))
        for target in _TARGETS:
            runs[target].append(convert(source, scratch, target))
    result = {"bytes": nbytes, "cp and cmp": statistics.median(copies)}
    for target, measured in runs.items():
        seconds = [one["seconds"] for one in measured]
        middle = sorted(measured, key=lambda one: one["seconds"])[len(measured) // 2]
        result[target] = {
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "ratio": statistics.median(seconds) / result["cp and cmp"],
            "megabytes": max(one["megabytes"] for one in measured),
            "steps": middle["steps"],
        }
    shutil.rmtree(source)
    return result


def write_size(config: dict) -> int:
    """Bytes per file that make three files of a checkpoint, about."""
    return 4 * sum(count_parameters(fields_from_dict(config)).values()) // 3 + 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("--layers", type=int, default=4, help="factor of layers whose peak memory is measured (4)")
    parser.add_argument("--width", type=int, default=2, help="factor of width whose peak memory is measured (2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is space")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = measure(config, options, Path(scratch))
    print(f"{result['bytes'] / 1e9:.2f} GB; cp and cmp {result['cp and cmp']:.2f} s")
    for target in _TARGETS:
        one = result[target]
        print(
            f"{target:6} {one['seconds']:.2f} s ({one['spread'][0]:.2f} to {one['spread'][1]:.2f}), "
            f"{one['ratio']:.1f} times cp and cmp, peak {one['megabytes']:.0f} MB; {one['steps']}"
        )
    for name, factors in (("layers", (options.layers, 1)), ("width", (1, options.width))):
        if max(factors) > 1:
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                source = Path(scratch) / "source"
                larger = scaled(config, *factors)
                nbytes = write_random_checkpoint(source, larger, write_size(larger))
                result[name] = {"bytes": nbytes, "factor": max(factors)}
                for target in _TARGETS:
                    result[name][target] = convert(source, Path(scratch), target)["megabytes"]
                peaks = ", ".join(f"{target} {result[name][target]:.0f} MB" for target in _TARGETS)
                print(f"{max(factors)} times the {name} ({nbytes / 1e9:.2f} GB): peak {peaks}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
