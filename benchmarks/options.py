"""The options that all benchmarks share."""

import argparse
from pathlib import Path

from benchmarks.workload import DEFAULT_CONFIG


def add_common(parser: argparse.ArgumentParser, backends: tuple[str, ...]):
    """Add --backend, --dtype, --config, --threads, --repeats, --device and --label."""
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=backends,
        default=list(backends),
        help="who is measured; the first is compared with",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--label", default="", help="suffix of the name of the file of results")
    add_measuring(parser)


def add_measuring(parser: argparse.ArgumentParser):
    """Add --config, --threads, --repeats and --device."""
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="a config.json (370M parameters)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every backend (2)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions (5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def common(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line."""
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.device == "cuda":
        import torch  # here, because workers of another framework import this module

        if not torch.cuda.is_available():
            parser.error(f"--device cuda needs a GPU that PyTorch can use; torch {torch.__version__} finds none.")
    return options


def tensorflow_device(device: str) -> str:
    """TensorFlow's name of a --device.

    Raises:
        ValueError: if it has none such; TensorFlow itself would compute on the CPU without a word.
    """
    import tensorflow as tf

    kind = "GPU" if device == "cuda" else "CPU"
    if not tf.config.list_physical_devices(kind):
        raise ValueError(f"--device {device} needs a {kind} that TensorFlow can use; {tf.__version__} finds none.")
    return f"/{kind}:0"
