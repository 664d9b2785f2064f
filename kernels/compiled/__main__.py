"""Compile every Triton kernel without a GPU, and hold what it costs in `resources.json`.

    python -m kernels.compiled                      compile all, write the table
    python -m kernels.compiled --check              compile all, compare with the table
    python -m kernels.compiled --check --arch sm_90
    python -m kernels.compiled --check --thin       what has changed, and one variant per kernel

Exit codes: 0, 1 where a kernel spills, exceeds a limit, multiplies matrices without tensor cores or
differs from the table, 2 where nothing can be compiled.
"""

import argparse
import json
import sys

from kernels.compiled.check import SHARED_LIMIT, TABLE, check, faults, measure
from kernels.compiled.variants import variants
from kernels.dispatch import interpreting


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU.")
    parser.add_argument(
        "--check", action="store_true", help="compare with the table, write nothing"
    )
    parser.add_argument(
        "--arch", choices=list(SHARED_LIMIT), action="append", help="only this one (with --check)"
    )
    parser.add_argument(
        "--thin", action="store_true", help="only what may have changed (with --check)"
    )
    options = parser.parse_args(arguments)
    if (options.arch or options.thin) and not options.check:
        parser.error("the table is of all architectures: --arch and --thin go with --check")
    try:
        import triton
    except ImportError:
        print("triton is not installed: nothing can be compiled", file=sys.stderr)
        return 2
    if interpreting():
        print("TRITON_INTERPRET=1 is set: Triton interprets and cannot compile", file=sys.stderr)
        return 2

    if options.check:
        table = json.loads(TABLE.read_text())
        found = check(table, options.arch or list(SHARED_LIMIT), thin=options.thin)
    else:
        from kernels.compiled.program_key import program_key

        found, programs, kernels = [], {}, {}
        for variant in variants():
            programs[variant.name] = program_key(variant)
            measured = {arch: measure(variant, arch) for arch in SHARED_LIMIT}
            kernels[variant.name] = measured
            for arch, resources in measured.items():
                found += faults(variant, arch, resources)
        table = {"triton": triton.__version__, "programs": programs, "kernels": kernels}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(found) or "no kernel spills or exceeds a limit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
