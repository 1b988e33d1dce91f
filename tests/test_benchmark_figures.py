"""What `python -m benchmarks` makes of its scripts and of their results: who runs, which figure is read where.

Nothing is measured here: results are made up, all numbers different, so that a figure of another row is another figure.
"""

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import __main__ as all_benchmarks
from benchmarks import loading, report, rounds
from benchmarks.__main__ import RUNS, summary
from benchmarks.targets import TARGETS
from tests.models import SMALL


def rows(columns: str, *cells) -> list[dict]:
    names = columns.split(" | ")
    return [dict(zip(names, row, strict=True)) for row in cells]


MADE_UP = {
    "generation": rows(
        "images | backend | ms per token | first token s | share of limit",
        ("1", "transformers", 80, 0.4, 0.45),
        ("1", "pt", 40, 0.2, 0.9),
        ("1", "tf", 44, 0.21, 0.81),
        ("4", "transformers", 100, 1.0, 0.35),
        ("4", "pt", 50, 0.6, 0.7),
        ("4", "tf", 70, 0.66, 0.5),
        ("16", "transformers", 160, 4.0, 0.2),
        ("16", "pt", 60, 2.0, 0.8),
        ("16", "tf", 66, 3.0, 0.6),
    ),
    "generation-batch4": rows(
        "images | backend | first token s | ms per token",
        ("8/1/1/1", "transformers", 2.0, 200),
        ("8/1/1/1", "pt", 0.6, 50),
    ),
    "generation-batch8": rows(
        "images | backend | ms per token",
        ("1", "transformers", 70),
        ("1", "tf", 48),
        ("1/1/1/1/1/1/1/1", "transformers", 300),
        ("1/1/1/1/1/1/1/1", "tf", 96),
    ),
    "generation-int8": rows("images | backend | ms per token", ("4", "transformers", 100), ("4", "pt", 25)),
    "generation-bfloat16": rows(
        "images | backend | first token s",
        ("16", "transformers", 3.0),
        ("16", "pt", 1.2),
        ("16", "pt float32", 2.0),
    ),
    "generation-xla": rows(
        "images | backend | ms per token",
        ("1", "tf", 50),
        ("1", "tf xla", 40),
        ("16", "tf", 60),
        ("16", "tf xla", 30),
    ),
    "conversation": rows(
        "backend | turn | of cold | vision tower | resampler | image keys/values",
        ("transformers", "cold", 1.0, None, None, None),
        ("pt", "cold", 1.0, 7, 8, 9),
        ("tf", "cold", 1.0, 7, 8, 9),
        ("pt", "warm", 0.1, 0, 0, 0),
        ("tf", "warm", 0.3, 0, 0, 3),
    ),
    "beams": rows(
        "backend | image bytes, 1 beam | image bytes, 4 beams",
        ("transformers", None, None),
        ("pt", 100, 150),
        ("tf", 200, 200),
    ),
    "training": rows(
        "images | backend | s | peak GB",
        ("4/1/1/1", "transformers", 10, 5),
        ("4/1/1/1", "pt", 4, 4),
        ("4/1/1/1", "tf", 5, 9),
        ("4/4/4/4", "transformers", 20, 6),
        ("4/4/4/4", "pt", 18, 6.6),
        ("4/4/4/4", "tf", 17, 8),
    ),
    "loading": rows(
        "backend | s | peak of model",
        ("transformers", 2, 1.3),
        ("pt", 3, 0.9),
        ("tf", 5, 1.1),
    ),
    "image-processing": rows("backend | s", ("transformers", 0.8), ("ours", 0.2)),
    "masks": rows("backend | s", ("transformers", 5), ("ours", 0.5)),
}
FIGURES = [
    (0.7, "NO", {"generation"}),
    (1.5, "NO", {"generation"}),
    (0.5, "yes", {"generation"}),
    (0.375, "yes", {"generation"}),
    (0.5, "yes", {"generation"}),
    (0.3, "yes", {"generation-batch4"}),
    (0.25, "yes", {"generation-int8"}),
    (0.6, "NO", {"generation-bfloat16"}),
    (1.4, "NO", {"generation"}),
    (1.5, "NO", {"generation"}),
    (0.8, "yes", {"generation-xla"}),
    (4.0, "yes", {"generation-batch8"}),
    (3, "NO", {"conversation"}),
    (0.1, "yes", {"conversation"}),
    (0.3, "NO", {"conversation"}),
    (1.5, "NO", {"beams"}),
    (1.0, "yes", {"beams"}),
    (0.4, "yes", {"training"}),
    (0.9, "yes", {"training"}),
    (1.1, "NO", {"training"}),
    (1.5, "NO", {"loading"}),
    (2.5, "yes", {"loading"}),
    (0.9, "yes", {"loading"}),
    (1.1, "yes", {"loading"}),
    (0.25, "yes", {"image-processing"}),
    (0.1, "NO", {"masks"}),
]
"""Of each target in its order: the figure, whether it is reached, and the results that it needs."""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The directory of results, with those made up."""
    for module in (report, all_benchmarks):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    for name, content in MADE_UP.items():
        write(tmp_path, name, content)
    return tmp_path


def write(directory: Path, name: str, content: list[dict]):
    (directory / f"{name}.json").write_text(json.dumps({"rows": content}))


def test_figures_are_read_off_their_rows(results):
    assert [row[0] for row in summary()] == [target.what for target in TARGETS]
    assert [row[3] for row in summary()] == [reached for _, reached, _ in FIGURES]
    assert [row[2] for row in summary()] == pytest.approx([figure for figure, _, _ in FIGURES])


@pytest.mark.parametrize("name", RUNS)
def test_without_a_result_its_figures_are_not_measured(name, results):
    (results / f"{name}.json").unlink()
    missing = [(row[2], row[3]) == (None, "not measured") for row in summary()]
    assert missing == [name in needed for _, _, needed in FIGURES]
    assert any(missing)


@pytest.fixture
def run_all(results, monkeypatch):
    """A function that runs `python -m benchmarks` and returns its commands; some fail, the others double every `s`."""

    def run_all(*arguments, failing=()):
        commands = []

        def run_script(command):
            assert command[:2] == [sys.executable, "-m"]
            commands.append(command[2:])
            name = next(name for name, own in RUNS.items() if own == command[2 : -len(SHARED)])
            if name not in failing:
                write(results, name, [{**row, "s": 2 * row.get("s", 0)} for row in MADE_UP[name]])
            return subprocess.CompletedProcess(command, returncode=int(name in failing))

        monkeypatch.setattr(subprocess, "run", run_script)
        monkeypatch.setattr(sys, "argv", ["benchmarks", *SHARED, *arguments])
        error = None
        try:
            all_benchmarks.main()
        except SystemExit as stopped:
            error = str(stopped)
        return commands, error

    return run_all


SHARED = ["--threads", "3", "--repeats", "7", "--config", "a.json", "--device", "cpu"]
PAGE = f"before {all_benchmarks.BEGIN} {all_benchmarks.END} after"


def test_all_run_each_in_a_process_of_its_own(run_all, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    commands, error = run_all("--write", str(page))
    assert error is None
    assert commands == [[*own, *SHARED] for own in RUNS.values()]
    assert page.read_text() == all_benchmarks.with_summary(PAGE)
    assert [line.split(" | ")[2:] for line in page.read_text().splitlines()[3:-1]] == [
        [f"{figure:.2g}", f"{reached} |"] for figure, reached, _ in FIGURES
    ]
    commands, error = run_all("--only", "masks", "beams")
    assert error is None
    assert commands == [[*RUNS[name], *SHARED] for name in ("masks", "beams")]


def test_one_that_fails_loses_nothing_of_the_others(run_all, results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    commands, error = run_all("--write", str(page), failing=("generation", "loading"))
    assert error == "failed: generation, loading"
    assert len(commands) == len(RUNS)
    table = capsys.readouterr().out.splitlines()[-len(FIGURES) :]
    assert [line.endswith("not measured") for line in table] == [
        bool(needed & {"generation", "loading"}) for _, _, needed in FIGURES
    ]
    kept = json.loads((results / "masks.json").read_text())["rows"]
    assert [row["s"] for row in kept] == [10, 1.0]
    assert page.read_text() == PAGE


def test_a_page_without_marks_is_refused_before_anything_runs(run_all, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="the page has no place for the table"):
        run_all("--write", str(page))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_a_script_with_its_options_and_its_file(name, tmp_path, monkeypatch):
    """Everything up to the first worker, so that a mistyped option is not noticed after half an hour."""

    class StartedError(Exception):
        """In the place of a worker."""

    def worker(*args, **kwargs):
        raise StartedError

    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(SMALL))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for module in (rounds, loading):
        monkeypatch.setattr(module, "Worker", worker)
    module, *own = RUNS[name]
    monkeypatch.setattr(sys, "argv", [module, *own, "--config", str(config)])
    with pytest.raises(StartedError):
        importlib.import_module(module).main()
    label = own[own.index("--label") + 1 :] if "--label" in own else []
    assert name == "-".join([module.removeprefix("benchmarks.").replace("_", "-"), *label])


def test_a_result_is_written_as_a_whole_or_not_at_all(results, monkeypatch, capsys):
    before = (results / "masks.json").read_bytes()
    write_text = Path.write_text

    def cut_off(path, text, **kwargs):
        write_text(path, text[: len(text) // 2], **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        report.keep("masks", {}, [{"backend": "ours"}])
    assert (results / "masks.json").read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setattr(report, "RESULTS", results)
    report.keep("masks", {"label": "", "config": Path("a/b.json")}, [{"backend": "ours"}])
    report.keep("masks", {"label": "again"}, [{"backend": "ours"}])
    kept = json.loads((results / "masks.json").read_text())
    assert kept["rows"] == [{"backend": "ours"}]
    assert kept["options"]["config"] == "b.json"
    assert json.loads((results / "masks-again.json").read_text())["benchmark"] == "masks-again"
