"""Messages about a wrong configuration: one line in its own terms rather than pydantic's."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails


def explain(error: ErrorDetails, allowed_keys: Sequence[str]) -> str:
    """One of pydantic's findings in one line, in a configuration file's terms.

    `allowed_keys` are those of the section in which the finding lies.
    """
    location, kind = error["loc"], error["type"]
    where = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(location[-1]), allowed_keys, n=1)
        return f"unknown key {where}" + (f"; did you mean {close[0]}?" if close else "")
    if kind == "missing":
        if isinstance(location[-1], int):  # an item of a list of fixed length
            return f"{'.'.join(map(str, location[:-1]))} has too few items {found(error['input'])}"
        return f"missing key {where}"
    if location[-1:] == ("[key]",):
        return f"stages must be numbered 1, 2, ... {found(location[-2])}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind in ("model_type", "dict_type"):
        message = "must be a mapping of keys"
    elif kind == "tuple_type":
        message = "should be a list"
    elif kind in ("too_short", "too_long"):
        message = message.removeprefix("Tuple ").partition(" after validation")[0]
    if kind == "value_error":  # our own: they say what they found
        return f"{where}: {message}" if where else message
    return f"{where} {message} {found(error['input'])}"


def found(value: Any) -> str:
    """The value that stood in the file, in brackets; sections and lists are not repeated."""
    if isinstance(value, dict):
        return "(found a mapping)"
    if isinstance(value, list | tuple):
        return f"(found a list of {len(value)})"
    return f"(found {'nothing' if value is None else repr(value)})"


def origin(location: tuple[int | str, ...], overrides: Mapping[str, str]) -> str:
    """Names the override that set the key at `location`, a section above it or a key below it."""
    where = ".".join(str(part) for part in location) + "."
    for key, text in overrides.items():
        # Defaults at the top of the file are found again inside each stage.
        for path in (f"{key}.", *(f"stages.{number}.{key}." for number in location[1:2])):
            if where.startswith(path) or (path.startswith(where) and location):
                return f", from --set {text}"
    return ""
