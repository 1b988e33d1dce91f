"""Writes the photographs shipped in `photos/`: 200 of the test split and 500 of the training split, as PNG.

    python examples/fashion/export_photos.py [--data FOLDER]

Every class has the same number: the first ones of the split, in its order, so that nobody chose them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from data import DEBIAN_FOLDER, SHIPPED_FOLDER, Photographs, load_idx

PER_CLASS = {"train": 50, "test": 20}


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Numbers of the first `per_class` photographs of every class, in the order of the split."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))


def export(photographs: Photographs, numbers: np.ndarray, folder: Path) -> None:
    """One PNG per photograph, named by its number in the split, and `labels.json`: file name -> class 0..9."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for number in numbers.tolist():
        name = f"{number:05d}.png"
        photographs[number].save(folder / name, optimize=True)
        labels[name] = int(photographs.labels[number])
    (folder / "labels.json").write_text(json.dumps(labels, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four .gz files")
    parser.add_argument("--out", type=Path, default=SHIPPED_FOLDER, help="folder for the PNG files")
    arguments = parser.parse_args()
    for split, per_class in PER_CLASS.items():
        photographs = load_idx(arguments.data, split)
        numbers = first_of_each_class(photographs.labels, per_class)
        export(photographs, numbers, arguments.out / split)
        print(f"{arguments.out / split}: {len(numbers)} photographs")


if __name__ == "__main__":
    main()
