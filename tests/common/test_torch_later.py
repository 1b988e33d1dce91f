"""torch that is left for later is executed once, by whatever needs it first, and is then like any other module.

A small package plays torch here, each time in a fresh interpreter; the real one is in `tests/equivalence`.
"""

import subprocess
import sys

import pytest

TORCH = {
    "__init__.py": """
import os, sys, time
sys.executed.append(__name__)
import torch
assert not hasattr(torch, "Tensor") and not hasattr(torch, "undefined")
from torch import nn
import torch.nn.functional
if os.environ.get("BROKEN"):
    raise OSError("a library of torch is missing")
time.sleep(0.2)
class Tensor: pass
def __getattr__(name):
    if name == "made_up": return 5
    raise AttributeError(name)
""",
    "nn/__init__.py": "import sys; sys.executed.append(__name__)",
    "nn/functional.py": "import sys; sys.executed.append(__name__); relu = 'relu'",
    "special.py": "import sys; sys.executed.append(__name__)",
}
START = """
import importlib.machinery, importlib.util, os, sys, types
sys.executed, finders = [], list(sys.meta_path)
from idefics_common.torch_later import torch_left_for_later
"""
END = """
import torch
assert sys.executed[:3] == ["torch", "torch.nn", "torch.nn.functional"], sys.executed
assert len(set(sys.executed)) == len(sys.executed), sys.executed
assert type(torch) is types.ModuleType and sys.modules["torch"] is torch and torch.Tensor and torch.made_up == 5
assert torch.nn is sys.modules["torch.nn"] and torch.nn.functional is sys.modules["torch.nn.functional"]
for module in (torch, torch.nn, torch.nn.functional):
    assert module.__spec__.name == module.__name__ and module.__spec__ is not None, module
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader, module
    assert module.__file__ == module.__spec__.origin
assert torch.__path__ and torch.__package__ == "torch"
assert not hasattr(torch, "undefined") and sys.meta_path == finders
print("done")
"""
WAYS = {
    "an attribute": "later.Tensor",
    "an import": "import torch; torch.Tensor",
    "a name": "from torch import Tensor",
    "a submodule": "import torch.nn.functional as F; assert F.relu == 'relu'",
    "a submodule by name": "from torch.nn import functional as F; assert F.relu == 'relu'",
    "another submodule": "import torch.special",
    "the import of a string": "importlib.import_module('torch.nn')",
}


def run(folder, code: str) -> str:
    for name, text in TORCH.items():
        file = folder / "torch" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{START}\n{code}"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("way", WAYS)
def test_who_needs_torch_afterwards_has_it(tmp_path, way):
    left = """
for _ in range(2):
    with torch_left_for_later():
        import torch as later
        assert importlib.util.find_spec("torch").origin.endswith("__init__.py")
assert sys.executed == [] and "torch" not in sys.modules
assert importlib.util.find_spec("torch").origin.endswith("__init__.py")
"""
    assert run(tmp_path, f"{left}\n{WAYS[way]}\n{END}\nassert torch is later").endswith("done\n")


@pytest.mark.parametrize("way", WAYS)
def test_who_needs_torch_at_once_has_it(tmp_path, way):
    assert run(
        tmp_path,
        f"with torch_left_for_later():\n    import torch as later\n    {WAYS[way]}\n{END}\nassert torch is later",
    ).endswith("done\n")


def test_threads_that_need_it_together_execute_it_once(tmp_path):
    """Without imports of submodules, on which Python itself fails while another thread imports their package."""
    code = """
import threading
with torch_left_for_later():
    import torch as later
ways, failed = WAYS * 8, []
barrier = threading.Barrier(len(ways))
def use(way):
    barrier.wait()
    try:
        exec(way, {"later": later, "importlib": importlib})
    except BaseException as error:
        failed.append((way, error))
threads = [threading.Thread(target=use, args=[way]) for way in ways]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
""".replace("WAYS", repr(list(WAYS.values())[:3]))
    assert run(tmp_path, code + END).endswith("done\n")


def test_a_torch_that_cannot_be_imported_says_so_every_time(tmp_path):
    """And works once it can be, as after any import that failed."""
    code = """
os.environ["BROKEN"] = "1"
with torch_left_for_later():
    import torch as later
for way in ("later.Tensor", "import torch", "import torch.nn", "later.Tensor"):
    try:
        exec(way)
    except OSError as error:
        assert "a library of torch is missing" in str(error)
    else:
        raise AssertionError(way)
    assert not [name for name in vars(later) if not name.startswith("__")] and "torch" not in sys.modules
del os.environ["BROKEN"], sys.modules["torch.nn"], sys.modules["torch.nn.functional"]
sys.executed.clear()
later.Tensor
"""
    assert run(tmp_path, code + END).endswith("done\n")


@pytest.mark.parametrize(
    "before",
    [
        "import torch",
        "sys.modules['torch'] = None",
        "import idefics_common.torch_later as module; module.find_spec = lambda name: None",
    ],
    ids=["imported", "blocked", "not installed"],
)
def test_nothing_is_done_where_torch_is_imported_or_not_there(tmp_path, before):
    code = f"""
{before}
modules, finders = dict(sys.modules), list(sys.meta_path)
with torch_left_for_later():
    assert sys.modules == modules and sys.meta_path == finders
assert sys.modules == modules and sys.meta_path == finders
print("done")
"""
    assert run(tmp_path, code).endswith("done\n")
