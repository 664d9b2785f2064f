"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(lines: Iterable[Sequence[str]]) -> str:
    """The first line is the header."""
    header, *rows = lines
    texts = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([texts[0], "|" + "---|" * len(header), *texts[1:]])
