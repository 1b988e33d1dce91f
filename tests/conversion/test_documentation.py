"""`docs/converting.md` is up to date, and quotes the program as it is."""

import re
from pathlib import Path

import pytest

from conversion.cli import main
from docs.names_table import put_between_marks
from idefics_common.parameters import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "converting.md"


def test_the_table_of_names_is_made_from_the_parameter_table():
    page = PAGE.read_text(encoding="utf-8")
    assert put_between_marks(page) == page
    assert page.count("\n| `model.") + page.count("\n| `lm_head.") == sum(len(section.rows) for section in TABLE)


def test_the_usage_has_every_option(capsys):
    """And no other: of the command itself, and of both others."""
    usage = PAGE.read_text(encoding="utf-8").split("```")[1]
    documented = [re.findall(r"--[a-z-]+", part) for part in usage.split("convert-weights")[1:]]
    for arguments, options in zip(([], ["inspect"], ["verify"]), documented, strict=True):
        with pytest.raises(SystemExit, match="0"):
            main([*arguments, "--help"])
        described = re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
        assert sorted(described) == sorted([*options, "--help"])
