"""Names that a reader meets say one thing."""

import ast
import sys
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "engine", "kernels", "benchmarks"


def test_no_two_public_classes_of_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_module_of_the_engine_is_named_like_a_library() -> None:
    """Scripts put their own folder on the path, where such a module would hide the library."""
    names = {path.stem for path in (ROOT / "engine").rglob("*.py")} - {"__init__", "__main__"}
    libraries = {*sys.stdlib_module_names, *packages_distributions()} - set(PACKAGES)
    assert "json" in libraries
    assert "torch" in libraries
    assert names & libraries == set()
