"""Every Triton kernel compiles for every GPU it is meant for, and costs what the table says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.compiled import check as checks
from kernels.compiled.__main__ import main
from kernels.compiled.check import SHARED_LIMIT, TABLE, Resources, check, faults
from kernels.compiled.variant import Variant
from kernels.compiled.variants import variants

GOOD = {
    "registers": 64,
    "stack_bytes": 0,
    "spilled_bytes": 0,
    "shared_bytes": 2048,
    "matrix_instructions": 4,
}


def kernel() -> None:
    """Stands for a Triton kernel where only its name is used."""


def product_kernel() -> None:
    """Stands for another."""


kernel.__module__ = product_kernel.__module__ = "kernels.op.triton"


def run(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may interpret kernels, and then cannot compile them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


@pytest.fixture
def compiled_before(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What Triton compiled in earlier runs of the tests too.

    It keeps a program by the kernel's source, all that the source calls, the constants, the target
    and Triton's version, so a kernel that was changed is compiled anew.
    """
    cache = getattr(request.config, "cache", None)  # None under -p no:cacheprovider
    return tmp_path if cache is None else cache.mkdir("triton")


def test_the_table_is_true(compiled_before: Path) -> None:
    """Thinned: all of it takes some minutes more. What the table was made from is recognised by its
    key, and a variant of each kernel is compiled all the same, one with matrix products, whose
    instructions and tiles differ between architectures, for every one of them."""
    done = run(compiled_before, "-m", "kernels.compiled", "--check", "--thin")
    assert done.returncode == 0, done.stdout + done.stderr


KERNELS = """
import triton
import triton.language as tl
FACTOR = tl.constexpr(2)
@triton.jit
def helper(x):
    return x * FACTOR
@triton.jit
def kernel(ptr, N: tl.constexpr):
    at = ptr + tl.arange(0, N)
    tl.store(at, helper(tl.load(at)))
"""
KEYS = """
import json, runpy, sys
from dataclasses import replace
from kernels.compiled.program_key import program_key
from kernels.compiled.variant import Variant
keys = {}
for file in sys.argv[1:]:
    kernel = runpy.run_path(file, run_name="written")["kernel"]
    plain = Variant(kernel, "", {"ptr": "*fp32", "n": "i32"}, {"SIZE": 64}, {"num_warps": 4})
    launched = {
        "plain": plain,
        "type": replace(plain, types={"ptr": "*bf16", "n": "i32"}),
        "constant": replace(plain, constants={"SIZE": 32}),
        "options": replace(plain, options={"num_warps": 8}),
        "divisible": replace(plain, divisible=frozenset({"n"})),
    }
    keys[file] = {name: program_key(variant) for name, variant in launched.items()}
print(json.dumps(keys))
"""
KERNEL = """
import triton
import triton.language as tl
FACTOR = tl.constexpr(2)
@triton.jit
def helper(x):
    return x * FACTOR
@triton.jit
def kernel(ptr, n, SIZE: tl.constexpr):
    at = ptr + n + tl.arange(0, SIZE)
    tl.store(at, helper(tl.load(at)))
"""


def test_a_key_is_of_what_the_compiler_is_given(tmp_path: Path) -> None:
    """Of all that a kernel calls and reads too, and of nothing else."""
    changes = {
        "as it was": ("", ""),
        "kernel": ("n + tl", "n + 1 + tl"),
        "helper": ("x * FACTOR", "x + FACTOR"),
        "global": ("constexpr(2)", "constexpr(3)"),
        "place": ("FACTOR =", "\n\n\nFACTOR ="),
        "comment": ("    return", "    # a remark\n    return"),
    }
    files = {change: tmp_path / f"{change}.py" for change in changes}
    for change, (old, new) in changes.items():
        files[change].write_text(KERNEL.replace(old, new, 1))
    done = run(tmp_path / "cache", "-c", KEYS, *map(str, files.values()))
    assert done.returncode == 0, done.stderr
    by_file = json.loads(done.stdout)
    keys = {change: by_file[str(file)] for change, file in files.items()}
    assert keys["place"] == keys["comment"] == keys["as it was"]
    found = [key for c in ("as it was", "kernel", "helper", "global") for key in keys[c].values()]
    assert len(set(found)) == len(found) == 20


def named(variant: Variant) -> str:
    """Its kernel; interpreted, only the function in it knows its module."""
    return f"{variant.kernel.fn.__module__}.{variant.kernel.fn.__name__}"


def matching(launch: Any, listed: list[Variant]) -> list[Variant]:
    """The variants that Triton would compile for a launch."""
    # Of numbers that are multiples of 16, those count of which variants say anything.
    told = frozenset[str]().union(*(variant.divisible for variant in listed))
    return [
        variant
        for variant in listed
        if named(variant) == launch["kernel"]
        and {**variant.types, **variant.constants} == launch["arguments"]
        and variant.options == launch["options"]
        and variant.divisible == told.intersection(launch["divisible"])
    ]


@pytest.mark.long
def test_all_that_shipped_configurations_launch_is_listed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(tmp_path, str(Path(__file__).with_name("shipped_launches.py")))
    assert done.returncode == 0, done.stderr
    launches, listed = json.loads(done.stdout.splitlines()[-1]), list(variants())
    assert [launch for launch in launches if not matching(launch, listed)] == []
    # Each has one variant: had that been left out, it would have been found.
    assert all(len(matching(launch, listed)) == 1 for launch in launches)
    rest = [variant for variant in listed if variant.label != "bf16 512x4 unaligned"]
    to_rgb = [launch for launch in launches if not matching(launch, rest)]
    assert to_rgb
    for launch in to_rgb:
        assert launch["kernel"] == "kernels.convolution.epilogue.add_terms_kernel"
        assert launch["arguments"]["y_ptr"] == "*bf16"


