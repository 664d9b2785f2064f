"""YAML files as plain dicts, and setting one key of such a tree by its dotted path.

Knows nothing of what the keys mean; engine/configuration.py does.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UserError

Tree = dict[Any, Any]


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Tree:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key_node.value!r} is given twice",
                        problem_mark=key_node.start_mark,
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, in which the 1e-4 that everybody writes is text.
_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_tree(path: str | Path) -> Tree:
    """The mapping that a YAML file holds. Raises UserError with one line that names the file."""
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from None
    # ValueError: impossible dates, bytes that are not UTF-8. RecursionError: brackets without end.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} does not hold a mapping of configuration keys")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` as (key.path, value), the value read as YAML. Raises UserError."""
    key, separator, value = text.partition("=")
    if not separator or not all(key.strip().split(".")):
        raise UserError(f"--set {text}: expected key.path=value")
    try:
        return key.strip(), _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {text}: the value is not YAML: {_problem(error)}") from None


def set_key(tree: Tree, dotted: str, value: Any) -> None:
    """Set `a.2.b` in nested dicts; whole numbers in the path are integer keys.

    Sections that are missing are made, numbered ones are not: a typing error in a number would
    add a nearly empty one. Raises UserError, without naming the tree's source.
    """
    *parents, last = [int(part) if part.isdecimal() else part for part in dotted.split(".")]
    node = tree
    for depth, part in enumerate(parents):
        child = node.get(part)
        if child is None and not isinstance(part, int):
            child = node[part] = {}
        if not isinstance(child, dict):
            missing = ".".join(str(part) for part in parents[: depth + 1])
            have = ", ".join(str(key) for key in node) or "nothing"
            raise UserError(
                f"{dotted}: {missing} is not a section"
                if part in node
                else f"{dotted}: there is no {missing}, only {have}"
            )
        node = child
    node[last] = value


def unshared(value: Any) -> Any:
    """A copy in which nothing is shared: YAML aliases make one dict of two sections."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list | tuple) else value


def _parse(text: str) -> Any:
    return unshared(yaml.load(text, Loader=_Loader))  # a SafeLoader


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split())
