"""Changes to any file's bytes and to any tree of settings, each made from its seed alone."""

import copy
import random
from collections.abc import Iterator
from typing import Any

# What a value becomes: others' types, edges of number types, text that files and shells dislike.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(float("inf"), float("nan"), "", "1", "auto", "\0", "\n", "é", "x" * 300, "../../.."),
    *([], [0], [1, 2], [[1]], {}, {"a": 1}, {1: 1}),
)


def odd_value(choose: random.Random) -> Any:
    """A value that is likely not meant where a setting has another."""
    return copy.deepcopy(choose.choice(_VALUES))


def changed_bytes(content: bytes, choose: random.Random) -> bytes:
    """One to three changes, of the first kilobyte more often than of the rest."""
    new = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 3))):
        most = len(new) if choose.random() < 0.5 else min(len(new), 1024)
        place, length = choose.randrange(most + 1), choose.choice((1, 1, 2, 4, 8, 64))
        piece = new[place : place + length]
        how = choose.choice(("flip", "overwrite", "edge", "insert", "remove", "double", "cut"))
        if how == "flip" and piece:
            new[place] ^= 1 << choose.randrange(8)
        elif how == "overwrite":
            new[place : place + length] = choose.randbytes(len(piece))
        elif how == "edge":
            new[place : place + length] = choose.choice((b"\0", b"\x7f", b"\xff")) * len(piece)
        elif how == "insert":
            new[place:place] = choose.choice((choose.randbytes(length), b"[" * 1100, b"9" * length))
        elif how == "remove":
            del new[place : place + length]
        elif how == "double":
            new[place:place] = new[place : place + 16 * length]
        elif how == "cut":
            del new[choose.randrange(len(new) + 1) :]
    return bytes(new)


def changed_tree(tree: Any, choose: random.Random) -> Any:
    """One to three values of nested dicts and lists replaced, removed, added, swapped or nested."""
    new = copy.deepcopy(tree)
    for _ in range(choose.choice((1, 1, 2, 3))):
        places = list(_places(new))
        if not places:
            return odd_value(choose)
        parent, key = choose.choice(places)
        how = choose.choice(("replace", "replace", "replace", "remove", "add", "swap", "nest"))
        if how == "replace":
            parent[key] = odd_value(choose)
        elif how == "remove":
            del parent[key]
        elif how == "add" and isinstance(parent, dict):
            parent[choose.choice(("more", "", 1, -1, f"{key}x"))] = copy.deepcopy(parent[key])
        elif how == "swap":
            other, place = choose.choice(places)
            parent[key], other[place] = copy.deepcopy((other[place], parent[key]))
        elif how == "nest":
            parent[key] = choose.choice(([parent[key]], {key: parent[key]}, [[[parent[key]]] * 9]))
    return new


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every value in the tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)