def test_every_shipped_number_is_within_limits() -> None:
    table = json.loads(TABLE.read_text())["kernels"]
    assert table
    for name, measured in table.items():
        assert measured.keys() == SHARED_LIMIT.keys(), name
        for arch, numbers in measured.items():
            assert numbers.keys() == GOOD.keys()
            assert numbers["spilled_bytes"] == numbers["stack_bytes"] == 0, (name, arch)
            assert 0 < numbers["registers"] < 255, (name, arch)  # 255 is where spilling starts
            assert numbers["shared_bytes"] <= SHARED_LIMIT[arch], (name, arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"stack_bytes": 8}, "spills"),
        ({"shared_bytes": 166913}, "166913 bytes of shared memory exceed the limit"),
        ({"matrix_instructions": 0}, "without tensor cores"),
    ],
)
def test_faults_are_found(change: dict[str, int], message: str) -> None:
    product = Variant(kernel, "bf16", {}, {}, multiplies_matrices=True)
    assert faults(product, "sm_80", GOOD) == []
    [fault] = faults(product, "sm_80", GOOD | change)
    assert fault.startswith("op.kernel bf16 on sm_80: ")
    assert message in fault


def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    """64 x 64 values in one warp are 128 registers per thread, for each of two accumulators."""
    script = (
        "from dataclasses import replace\n"
        "from kernels.compiled.check import faults, measure\n"
        "from kernels.compiled.variants import variants\n"
        "small = next(v for v in variants() if v.name.startswith('frame_norm.moments_kernel'))\n"
        "tile = {'BLOCK_S': 64, 'BLOCK_C': 64}\n"
        "big = replace(small, constants=tile, options={'num_warps': 1})\n"
        "print(*faults(big, 'sm_90', measure(big, 'sm_90')))\n"
        "renamed = replace(small, types=small.types | {'no_such': 'i32'})\n"
        "try: renamed.compile('sm_90')\n"
        "except ValueError as error: print(error)\n"
    )
    done = run(tmp_path, "-c", script)
    spills, unknown = done.stdout.splitlines()
    assert re.search(r" on sm_90: spills [1-9]\d* bytes", spills)
    assert unknown.endswith("arguments do not match the kernel's: ['no_such']")


def test_differences_from_the_table_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    listed = [Variant(kernel, "a", {}, {}), Variant(kernel, "b", {}, {})]
    monkeypatch.setattr(checks, "variants", lambda: iter(listed))
    monkeypatch.setattr(checks, "measure", lambda variant, arch: GOOD)
    monkeypatch.setattr("kernels.compiled.program_key.program_key", lambda variant: "now")
    table = {
        "triton": triton.__version__,
        "programs": {"op.kernel a": "before", "op.kernel c": "before"},
        "kernels": {
            "op.kernel a": {"sm_80": GOOD | {"registers": 65}},
            "op.kernel c": {"sm_80": GOOD},
        },
    }
    missing, gone, changed, differs = check(table, ["sm_80"])
    assert missing == "op.kernel b is not in the table: run python -m kernels.compiled"
    assert gone == "op.kernel c is not in the code: run python -m kernels.compiled"
    assert changed == "op.kernel a is not what the table measured: run python -m kernels.compiled"
    assert differs.startswith("op.kernel a on sm_80: the table says {'registers': 65")
    other = table | {"triton": "0.0"}
    assert check(other, ["sm_80"]) == [missing, gone]


def test_a_thin_check_compiles_each_for_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that the table was not made from; of the others one per kernel."""
    pytest.importorskip("triton")
    listed = [Variant(kernel, label, {}, {}) for label in "abcd"]
    listed.append(Variant(product_kernel, "product", {}, {}, multiplies_matrices=True))
    monkeypatch.setattr(checks, "variants", lambda: iter(listed))
    compiled = []

    def measure(variant: Variant, arch: str) -> Resources:
        compiled.append((variant.label, arch))
        return GOOD

    monkeypatch.setattr(checks, "measure", measure)
    keys = {"a": "0", "b": "1", "c": "2", "d": "3", "product": "4"}
    monkeypatch.setattr(
        "kernels.compiled.program_key.program_key", lambda variant: keys[variant.label]
    )
    table: dict[str, Any] = {"triton": "", "kernels": {v.name: {} for v in listed}}
    unknown, known = (
        table | {"programs": {}},
        table | {"programs": {v.name: keys[v.label] for v in listed}},
    )
    for arch in SHARED_LIMIT:
        assert check(unknown, [arch], thin=True) == []
    first, second, third = SHARED_LIMIT
    each = [("a", first), ("b", second), ("c", third), ("d", first)]
    products = [("product", arch) for arch in sorted(SHARED_LIMIT)]
    assert sorted(compiled) == each + products
    compiled.clear()
    assert check(known, [*SHARED_LIMIT], thin=True) == []
    assert sorted(compiled) == [("a", first), *products]
    compiled.clear()
    keys["d"] = "5"
    assert check(known, [*SHARED_LIMIT], thin=True) == []
    assert sorted(compiled) == [("a", first), ("d", first), *products]
    compiled.clear()
    assert check(known, [*SHARED_LIMIT]) == []
    assert len(compiled) == 15


def test_what_cannot_compile_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 2
    line = "TRITON_INTERPRET=1 is set: Triton interprets and cannot compile\n"
    assert capsys.readouterr().err == line
    with pytest.raises(SystemExit) as stop:
        main(["--arch", "sm_90"])
    assert stop.value.code == 2
