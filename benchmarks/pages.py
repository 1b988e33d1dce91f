"""Tables on pages: text between two marks, which a benchmark replaces."""


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


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
