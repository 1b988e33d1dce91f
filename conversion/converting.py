"""`convert`: the steps of a conversion, in order: check, plan, lay out, copy, verify, publish.

Nothing is written before source, destination and space have been checked, and nothing appears under the final name
before what was asked to be verified holds.
"""

import hashlib
import json
import os
import resource
import time
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from conversion.companions import copy_companions
from conversion.errors import ConversionError
from conversion.formats.base import Output, Place
from conversion.opening import OpenModel, open_model
from conversion.plan import DTYPES, Plan, check_space, make_plan
from conversion.reports import ConversionReport, TensorReport
from conversion.staging import Staging, check_destination, held_bytes, open_staging
from conversion.streaming import Buffers, CastError, as_bytes, cast, row_blocks, write_rows
from conversion.threads import Threads
from conversion.verification import check_stored_ties, compare_outputs
from idefics_common.checkpoint.sharding import parse_size

REPORT = "conversion-report.json"
VERIFICATIONS = ("tensors", "forward", "none")

_JOURNAL_VERSION = 2


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str,
    dtype: str = "keep",
    max_shard_size: int | str = "5GB",
    verify: str = "tensors",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Convert a checkpoint to another format, without a model and without any of its tensors in memory as a whole.

    Args:
        source: a directory, a file beside its config.json, or the id of a repository on the hub.
        destination: the directory to write; it appears when it is complete and verified.
        to: "safetensors", "keras", "tf-h5" or "bin".
        dtype: "keep", or the dtype of all tensors: "float32", "float16" or "bfloat16".
        max_shard_size: bytes of tensors per file, or a string such as "5GB".
        verify: "tensors" reads the output back and compares it with the source; "forward" also runs both models;
            "none" does neither.
        resume: go on from the last complete tensor of an interrupted run, if there was one with the same arguments.
        overwrite: replace a destination that holds a checkpoint.
        dry_run: only check and plan.
        workers: threads; by default one per processor, two at most.
        progress: show a progress bar, if standard error is a terminal, and say there what needs much memory.

    Returns:
        a report; its `ok` says whether what was asked to be verified holds. If not, nothing was written.

    Raises:
        CheckpointError: if the source is not there or damaged, its tensors are not those of its configuration, or
            torch is not installed and a ``.bin`` file is to be read or written.
        ConversionError: if the destination cannot be written, or a value does not fit in the dtype.
    """
    destination = Path(os.path.abspath(destination))
    try:
        limit = parse_size(max_shard_size)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with _timed(seconds, "check"):
            model = stack.enter_context(open_model(source))
            check_destination(destination, model.directory, overwrite)
            plan = make_plan(model, to, dtype, limit)
            check_stored_ties(model)
            plan.format.check_writable(destination)
            check_space(destination.parent, plan.disk_bytes - held_bytes(destination))
        report = _planned_report(model, plan, source, destination, verify)
        report.dry_run = dry_run
        if dry_run:
            return report
        staging = stack.enter_context(open_staging(destination))
        passes = 1 if verify == "none" else 2
        threads = stack.enter_context(Threads(destination.name, passes * plan.nbytes, progress, workers))
        with _timed(seconds, "write"):
            places = _write(model, plan, staging, report, resume, threads)
            copy_companions(model.directory, staging.directory, None if dtype == "keep" else dtype)
        report.files = tuple(dict.fromkeys(place.file for place in places.values()))
        if verify != "none":
            with _timed(seconds, "verify"):
                _verify(model, plan, staging, report, threads)
        if verify == "forward" and report.ok:
            with _timed(seconds, "forward"):
                _verify_forward(model, staging, report, DTYPES.get(dtype), progress)
        report.written = report.ok
        report.seconds = seconds
        report.peak_memory_bytes = _peak_memory()
        if not report.ok:
            staging.discard()
            return report
        (staging.directory / REPORT).write_text(report.to_json(), encoding="utf-8")
        with _timed(seconds, "publish"):
            # it was checked at the start, and may have appeared since
            check_destination(destination, model.directory, overwrite)
            staging.commit()
    return report


def _write(
    model: OpenModel, plan: Plan, staging: Staging, report: ConversionReport, resume: bool, threads: Threads
) -> dict[str, Place]:
    """Lay out the output and fill in all values that an earlier run has not; returns the places of the tensors."""
    places, done = _resume(model, plan, staging) if resume else ({}, {})
    if not places:
        staging.clear()
        try:
            places = plan.format.lay_out(staging.directory, plan.shards)
        # HDF5 and torch report a full disk, and much else, as RuntimeError
        except RuntimeError as error:
            raise ConversionError(f"{staging.directory}: cannot be written: {error}") from error
        staging.record({"plan": _fingerprint(model, plan)})
        staging.record({"places": {name: [place.file, place.offset] for name, place in places.items()}})
    report.resumed = len(done)
    with ExitStack() as stack:
        names = {place.file for place in places.values()}
        files = {name: stack.enter_context(open(staging.directory / name, "r+b")).fileno() for name in names}

        def copy(output: Output, buffers: Buffers) -> dict:
            place = places[output.name]
            return _copy(model, output, files[place.file], place.offset, buffers, threads)

        threads.advance(sum(output.nbytes for output in plan.outputs if output.name in done))
        remaining = [output for output in plan.outputs if output.name not in done]
        for output, entry in threads.map(remaining, copy):
            staging.record(entry)
            done[output.name] = entry
    for output, tensor in zip(plan.outputs, report.tensors, strict=True):
        tensor.cast_error_max, tensor.cast_error_mean = done[output.name]["cast_error"] or (None, None)
    plan.format.finish(
        staging.directory, plan.shards, places, {name: entry["checksum"] for name, entry in done.items()}
    )
    return places


def _copy(model: OpenModel, output: Output, file: int, offset: int, buffers: Buffers, threads: Threads) -> dict:
    """Copy one tensor; returns what the journal says of it."""
    parameter = model.original(output.parameter)
    source_dtype = model.info(parameter).dtype
    error = None if np.can_cast(source_dtype, output.dtype) else CastError()
    crc = 0
    itemsize = max(source_dtype.itemsize, output.dtype.itemsize)
    for rows in row_blocks(parameter.shape, itemsize, buffers.block_bytes):
        block = model.read_rows(parameter, rows, buffers, "source")
        values = cast(block, output.dtype, buffers)
        if error is not None:
            error.add(block, values, parameter.name)
        crc = zlib.crc32(as_bytes(values), crc)
        write_rows(file, offset, output, rows, values, buffers)
        threads.advance(values.nbytes)
    cast_error = None if error is None else [error.largest, error.mean]
    return {"tensor": output.name, "checksum": crc, "cast_error": cast_error}


def _resume(model: OpenModel, plan: Plan, staging: Staging) -> tuple[dict[str, Place], dict[str, dict]]:
    """The places and the complete tensors of an interrupted run; both empty if it had another plan."""
    entries = staging.entries()
    if len(entries) < 2 or entries[0] != {"plan": _fingerprint(model, plan)} or "places" not in entries[1]:
        return {}, {}
    places = {name: Place(*place) for name, place in entries[1]["places"].items()}
    return places, {entry["tensor"]: entry for entry in entries[2:]}


def _fingerprint(model: OpenModel, plan: Plan) -> str:
    """What must be the same for a run to go on where another stopped: the source's files and the layout."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in model.checkpoint.files]
    shards = [[(output.name, output.dtype.name, output.shape) for output in shard] for shard in plan.shards]
    described = json.dumps([_JOURNAL_VERSION, stats, plan.format.name, shards])
    return hashlib.sha256(described.encode()).hexdigest()


