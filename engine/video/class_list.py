"""A file that fixes the classes of a data set and their order, and so what each label means."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.errors import UserError
from engine.video.reasons import OTHER_CLASS

_NUMBERED = re.compile(r"(\d+)\s+(\S.*)")


@dataclass(frozen=True)
class ClassList:
    """The names of all classes; a label is the position."""

    file: Path
    names: tuple[str, ...]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def leaves_out(self, name: str) -> str:
        """Why a video of a class that is not listed is rejected."""
        return f"{OTHER_CLASS} {name!r} is not in {self.file.name}"


def read_class_list(file: Path) -> ClassList:
    """Read one name per line, or UCF101's "1 ApplyEyeMakeup". Blank lines do not count.

    Raises UserError for a file that cannot be read, lists nothing or lists a name twice, and for
    numbers that are not 1 to N.
    """
    lines = lines_of(read_text(file, "the class list"))
    if not lines:
        raise UserError(f"{file} lists no classes")
    numbered = [_NUMBERED.fullmatch(text) for _, text in lines]
    names = [text for _, text in lines]
    if all(numbered):
        by_number = {int(match[1]): match[2] for match in numbered if match}
        if sorted(by_number) != list(range(1, len(lines) + 1)):
            raise UserError(
                f"{file}: {len(lines)} classes are numbered, but not from 1 to {len(lines)}"
            )
        names = [by_number[number] for number in sorted(by_number)]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{file} lists the class {name!r} twice")
        seen.add(name)
    return ClassList(file, tuple(names))


def read_text(file: Path, what: str) -> str:
    """The text of a user's file. Raises UserError that calls the file `what`."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read {what} {file}: {reason}") from None


def lines_of(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, without space around them, and their numbers from 1."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    return [(number, line) for number, line in lines if line]
