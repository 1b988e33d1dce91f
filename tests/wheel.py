"""`make test-wheel`: build the wheel, install it as a user does, and run the README's quickstarts.

Each framework has a fresh environment, with the newest versions that setup.cfg admits. Everything lies in a temporary
folder outside the repository, and is removed at the end.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ANSWER = "Assistant: An ankle boot."
NOT_OF_THE_WHEEL = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "benchmarks", "tests")
# no path to the repository, no hub, and no advice to install PyTorch beside Keras
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    """Run a command outside the repository; print what it wrote and stop if it fails."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, **kwargs)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done


def quickstart(package: str) -> str:
    """The Python block of the README that imports `package`."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if f"from {package} import" in block)
    return block


def build(folder: Path) -> Path:
    """Build the wheel from a copy: what a build leaves behind would get into the next one."""
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_OF_THE_WHEEL)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(folder: Path, wheel: Path, extra: str, *named_first: str) -> None:
    """Install the wheel with an extra, and run the quickstart of its room in `folder`.

    Raises:
        SystemExit: if a step fails, the answer is wrong, or anything warns.
    """
    start = time.monotonic()
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        *named_first,
        f"idefics[{extra}] @ {wheel.as_uri()}",
        cwd=folder,
    )
    script = folder / "quickstart.py"
    script.write_text(quickstart(f"idefics_{extra.partition('-')[0]}"))
    done = run(python, "-I", script, cwd=folder)
    if ANSWER not in done.stdout or re.search(r"\[transformers\]|Warning:", done.stderr):
        sys.exit(f"[{extra}]: {ANSWER!r} and no warning expected, got:\n{done.stdout}{done.stderr}")
    version = run(python, "-I", "-c", "import transformers; print(transformers.__version__)", cwd=folder).stdout.strip()
    print(f"idefics[{extra}] with transformers {version}: {ANSWER} {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Check both frameworks."""
    # pip takes a CPU build of torch where one is at hand if the version is named, else the CUDA build
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        check(Path(folder) / "pt", wheel, "pt", torch)
        check(Path(folder) / "tf", wheel, "tf-cpu")


if __name__ == "__main__":
    main()
