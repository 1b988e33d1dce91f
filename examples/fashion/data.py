"""Fashion-MNIST as it lies on disk: the four idx files, and the photographs shipped beside this file as PNG.

The 60,000 + 10,000 grey photographs of 28 x 28 pixels (https://github.com/zalandoresearch/fashion-mnist, MIT
licence) come with Debian's package `dataset-fashion-mnist`. Training and the full evaluation read them there;
the demo and the tests need only the few photographs in `photos/`, which `export_photos.py` wrote.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SHIPPED_FOLDER = Path(__file__).parent / "photos"
_IDX_NAMES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Photographs:
    """One split: `pixels` uint8 `(count, 28, 28)`, 0 is black; `labels` int64 `(count,)`, 0..9."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Image.Image:
        """Photograph `number` as the processor takes it."""
        return Image.fromarray(self.pixels[number])


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes (format: http://yann.lecun.com/exdb/mnist).

    Raises:
        ValueError: the file is not an idx file of bytes, or shorter or longer than its header says.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an idx file of unsigned bytes, got the first bytes {content[:4].hex()}")
    rank = content[3]
    shape = tuple(np.frombuffer(content, ">u4", count=rank, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path}: the header promises shape {shape}, but {values.size} bytes follow")
    return values.reshape(shape)


def load_idx(folder: Path, split: str) -> Photographs:
    """The whole split `"train"` or `"test"` from the folder with the four `.gz` files."""
    stem = _IDX_NAMES[split]
    images = Path(folder) / f"{stem}-images-idx3-ubyte.gz"
    if not images.exists():
        raise FileNotFoundError(
            f"{images} does not exist: install Debian's dataset-fashion-mnist, or pass --data with the folder that "
            "holds the four .gz files of https://github.com/zalandoresearch/fashion-mnist"
        )
    labels = read_idx(Path(folder) / f"{stem}-labels-idx1-ubyte.gz")
    return Photographs(read_idx(images), labels.astype(np.int64))


def load_shipped(split: str, folder: Path = SHIPPED_FOLDER) -> Photographs:
    """The photographs of `photos/train` or `photos/test`, in the order of their `labels.json`."""
    labels = json.loads((folder / split / "labels.json").read_text())
    pixels = []
    for name in labels:
        with Image.open(folder / split / name) as image:
            pixels.append(np.asarray(image))
    return Photographs(np.stack(pixels), np.asarray(list(labels.values()), np.int64))
