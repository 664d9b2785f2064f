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


kernel.__module__ = "kernels.op.triton"


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


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_the_table_is_true(arch: str, compiled_before: Path) -> None:
    """Thinned: all of it takes some minutes more. Every kernel is compiled for one architecture,
    those with matrix products, whose instructions and tiles differ between them, for every one."""
    done = run(compiled_before, "-m", "kernels.compiled", "--check", "--thin", "--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr


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


@pytest.mark.slow
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
    table = {
        "triton": triton.__version__,
        "kernels": {
            "op.kernel a": {"sm_80": GOOD | {"registers": 65}},
            "op.kernel c": {"sm_80": GOOD},
        },
    }
    missing, gone, differs = check(table, ["sm_80"])
    assert missing == "op.kernel b is not in the table: run python -m kernels.compiled"
    assert gone == "op.kernel c is not in the code: run python -m kernels.compiled"
    assert differs.startswith("op.kernel a on sm_80: the table says {'registers': 65")
    other = table | {"triton": "0.0"}
    assert check(other, ["sm_80"]) == [missing, gone]


def test_a_thin_check_compiles_each_for_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    listed = [Variant(kernel, label, {}, {}) for label in "abcd"]
    listed.append(Variant(kernel, "product", {}, {}, multiplies_matrices=True))
    monkeypatch.setattr(checks, "variants", lambda: iter(listed))
    compiled = []

    def measure(variant: Variant, arch: str) -> Resources:
        compiled.append((variant.label, arch))
        return GOOD

    monkeypatch.setattr(checks, "measure", measure)
    table: dict[str, Any] = {"triton": "", "kernels": {v.name: {} for v in listed}}
    for arch in SHARED_LIMIT:
        assert check(table, [arch], thin=True) == []
    first, second, third = SHARED_LIMIT
    each = [("a", first), ("b", second), ("c", third), ("d", first)]
    assert sorted(compiled) == each + [("product", arch) for arch in sorted(SHARED_LIMIT)]
    compiled.clear()
    assert check(table, [*SHARED_LIMIT]) == []
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
