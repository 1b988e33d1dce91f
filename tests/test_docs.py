"""The pages in `docs` do what they say: their blocks run, in order, from the root of the repository.

Python blocks of a page share their names, as in one session; bash blocks run in a shell that stops at the first error.
What they write lands in a temporary folder that shows the repository's files. Blocks of other kinds are not run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# the tools of integrations.md have an environment of their own: tests/integrations/test_page.py
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "integrations.md")
SECONDS = 1000
_BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Kind, number of lines before it, and text of every fenced block."""
    text = page.read_text()
    return [(match["kind"], text.count("\n", 0, match.start("text")), match["text"]) for match in _BLOCK.finditer(text)]


def run_python(page: Path, lines_before: int, text: str, names: dict) -> None:
    # line numbers of a traceback are those of the page
    exec(compile("\n" * lines_before + text, str(page), "exec"), names)


def run_bash(page: Path, lines_before: int, text: str) -> None:
    """Run commands with this interpreter's programs first.

    Raises:
        AssertionError: with the place in the page and the end of what was printed.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", text],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{page}, after line {lines_before}:\n{done.stdout[-4000:]}"


def run_page(page: Path, tmp_path: Path, monkeypatch) -> None:
    """Run the blocks of a page in order, in a folder that shows the repository's files."""
    for entry in ROOT.iterdir():
        if entry.name not in ("demo-output", "build"):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for kind, lines_before, text in blocks(page):
        if kind == "python":
            run_python(page, lines_before, text, names)
        elif kind == "bash":
            run_bash(page, lines_before, text)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_block_runs(page, tmp_path, monkeypatch):
    run_page(page, tmp_path, monkeypatch)


def test_the_quickstarts_of_the_readme_answer(tmp_path, monkeypatch, capsys):
    """In any directory. Only its Python: its shell commands are those that run these tests."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md"
    quickstarts = [(lines_before, text) for kind, lines_before, text in blocks(page) if kind == "python"]
    for lines_before, text in quickstarts:
        run_python(page, lines_before, text, {"__name__": "readme"})
    assert capsys.readouterr().out.count("Assistant: An ankle boot.") == len(quickstarts) == 2


@pytest.mark.parametrize("room", ["pt", "tf"])
def test_e10_the_quickstarts_warn_of_nothing(room, tmp_path):
    """Each in a process of its own, as transformers says such things once, and with Python's own warnings shown."""
    (quickstart,) = [
        text for kind, _, text in blocks(ROOT / "README.md") if kind == "python" and f"idefics_{room}" in text
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "default", "-c", quickstart]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "absl::InitializeLog" not in line]
    assert any("Assistant: An ankle boot." in line for line in said)
    assert not [line for line in said if re.search("warn|deprecat|unexpected|must be", line, re.IGNORECASE)]


def test_blocks_are_found_and_their_failures_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\n```\n\n```bash\necho shown\nfalse\necho no\n```\n```\nnot run\n```\n")
    found = blocks(page)
    assert found == [("python", 2, "x = 1\n"), ("bash", 6, "echo shown\nfalse\necho no\n"), ("", 11, "not run\n")]
    with pytest.raises(AssertionError, match=r"page.md, after line 6:\s+shown\s+assert 1 == 0"):
        run_bash(page, *found[1][1:])
    with pytest.raises(ZeroDivisionError) as raised:
        run_python(page, 2, "1 / 0\n", {})
    assert raised.traceback[-1].lineno + 1 == 3
