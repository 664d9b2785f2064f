"""What the compiler makes of kernels that run over lists: the addresses come from a table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import re, sys
from kernels.compiled.spectral_norm import variants
for variant in variants():
    if not variant.name.startswith(f"spectral_norm.{sys.argv[1]}."): continue
    ptx = variant.compile("sm_90").asm["ptx"]
    counts = (len(re.findall(rf"{way}\\.global\\S*\\.{size}", ptx)) for way, size in (
        ("ld", "v4"), ("ld", "v2"), ("st", "v4"), ("st", "v2")))
    print(variant.kernel.__name__, variant.label, *counts)
"""


def vectors(operator: str, cache: Path) -> dict[tuple[str, str], list[int]]:
    """By kernel and variant: loads of 16 and of 8 bytes, stores of 16 and of 8 bytes."""
    pytest.importorskip("triton")
    # In a process of its own: this one may interpret kernels, and then cannot compile them.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT, operator]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = (line.split() for line in done.stdout.splitlines())
    return {(kernel, label): list(map(int, counts)) for kernel, label, *counts in lines}


def test_aligned_rows_are_read_four_values_at_a_time(tmp_path: Path) -> None:
    """16 of a tile's values per thread in four loads: in both kernels that read W.

    Nothing but a slower kernel shows when the compiler cannot prove the alignment.
    """
    found = vectors("power_iteration", tmp_path)
    assert found["column_sums_kernel", "fp32"][0] >= 4
    assert found["row_sums_kernel", "fp32"][0] >= 4


def test_lists_are_read_and_written_four_values_at_a_time(tmp_path: Path) -> None:
    """W, Ŵ, dŴ and dW, in fp32 and in the 16 bits of Ŵ and dŴ."""
    found = vectors("network", tmp_path)
    assert found["sigma_kernel", "fp32"][0] >= 4
    load16, _, store16, store8 = found["normalize_kernel", "bf16"]
    assert min(load16, store16, store8) >= 4
    load16, load8, _, _ = found["inner_kernel", "bf16"]
    assert load16 >= 8  # W, and dŴ where it is fp32
    assert load8 >= 4
    load16, load8, store16, _ = found["dw_kernel", "bf16"]
    assert min(load16, load8, store16) >= 4
