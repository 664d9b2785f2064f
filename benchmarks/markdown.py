"""Tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any


class _Cells(Formatter):
    """Templates of cells, whose fields may be unknown."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(str(key))

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise AttributeError("unknown", obj=None)
        return str(super().format_field(value, format_spec))


def table(lines: Iterable[Sequence[str]]) -> str:
    """The first line is the header."""
    header, *rows = lines
    texts = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([texts[0], "|" + "---|" * len(header), *texts[1:]])


def declared(columns: Mapping[str, str], items: Iterable[Mapping[str, Any]]) -> str:
    """A table with a line per item; a column is its title and a template, as of `str.format`.

    A cell is empty where a field of its template is None, or is of what the item does not have.
    """
    cells = [[cell(template, item) for template in columns.values()] for item in items]
    return table([list(columns), *cells])


def cell(template: str, item: Mapping[str, Any]) -> str:
    """One cell of `declared`."""
    try:
        return _Cells().vformat(template, (), item)
    except AttributeError as error:
        if error.obj is not None:  # a mistake in the template
            raise
        return ""
