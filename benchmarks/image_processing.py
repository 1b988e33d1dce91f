"""How long does the processor take for photographs?

    python -m benchmarks.image_processing [--backend transformers ours] [--images 16] [--size 1920 1080] [--threads 2]
                                          [--repeats 5] [--config CONFIG]

Smooth random images in RGB, as a decoder leaves them, to normalised pixel values at the size that the model wants.
transformers' row is its Pillow processor; ours may use threads, and no process has more processors than --threads. The
values must be equal bit by bit before anything is timed. --dtype and --device have no say here: pixels are float32,
made on the CPU.
"""

import json
import os

import numpy as np

from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, timing
from benchmarks.rounds import seconds_of_equals


class Processor:
    """An image processor, ours or transformers'; lives in a worker."""

    def __init__(self, kind: str, image_size: int, processors: int):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
        if kind == "transformers":
            from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil as Processor
        else:
            from idefics_common import IdeficsImageProcessor as Processor
        self.processor = Processor(image_size=image_size)

    def prepare(self, count: int, width: int, height: int):
        """Make photographs."""
        self.images = [photograph(width, height, seed) for seed in range(count)]

    def output(self) -> np.ndarray:
        """The values (images, 3, size, size) of all photographs."""
        return np.asarray(self.processor(self.images, return_tensors="np"))


def photograph(width: int, height: int, seed: int):
    """A smooth random image with a little noise, `PIL.Image` in RGB."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (9, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + generator.integers(-6, 7, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def main():
    parser = parser_of(__doc__, backends=("transformers", "ours"))
    parser.add_argument("--images", type=int, default=16, help="photographs (16)")
    parser.add_argument("--size", type=int, nargs=2, default=[1920, 1080], metavar=("WIDTH", "HEIGHT"))
    options = parsed(parser)
    image_size = json.loads(options.config.read_text())["vision_config"]["image_size"]
    settings = {"image_size": image_size, "processors": options.threads}
    inputs = (options.images, *options.size)
    rows = [
        {"backend": name, "images": options.images, "size": options.size, **timing(values)}
        for name, values in seconds_of_equals(options, Processor, inputs, "the pixel values", **settings).items()
    ]
    for row in rows:
        row["ms per image"] = 1000 * row["s"] / options.images
    add_ratio(rows, "s")
    finish("image-processing", options, rows, ["backend", "ms per image", "ratio"])


if __name__ == "__main__":
    main()
