"""What a compiled kernel needs, what it must not need, and how it differs from the table.

Triton compiles for a GPU that is not there; registers and stack are read from the binary
(cuobjdump), spills from the assembler (ptxas -v), shared memory from Triton. Numbers are compared
only under the version of Triton that made the table; the limits hold under any. The table also
has a key of each kernel's program, to tell without compiling which kernels have changed.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kernels.compiled.variant import Variant
from kernels.compiled.variants import variants

TABLE = Path(__file__).with_name("resources.json")

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}
"""Bytes of shared memory that one block may have."""

Resources = dict[str, int]
"""registers per thread, spilled and stack bytes per thread, shared bytes per block, and the
matrix_instructions (tensor cores) in the program."""


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
        stack_bytes, spilled_bytes = _number(r"STACK:(\d+)", usage), 0
        if stack_bytes:  # where spilled registers lie; else there are none to ask for
            [named] = re.findall(r"\.target (\w+)", ptx)  # with its suffix: sm_90a
            output = "-o", Path(folder, "out")
            log = _output(assembler.path, "-v", f"--gpu-name={named}", program, *output)
            for kind in ("stores", "loads"):
                spilled_bytes += _number(rf"(\d+) bytes spill {kind}", log)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack_bytes": stack_bytes,
        "spilled_bytes": spilled_bytes,
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

    `thin` compiles what the table was not made from and, so that this is not only believed, one
    variant of each kernel. Of them it compiles what multiplies no matrices, nine in ten of all, for
    one architecture each, in turn: what changes such a kernel for one mostly does for all.
    """
    import triton

    from kernels.compiled.program_key import program_key

    found, listed = [], {variant.name: variant for variant in variants()}
    for name in sorted(listed.keys() ^ table["kernels"].keys()):
        place = "the table" if name in listed else "the code"
        found.append(f"{name} is not in {place}: run python -m kernels.compiled")
    same_triton = triton.__version__ == table["triton"]
    keys = {name: program_key(variant) for name, variant in listed.items()}
    by_key = sorted(listed, key=keys.__getitem__, reverse=True)
    tried = {listed[name].kernel: name for name in by_key}.values()
    for index, (name, variant) in enumerate(listed.items()):
        held_key = table["programs"].get(name)
        if same_triton and held_key not in (None, keys[name]):
            found.append(f"{name} is not what the table measured: run python -m kernels.compiled")
        if thin and held_key == keys[name] and name not in tried:
            continue
        own = [*SHARED_LIMIT][index % len(SHARED_LIMIT)]
        everywhere = variant.multiplies_matrices or not thin
        for arch in archs if everywhere else {own}.intersection(archs):
            now = measure(variant, arch)
            found += faults(variant, arch, now)
            held = table["kernels"].get(name, {}).get(arch)
            if same_triton and held not in (None, now):
                found.append(f"{name} on {arch}: the table says {held}, not {now}")
    return found


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in the tool's output: {text!r}")
    return int(found[1])
