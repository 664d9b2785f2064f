"""Tables in Markdown."""

from collections.abc import Iterator, Sequence


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(lines: Iterator[Sequence[str]]) -> str:
    """The first line is the header."""
    header = next(lines)
    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in lines)])
