"""The whole command on mutated files of every format: a clear error, or a correct result.

Never a traceback, a hang, memory without bound, or an output that is not what it was made from. Bytes of files are
changed, and fields of JSON indexes; the command runs on what comes of it, and its output is compared with the source
by another route.
"""

import contextlib
import copy
import importlib.util
import io
import json
import resource
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion import convert, verify
from conversion.cli import main
from tests.conversion.checkpoints import FORMATS, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*total_size", "ignore:Detected pickle protocol:UserWarning")

TARGETS = [name for name in FORMATS if name != "bin" or importlib.util.find_spec("torch")]
EXAMPLES = 40
MEMORY = 400_000
"""Kilobytes by which the largest resident set may grow in all examples of a format."""

BYTES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([b"\0", b"\xff", b"\x80", b"\xff" * 4, b"\0" * 8])),
    min_size=1,
    max_size=4,
)
ODD = st.sampled_from([None, True, -1, 2**63, 1e400, "", "../x", "a\0b", "\ud800", [], {}, [[]], {"a": {}}])


@pytest.fixture(scope="module", params=FORMATS)
def shards(request, tmp_path_factory):
    """A small checkpoint in shards, of which no example may keep a change, with its target format."""
    if request.param == "bin":
        pytest.importorskip("torch", reason="torch is not installed")
    directory = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(directory / "safetensors", "fewest_norms", dtype="bfloat16")
    convert(directory / "safetensors", directory / "source", to=request.param, max_shard_size="100KB")
    (directory / "source" / "conversion-report.json").unlink()
    return directory / "source"


def run(*arguments) -> tuple[int, str]:
    """Exit code of the command and what it printed on standard error; any exception of its own passes through."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    return code, errors.getvalue()


def check(source, target: str) -> None:
    """Inspect and convert a mutated source: both agree on whether it can be used, and an output is the same model."""
    out = source.parent / "out"
    inspected, _ = run("inspect", source)
    code, errors = run(source, out, "--to", target, "--quiet", "--workers", "1")
    assert code == inspected
    assert out.exists() == (code == 0)
    assert {path.name for path in source.parent.iterdir()} <= {"safetensors", "source", "out"}
    if code:
        assert errors.startswith(f"convert-weights: {source}"), errors
        assert "\n" in errors
        assert len(errors) < 20_000
    else:
        assert verify(source, out).same
        shutil.rmtree(out)


def mutations(shards, mutate):
    """Run `mutate(path, original, data)` over examples; each file is put back after it, and all is whole at the end."""
    originals = {path: path.read_bytes() for path in sorted(shards.iterdir())}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def example(data):
        path, content = mutate(originals, data)
        path.write_bytes(content)
        try:
            check(shards, data.draw(st.sampled_from(TARGETS), "target"))
        finally:
            path.write_bytes(originals[path])

    example()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    check(shards, "safetensors")


def test_changed_bytes(shards):
    """Of headers, which lie at either end, more often than of values; and files cut, or with something behind them."""

    def mutate(originals, data):
        path = data.draw(st.sampled_from(sorted(originals)), "file")
        content = bytearray(originals[path])
        span = min(len(content), data.draw(st.sampled_from([64, 2048, len(content)]), "span"))
        start = data.draw(st.sampled_from([0, len(content) - span]), "start")
        for place, patch in data.draw(BYTES, "patches"):
            at = start + int(place * span)
            content[at : at + len(patch)] = patch
        content = content[: data.draw(st.sampled_from([len(content)] * 3 + [span]), "length")]
        return path, bytes(content) + data.draw(st.sampled_from([b""] * 3 + [b"\0", b"}"]), "more")

    mutations(shards, mutate)


def test_changed_json(shards):
    """Fields of the index and of config.json removed, renamed, or of another type; valid JSON mostly."""

    def mutate(originals, data):
        path = data.draw(st.sampled_from([path for path in sorted(originals) if path.suffix == ".json"]), "file")
        values = copy.deepcopy(json.loads(originals[path]))
        holder = values
        for _ in range(data.draw(st.integers(0, 2), "depth")):
            inner = [value for value in holder.values() if isinstance(value, dict) and value]
            holder = data.draw(st.sampled_from(inner), "holder") if inner else holder
        key = data.draw(st.sampled_from(sorted(holder)), "key")
        match data.draw(st.sampled_from(["remove", "rename", "replace", "exchange"]), "change"):
            case "remove":
                del holder[key]
            case "rename":
                holder[f"{key}x"] = holder.pop(key)
            case "replace":
                holder[key] = data.draw(ODD, "value")
            case "exchange":
                other = data.draw(st.sampled_from(sorted(holder)), "other")
                holder[key], holder[other] = holder[other], holder[key]
        return path, json.dumps(values).encode()

    mutations(shards, mutate)
