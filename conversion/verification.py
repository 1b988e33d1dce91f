"""Compares two checkpoints, in any formats: tensors bit by bit, in blocks, and configurations.

What was written is read back by readers that share no code with what wrote it: HDF5 by its library, where values were
written at offsets; safetensors and ``.bin`` by strict readers of the whole file.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from conversion.formats.base import Output
from conversion.opening import OpenModel, open_model
from conversion.plan import Plan
from conversion.reports import VerificationReport
from conversion.streaming import Buffers, as_bytes, cast, row_blocks, same_bits
from conversion.threads import Threads
from idefics_common.checkpoint import CheckpointError
from idefics_common.configuration.fields import IdeficsFields
from idefics_common.parameters import Parameter

# fields that say how a model starts, trains or is stored, not what it computes
_NOT_OF_THE_FUNCTION = {
    "alpha_initializer",
    "alphas_initializer_range",
    "attention_dropout",
    "dropout",
    "freeze_lm_head",
    "freeze_text_layers",
    "freeze_text_module_exceptions",
    "freeze_vision_layers",
    "freeze_vision_module_exceptions",
    "initializer_factor",
    "initializer_range",
    "use_cache",
}


def verify(
    a: str | os.PathLike,
    b: str | os.PathLike,
    *,
    forward: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> VerificationReport:
    """Compare two checkpoints of any formats, bit by bit.

    Args:
        a, b: see `conversion.convert`. forward: also run both and compare logits and greedy tokens.
        workers, progress: see `conversion.convert`.

    Raises CheckpointError or ConversionError where either cannot be opened.
    """
    with open_model(a) as first, open_model(b) as second:
        check_stored_ties(first)
        check_stored_ties(second)
        differences = _config_differences(first.config, second.config)
        mine, theirs = ({p.name: p for p in model.untied} for model in (first, second))
        for name in sorted(mine.keys() ^ theirs.keys()):
            differences.append(f"{name} is only in {a if name in mine else b}")
        both = [p for name, p in mine.items() if name in theirs and theirs[name].shape == p.shape]
        with Threads("compare", sum(first.info(p).nbytes for p in both), progress, workers) as threads:

            def compare(parameter: Parameter, buffers: Buffers) -> str | None:
                return _compare(first, second, parameter, buffers, threads)

            found = dict(threads.map(both, compare))
        differences += [found[parameter] for parameter in both if found[parameter]]
        report = VerificationReport(str(a), str(b), len(both), differences)
        if forward and len(both) == len(mine) == len(theirs):
            from conversion.forward import compare_answers

            report.forward = compare_answers(first, second, announce=progress)
    return report


def compare_outputs(
    model: OpenModel, plan: Plan, written: OpenModel, threads: Threads
) -> Iterator[tuple[Output, tuple[str, str | None]]]:
    """Compare what was written with the source, read again.

    Yields:
        each output with the SHA-256 of its values, and what is wrong with it or None.
    """

    def compare(output: Output, buffers: Buffers) -> tuple[str, str | None]:
        parameter = model.original(output.parameter)
        itemsize = max(model.info(parameter).dtype.itemsize, output.dtype.itemsize)
        if written.info(output.parameter).dtype != output.dtype:
            return "", f"{parameter.name}: {written.info(output.parameter).dtype} was written, not {output.dtype}"
        digest, problem = hashlib.sha256(), None
        for rows in row_blocks(parameter.shape, itemsize, buffers.block_bytes):
            expected = cast(model.read_rows(parameter, rows, buffers, "source"), output.dtype, buffers)
            found = written.read_rows(output.parameter, rows, buffers, "written")
            digest.update(as_bytes(found))
            if problem is None and not same_bits(expected, found):
                problem = f"{output.parameter.name}: rows {rows.start} to {rows.stop} were not written as they are"
            threads.advance(found.nbytes)
        return digest.hexdigest(), problem

    yield from threads.map(plan.outputs, compare)


def check_stored_ties(model: OpenModel) -> None:
    """Raise CheckpointError if a tensor that the configuration ties to another is stored with other values.

    Loaders disagree on which of the two to believe.
    """
    buffers = Buffers()
    for tied in model.stored_ties:
        original = model.original(tied)
        if model.info(tied).dtype == model.info(original).dtype:
            itemsize = model.info(tied).dtype.itemsize
            if all(
                same_bits(model.read_rows(tied, rows, buffers, "a"), model.read_rows(original, rows, buffers, "b"))
                for rows in row_blocks(tied.shape, itemsize, buffers.block_bytes)
            ):
                continue
        raise CheckpointError(
            model.path,
            f"differs from {original.name}, to which tie_word_embeddings in config.json ties it; if it is a matrix of "
            "its own, set tie_word_embeddings to false",
            tied.name,
        )


def _compare(a: OpenModel, b: OpenModel, parameter: Parameter, buffers: Buffers, threads: Threads) -> str | None:
    """What differs in one tensor, or None."""
    dtypes = a.info(parameter).dtype, b.info(parameter).dtype
    largest, is_same = 0.0, dtypes[0] == dtypes[1]
    for rows in row_blocks(parameter.shape, max(dtype.itemsize for dtype in dtypes), buffers.block_bytes):
        mine = a.read_rows(parameter, rows, buffers, "a")
        theirs = b.read_rows(parameter, rows, buffers, "b")
        threads.advance(mine.nbytes)
        if dtypes[0] != dtypes[1] or not same_bits(mine, theirs):
            is_same = False
            largest = max(largest, _largest_difference(mine, theirs))
    if is_same:
        return None
    stored = "" if dtypes[0] == dtypes[1] else f" {dtypes[0]} and {dtypes[1]};"
    return f"{parameter.name}:{stored} largest difference {largest:.3g}"


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Of finite values; in parts, because it is computed in float64."""
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        difference = np.abs(np.subtract(x, y, dtype=np.float64))
        largest = max(largest, float(np.max(difference, initial=0.0, where=np.isfinite(difference))))
    return largest


def _config_differences(a: IdeficsFields, b: IdeficsFields) -> list[str]:
    mine, theirs = _flat(asdict(a)), _flat(asdict(b))
    return [
        f"config.json: {name} is {mine.get(name)!r} and {theirs.get(name)!r}"
        for name in mine.keys() | theirs.keys()
        if mine.get(name) != theirs.get(name) and name.rpartition(".")[2] not in _NOT_OF_THE_FUNCTION
    ]


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested fields as one mapping, named as in "vision_config.image_size"."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
