"""The table of names and layouts in `docs/converting.md`, made from the parameter table.

python -m docs.names_table --write docs/converting.md
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from conversion.formats import format_of
from idefics_common.parameters import TABLE, Row
from idefics_common.parameters.layouts import Layout

BEGIN = "<!-- table of names: python -m docs.names_table --write docs/converting.md -->"
END = "<!-- end of table of names -->"

_HEADING = (
    "| safetensors and bin | shape | `model.weights.h5` | axes | `tf_model.h5` | axes |",
    "|---|---|---|---|---|---|",
)


def names_table() -> str:
    """Markdown: every row of the parameter table with its names and its orders of axes."""
    return "\n".join([*_HEADING, *(line for section in TABLE for line in map(_line, section.rows))])


def put_between_marks(page: str) -> str:
    """A page with the table between its marks brought up to date."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{names_table()}\n{END}{after}"


def _line(row: Row) -> str:
    described = SimpleNamespace(name=row.template, kind=row.kind)
    cells = (
        f"`{row.template}`",
        ", ".join(map(str, row.shape)),
        f"`{row.h5.format(nth='{nth}')}`",
        _axes(format_of("keras").layout(described)),
        f"`{row.legacy}`",
        _axes(format_of("tf-h5").layout(described)),
    )
    return f"| {' | '.join(cells)} |"


def _axes(layout: Layout) -> str:
    return "same" if layout.axes is None else ", ".join(map(str, layout.axes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the marks; by default, print the table")
    page = parser.parse_args().write
    if page is None:
        print(names_table())
    else:
        page.write_text(put_between_marks(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
