"""What the compiler makes of the power iteration's kernels: the addresses come from a table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import re
from kernels.power_iteration_triton import variants
for variant in variants():
    ptx = variant.compile("sm_90").asm["ptx"]
    print(variant.kernel.__name__, len(re.findall(r"ld\\.global\\S*\\.v4", ptx)))
"""


def test_aligned_rows_are_read_four_values_at_a_time(tmp_path: Path) -> None:
    """16 of a tile's values per thread in four loads: in both kernels that read W.

    Nothing but a slower kernel shows when the compiler cannot prove the alignment.
    """
    pytest.importorskip("triton")
    # In a process of its own: this one may interpret kernels, and then cannot compile them.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    loads = dict(line.split() for line in done.stdout.splitlines())
    assert int(loads["column_sums_kernel"]) >= 4
    assert int(loads["row_sums_kernel"]) >= 4
