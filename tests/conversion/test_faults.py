"""What goes wrong for real: killed at any moment, a full disk, two runs at once: nothing is lost, nothing is half."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import conversion.converting
import conversion.staging
from conversion import ConversionError, convert
from conversion.converting import REPORT
from conversion.opening import open_model
from conversion.staging import JOURNAL, held_bytes, open_staging, staging_directory
from conversion.streaming import Buffers, row_blocks
from idefics_common.checkpoint import CheckpointError
from tests.conversion.checkpoints import FORMATS, read_all, write_checkpoint
from tests.conversion.killed_runs import KINDS, killed_runs


def tree(directory: Path) -> dict[str, bytes]:
    """Content of all files but the report, which says how long it took."""
    names = sorted(path.name for path in directory.iterdir() if path.name != "conversion-report.json")
    return {name: (directory / name).read_bytes() for name in names}


STAGES = {
    "nothing written",
    "laying out",
    "laid out",
    "some tensors written",
    "all tensors written",
    "verified",
    "journal removed",
    "old output not yet removed",
    "done",
}


def stage(destination: Path, before: dict, expected: dict, tensors: int) -> str:
    """How far a run that was killed had come, by what lies on the disk; the output is the old one or the new one."""
    found, staging = tree(destination), staging_directory(destination)
    assert found in (expected, before), sorted(found)
    if found == expected:
        return "old output not yet removed" if staging.exists() else "done"
    if not staging.exists():
        return "nothing written"
    is_verified, journal = (staging / REPORT).exists(), staging / JOURNAL
    if not journal.exists():
        return "journal removed" if is_verified else "laying out"
    if is_verified:
        return "verified"
    written = len(journal.read_bytes().splitlines()) - 2  # plan and places come first
    return "all tensors written" if written == tensors else "some tensors written" if written > 0 else "laid out"


def test_killed_at_any_moment_and_resumed(tmp_path, checkpoint):
    """SIGKILL at calls to the system from the first to the last, and once more in the run that resumes.

    The earlier output stays whole until the new one is, and resuming gives the same bytes.
    """
    source, before = tree(checkpoint), tree(convert_to(checkpoint, tmp_path / "before", "tf-h5"))
    out, stages = tmp_path / "out", set()
    arguments = (checkpoint, out, "--to", "keras", "--overwrite", "--resume")
    with killed_runs() as runs:
        for _ in range(2):  # the first imports what the second finds
            begin_again(tmp_path)
            status, calls = runs.run(*arguments)
            assert status == 0
        expected, tensors = tree(out), len(json.loads((out / REPORT).read_text())["tensors"])
        assert calls.count("pwrite") > 1.2 * tensors  # runs die within tensors too
        for moment in moments(calls):
            begin_again(tmp_path)
            assert runs.run(*arguments, dies_before=moment)[0] == -signal.SIGKILL
            stages.add(stage(out, before, expected, tensors))
            assert runs.run(*arguments, dies_before=moment)[0] in (0, -signal.SIGKILL)
            stages.add(stage(out, before, expected, tensors))
            assert runs.run(*arguments)[0] == 0
            assert tree(out) == expected
            assert {path.name for path in tmp_path.iterdir()} == {"before", "out"}
    assert stages == STAGES
    assert tree(checkpoint) == source


def moments(calls: list[str]) -> list[int]:
    """Of each kind of call the first, the last and some between them; so the first and the last of all are there."""
    found = set()
    for kind in KINDS:
        numbers = [number for number, name in enumerate(calls) if name == kind]
        found |= {*numbers[:: 1 + len(numbers) // 4], numbers[-1]}
    return sorted(found)


def begin_again(directory: Path) -> None:
    shutil.rmtree(directory / "out", ignore_errors=True)
    shutil.copytree(directory / "before", directory / "out")


def convert_to(source: Path, directory: Path, target: str) -> Path:
    assert convert(source, directory, to=target).ok
    return directory


class StopError(Exception):
    """Raised in the middle of a conversion."""


@pytest.mark.parametrize("target", FORMATS)
def test_resuming_goes_on_from_the_last_complete_tensor(tmp_path, monkeypatch, checkpoint, target):
    """And does not write again what is there, also the second time; a line that was cut short is not believed."""
    expected = tree(convert_to(checkpoint, tmp_path / "expected", target))
    real, copied = conversion.converting._copy, []

    def stop_after_thirty(model, output, *arguments):
        if len(copied) == 30:
            raise StopError
        copied.append(output.name)
        return real(model, output, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(conversion.converting, "_copy", stop_after_thirty)
        for _ in range(2):
            with pytest.raises(StopError):
                convert(checkpoint, tmp_path / "out", to=target, workers=1, resume=True)
            assert not (tmp_path / "out").exists()
            with open(staging_directory(tmp_path / "out") / JOURNAL, "ab") as file:
                file.write(b'{"tensor": "half a li')
            copied.clear()
    report = convert(checkpoint, tmp_path / "out", to=target, workers=1, resume=True)
    assert report.resumed == 60
    assert tree(tmp_path / "out") == expected


def test_a_changed_source_is_not_resumed_from(tmp_path, monkeypatch):
    """What an earlier run has written of another source is thrown away, and so it is without --resume."""
    write_checkpoint(tmp_path / "source")
    stop_in_verification(monkeypatch, tmp_path)
    write_checkpoint_again(tmp_path / "source", seed=1)
    report = convert(tmp_path / "source", tmp_path / "out", to="safetensors", resume=True)
    assert report.resumed == 0
    assert report.ok


def test_without_resume_everything_is_written_again(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source")
    stop_in_verification(monkeypatch, tmp_path)
    assert convert(tmp_path / "source", tmp_path / "out", to="safetensors").resumed == 0


def stop_in_verification(monkeypatch, directory):
    """A conversion that ends when everything is written and nothing verified."""

    def stop(*arguments):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(conversion.converting, "_verify", stop)
        with pytest.raises(StopError):
            convert(directory / "source", directory / "out", to="safetensors")


def write_checkpoint_again(directory, **options):
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    write_checkpoint(directory, **options)


def test_a_journal_that_is_none_is_thrown_away(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source")
    stop_in_verification(monkeypatch, tmp_path)
    (staging_directory(tmp_path / "out") / JOURNAL).write_bytes(b"\xff\n{}\n")
    report = convert(tmp_path / "source", tmp_path / "out", to="safetensors", resume=True)
    assert report.ok
    assert report.resumed == 0


def test_space_that_an_earlier_run_holds_is_counted(tmp_path, monkeypatch):
    """Else a run that was stopped by a full disk could not be resumed after a little space was made."""
    write_checkpoint(tmp_path / "source")
    assert held_bytes(tmp_path / "out") == 0
    stop_in_verification(monkeypatch, tmp_path)
    size = (tmp_path / "source" / "model.safetensors").stat().st_size
    assert size <= held_bytes(tmp_path / "out") < 1.5 * size
    needed = []
    monkeypatch.setattr(conversion.converting, "check_space", lambda directory, count: needed.append(count))
    convert(tmp_path / "source", tmp_path / "out", to="safetensors", resume=True)
    assert needed[0] < 0.5 * size + 2048 * 141


def test_a_damaged_output_is_not_trusted_for_its_journal(tmp_path, monkeypatch):
    """Values that are not what the journal says are found by verification, and nothing is published."""
    write_checkpoint(tmp_path / "source")
    stop_in_verification(monkeypatch, tmp_path)
    with open(staging_directory(tmp_path / "out") / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"oops")
    report = convert(tmp_path / "source", tmp_path / "out", to="safetensors", resume=True)
    assert not report.ok
    assert report.verdict.startswith("FAILED, nothing was written: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_second_run_to_the_same_destination_is_refused(tmp_path, checkpoint):
    with (
        open_staging(tmp_path / "out"),
        pytest.raises(ConversionError, match="another process is converting to it"),
    ):
        convert(checkpoint, tmp_path / "out", to="keras")
    assert convert(checkpoint, tmp_path / "out", to="keras").ok


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_output_takes_the_place_of_another(tmp_path, monkeypatch, checkpoint, can_exchange):
    """In one step where the system has one, else in two; nothing of the old one is left."""
    if not can_exchange:
        monkeypatch.setattr(conversion.staging.ctypes, "CDLL", lambda *arguments, **options: object())
    convert_to(checkpoint, tmp_path / "out", "tf-h5")
    assert convert(checkpoint, tmp_path / "out", to="keras", overwrite=True).ok
    assert "model.weights.h5" in tree(tmp_path / "out")
    assert "tf_model.h5" not in tree(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("target", FORMATS)
def test_a_full_disk(small_disk, monkeypatch, checkpoint, target):
    """Refused before a byte is written; and where the space goes meanwhile, an error and an untouched destination."""
    (small_disk / "ballast").write_bytes(bytes(40_000))
    with pytest.raises(ConversionError, match="are free"):
        convert(checkpoint, small_disk / "out", to=target)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    monkeypatch.setattr(conversion.converting, "check_space", lambda directory, needed: None)
    with pytest.raises((OSError, ConversionError), match=r"No space left|cannot be written"):
        convert(checkpoint, small_disk / "out", to=target)
    assert not (small_disk / "out").exists()


@pytest.mark.filterwarnings("ignore:.*total_size", "ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("target", FORMATS)
def test_fuzzed_files_are_refused_or_read(tmp_path_factory, checkpoint, target):
    """Bytes changed anywhere in any file: a CheckpointError, or tensors of the right names, shapes and dtypes."""
    source = tmp_path_factory.mktemp("fuzz") / "source"
    convert(checkpoint, source, to=target, max_shard_size="150KB", verify="none")
    files = [path for path in sorted(source.iterdir()) if path.name not in ("conversion-report.json", "config.json")]
    originals = {path: path.read_bytes() for path in files}

    @settings(max_examples=60, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(files),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
        st.booleans(),
    )
    def mutate(path, changes, is_near_the_start):
        data = bytearray(originals[path])
        # headers are at the start, but for a zip's directory
        span = min(len(data), 4096) if is_near_the_start else len(data)
        for place, value in changes:
            data[int(place * span)] = value
        path.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            read_model(source)
        path.write_bytes(originals[path])

    mutate()
    read_model(source)


def read_model(directory: Path) -> None:
    """Open a checkpoint and read every tensor."""
    buffers = Buffers()
    with open_model(directory) as model:
        for parameter in model.untied:
            for rows in row_blocks(parameter.shape, 4, buffers.block_bytes):
                values = model.read_rows(parameter, rows, buffers, "values")
                assert values.shape == (len(rows), *parameter.shape[1:])
                assert values.dtype == model.info(parameter).dtype


def test_a_value_that_does_not_fit_is_named(tmp_path):
    from safetensors.numpy import save_file

    tensors = write_checkpoint(tmp_path / "source")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1e6)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"tensor model.norm.weight: float16 cannot hold"):
        convert(tmp_path / "source", tmp_path / "out", to="keras", dtype="float16")
    assert convert(tmp_path / "source", tmp_path / "out", to="keras", dtype="bfloat16").ok
    assert read_all(tmp_path / "out") == {}
