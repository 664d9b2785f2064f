"""Compile every Triton kernel without a GPU, and hold what it costs: `kernels/resources.json`.

    python -m kernels.resources                      compile all, write the table
    python -m kernels.resources --check              compile all, compare with the table
    python -m kernels.resources --check --arch sm_90
    python -m kernels.resources --check --thin       each for one architecture, not for all

A kernel's module lists, in `variants()`, each kernel at each configuration it is launched with.
Triton compiles for a GPU that is not there; registers and stack are read from the binary
(cuobjdump), spills from the assembler (ptxas -v), shared memory from Triton. Exit codes: 0, 1 where
a kernel spills, exceeds a limit, multiplies matrices without tensor cores or differs from the
table, 2 where nothing can be compiled. Numbers are compared only under the version of Triton that
made the table; the limits hold under any.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from kernels.implementation import interpreting

TABLE = Path(__file__).with_name("resources.json")
MODULES = (
    "kernels.conv_gru_triton",
    "kernels.convolution_triton",
    "kernels.frame_norm_triton",
    "kernels.power_iteration_triton",
    "kernels.spectral_norm_list_triton",
    "kernels.spectral_norm_triton",
)

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
"""Bytes of shared memory that one block may have."""

CHANNEL_TILES = (
    *(("bf16", num_channels, True) for num_channels in (128, 64, 32)),
    *(("fp32", num_channels, True) for num_channels in (128, 64, 32, 16)),
    ("fp32", 32, False),
    ("fp32", 8, False),
)
"""What the widths of configs/*.yaml are cut into, for the `variants()` of kernels that have tiles
of channels: dtype, a tile's channels, and whether the width is a multiple of 16. The configurations
stand above kernels, so this list is held by a test; wider fp32 and narrower bf16 come on top."""

Resources = dict[str, int]
"""registers per thread, spilled and stack bytes per thread, shared bytes per block, and the
matrix_instructions (tensor cores) in the program."""


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: the types of its arguments, its constants, its options."""

    kernel: Any
    label: str
    """What tells it from the kernel's other variants."""
    types: dict[str, str]
    """Triton's type of each argument that is no constant: "*bf16", "i32", "fp32"."""
    constants: Mapping[str, int | bool | None]
    options: dict[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()
    """Integers that are multiples of 16 in this variant, as all pointers are."""
    multiplies_matrices: bool = False

    @property
    def name(self) -> str:
        """Its key in the table."""
        module = self.kernel.__module__.removeprefix("kernels.").removesuffix("_triton")
        return f"{module}.{self.kernel.__name__} {self.label}"

    def compile(self, arch: str) -> Any:
        """Triton's compiled kernel for "sm_80", "sm_90" or "sm_100"."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        unknown = (self.types.keys() | self.constants.keys()) ^ set(names)
        if unknown:
            raise ValueError(f"{self.name}: arguments do not match the kernel's: {sorted(unknown)}")
        aligned = [
            i
            for i, name in enumerate(names)
            if self.types.get(name, "").startswith("*") or name in self.divisible
        ]
        source = ASTSource(
            fn=self.kernel,
            signature={name: self.types.get(name, "constexpr") for name in names},
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        return triton.compile(source, target=target, options=self.options)


def variants() -> Iterator[Variant]:
    """Those of all modules."""
    for module in MODULES:
        yield from import_module(module).variants()


def measure(variant: Variant, arch: str) -> Resources:
    """Compile, and read what the program needs."""
    from triton import knobs

    compiled = variant.compile(arch)
    ptx = compiled.asm["ptx"]
    # Of two assemblers that Triton ships, it uses the newer for Hopper and later.
    assembler = knobs.nvidia.ptxas if arch == "sm_80" else knobs.nvidia.ptxas_blackwell
    with tempfile.TemporaryDirectory() as folder:
        binary, program = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(compiled.asm["cubin"])
        program.write_text(ptx)
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary)
        [named] = re.findall(r"\.target (\w+)", ptx)  # with its suffix: sm_90a
        log = _output(
            assembler.path, "-v", f"--gpu-name={named}", program, "-o", Path(folder, "out")
        )
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": _number(r"STACK:(\d+)", usage),
        "spilled_bytes": _number(r"(\d+) bytes spill stores", log)
        + _number(r"(\d+) bytes spill loads", log),
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": len(
            re.findall(r"^\s*(?:@\S+ )?(?:mma|wgmma\.mma_async|tcgen05\.mma)\b", ptx, re.MULTILINE)
        ),
    }


def faults(variant: Variant, arch: str, resources: Resources) -> list[str]:
    """What must not be, in words; the same under every version of Triton."""
    found = []
    if resources["spilled_bytes"] or resources["stack_bytes"]:
        found.append(f"spills {resources['spilled_bytes']} bytes")
    if resources["shared_bytes"] > SHARED_LIMIT[arch]:
        found.append(f"{resources['shared_bytes']} bytes of shared memory exceed the limit")
    if variant.multiplies_matrices and not resources["matrix_instructions"]:
        found.append("multiplies matrices without tensor cores")
    return [f"{variant.name} on {arch}: {fault}" for fault in found]


def check(table: dict[str, Any], archs: list[str], *, thin: bool = False) -> list[str]:
    """Compile everything for `archs`; every fault, and every difference from the table.

    `thin` compiles what multiplies no matrices, nine in ten of all, for one architecture each, in
    turn: what changes such a kernel for one mostly does for all.
    """
    import triton

    found, listed = [], {variant.name: variant for variant in variants()}
    for name in sorted(listed.keys() ^ table["kernels"].keys()):
        place = "the table" if name in listed else "the code"
        found.append(f"{name} is not in {place}: run python -m kernels.resources")
    for index, (name, variant) in enumerate(listed.items()):
        own = [*SHARED_LIMIT][index % len(SHARED_LIMIT)]
        everywhere = variant.multiplies_matrices or not thin
        for arch in archs if everywhere else {own}.intersection(archs):
            now = measure(variant, arch)
            found += faults(variant, arch, now)
            held = table["kernels"].get(name, {}).get(arch)
            if triton.__version__ == table["triton"] and held not in (None, now):
                found.append(f"{name} on {arch}: the table says {held}, not {now}")
    return found


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
        "--thin", action="store_true", help="one architecture for most kernels (with --check)"
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
        found, kernels = [], {}
        for variant in variants():
            measured = {arch: measure(variant, arch) for arch in SHARED_LIMIT}
            kernels[variant.name] = measured
            for arch, resources in measured.items():
                found += faults(variant, arch, resources)
        table = {"triton": triton.__version__, "kernels": kernels}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(found) or "no kernel spills or exceeds a limit")
    return 1 if found else 0


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in the tool's output: {text!r}")
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
