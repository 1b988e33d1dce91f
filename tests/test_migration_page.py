"""The migration page names tests that exist, one for every row, so that what it promises can be looked up."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "migrating-from-transformers-tf.md"


def test_every_row_names_tests_that_exist():
    defined = {
        (file.name, name)
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    rows = re.findall(r"^\| (T\d+) \|.*\|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [f"T{i}" for i in range(1, 16)]
    for name, proof in rows:
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", proof)
        assert named, f"{name} names no test"
        assert set(named) <= defined, f"{name} names {sorted(set(named) - defined)}"
