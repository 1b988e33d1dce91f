"""Tables on pages: text between two marks, which a command replaces."""


def between_marks(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` in the place of what lies between the two marks.

    Raises:
        ValueError: if the page has not both.
    """
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page has no place for the table: expected {begin} and {end}.")
    return f"{before}{begin}\n{text}\n{end}{after}"


def markdown(columns: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