def _verify(model: OpenModel, plan: Plan, staging: Staging, report: ConversionReport, threads: Threads) -> None:
    by_name = {tensor.name: tensor for tensor in report.tensors}
    try:
        # found by its name in the directory, as a reader will find it
        written = open_model(staging.directory)
    except ValueError as error:
        report.problems.append(f"the output cannot be read back: {error}")
        return
    with written:
        if written.format.name != plan.format.name:
            report.problems.append(f"the output is found to be {written.format.name}, not {plan.format.name}")
            return
        for output, (digest, problem) in compare_outputs(model, plan, written, threads):
            by_name[output.parameter.name].sha256 = digest
            if problem:
                report.problems.append(problem)


def _verify_forward(
    model: OpenModel, staging: Staging, report: ConversionReport, dtype: np.dtype | None, announce: bool
) -> None:
    from conversion.forward import compare_answers

    with open_model(staging.directory) as written:
        report.forward = compare_answers(model, written, dtype, announce)
    if not report.forward.holds:
        report.problems.append(str(report.forward))


def _planned_report(
    model: OpenModel, plan: Plan, source: str | os.PathLike, destination: Path, verify: str
) -> ConversionReport:
    tensors = [
        TensorReport(
            name=output.parameter.name,
            shape=output.parameter.shape,
            part=output.parameter.part.value,
            source_dtype=model.info(model.original(output.parameter)).dtype.name,
            dtype=output.dtype.name,
            nbytes=output.nbytes,
        )
        for output in plan.outputs
    ]
    notes = [*model.notes, *plan.format.notes(plan.outputs)]
    if model.stored_ties and not plan.format.stores_tied:
        names = ", ".join(parameter.name for parameter in model.stored_ties)
        notes.append(f"{names}: tied by the configuration and the same as what it is tied to; not written twice")
    return ConversionReport(
        source=str(source),
        source_format=model.format.name,
        source_files=tuple(path.name for path in model.checkpoint.files),
        destination=str(destination),
        format=plan.format.name,
        files=tuple(plan.format.file_names(len(plan.shards))),
        tensors=tensors,
        verify=verify,
        ignored=model.tensors.ignored,
        notes=notes,
    )


def _peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # unlike getrusage, this does not start from what the parent process had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _timed(seconds: dict[str, float], step: str):
    """Note how many seconds what is done within takes."""
    start = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - start, 3)
