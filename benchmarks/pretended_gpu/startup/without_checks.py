"""A plugin for pytest: benchmarks do not compare values, of which a pretended GPU has none."""

import sys

CHECKS = ("check_call", "check_networks")


def pytest_collection_finish() -> None:
    """Once all benchmarks are imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("bench"):
            for check in CHECKS:
                if hasattr(module, check):
                    setattr(module, check, lambda *_, **__: None)
