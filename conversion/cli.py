"""The command ``convert-weights``: converts, and with ``inspect`` or ``verify`` first, looks or compares.

Exit codes: 0 if what was asked for holds, 1 if it does not or cannot be done, 2 for wrong arguments, 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

from conversion.converting import VERIFICATIONS, convert
from conversion.errors import ConversionError
from conversion.formats import FORMAT_NAMES
from conversion.inspection import inspect
from conversion.plan import DTYPES
from conversion.verification import verify
from idefics_common.checkpoint import CheckpointError

_SOURCE_HELP = "a directory, a file beside its config.json, or an id on the Hugging Face hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"inspect": _inspect, "verify": _verify}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _convert(arguments)
    except (CheckpointError, ConversionError) as error:
        return _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("convert-weights: interrupted; --resume goes on from here", file=sys.stderr)
        return 130


def _convert(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert-weights",
        description="Convert an IDEFICS checkpoint to another format, and prove that it is the same model.",
        epilog="Other commands: convert-weights inspect SRC, convert-weights verify A B; each has its own --help.",
    )
    parser.add_argument("source", metavar="SRC", help=_SOURCE_HELP)
    parser.add_argument("destination", metavar="DST", help="the directory to write")
    parser.add_argument("--to", required=True, choices=FORMAT_NAMES, help="format to write")
    parser.add_argument("--dtype", default="keep", choices=("keep", *DTYPES), help="dtype to write (keep)")
    parser.add_argument(
        "--max-shard-size",
        type=lambda text: int(text) if text.isdecimal() else text,
        default="5GB",
        metavar="SIZE",
        help="bytes per file, as 5GB or 200MiB (5GB)",
    )
    parser.add_argument("--verify", default="tensors", choices=VERIFICATIONS, help="what to prove (tensors)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    parser.add_argument("--dry-run", action="store_true", help="check and plan only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads (one per processor, two at most)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = vars(parser.parse_args(arguments))  # by the names of the arguments of `convert`, but for these two
    as_json, quiet = options.pop("json"), options.pop("quiet")
    report = convert(**options, progress=not quiet)
    if not quiet:
        print(report.to_json() if as_json else report)
    elif not report.ok:
        return _fail(report.verdict)
    return 0 if report.ok else 1


def _inspect(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="convert-weights inspect", description="Say what a checkpoint is.")
    parser.add_argument("source", metavar="SRC", help=_SOURCE_HELP)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    report = inspect(options.source)
    print(report.to_json() if options.json else report)
    return 0 if report.ok else 1


def _verify(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="convert-weights verify", description="Are these the same model?")
    parser.add_argument("a", metavar="A", help=_SOURCE_HELP)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--forward", action="store_true", help="also run both and compare their answers")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options = parser.parse_args(arguments)
    report = verify(options.a, options.b, forward=options.forward, progress=not options.quiet)
    print(report.to_json() if options.json else report)
    return 0 if report.same else 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _fail(message: str) -> int:
    print(f"convert-weights: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
