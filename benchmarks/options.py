"""The options that all benchmarks share."""

import argparse
from pathlib import Path

from benchmarks.workload import DEFAULT_CONFIG


def parser_of(doc: str, backends: tuple[str, ...] = ("transformers", "pt", "tf")) -> argparse.ArgumentParser:
    """A parser with --backend, --dtype and --label, and what `add_measuring` adds; `doc` is of the script's module."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    helps = "who is measured; the first is compared with"
    parser.add_argument("--backend", nargs="+", choices=backends, default=list(backends), help=helps)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--label", default="", help="suffix of the name of the file of results")
    add_measuring(parser)
    return parser


def add_measuring(parser: argparse.ArgumentParser):
    """Add --config, --threads, --repeats and --device."""
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="a config.json (370M parameters)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every backend (2)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions (5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; a GPU that is not there is refused before anything runs."""
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.device == "cuda":
        import torch  # here, because workers of another framework import this module

        if not torch.cuda.is_available():
            parser.error(f"--device cuda needs a GPU that PyTorch can use; torch {torch.__version__} finds none.")
    return options
