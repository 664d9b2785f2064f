"""A result file of the benchmarks, as a dictionary to be changed."""

from typing import Any


def row(side: str = "ours", **changes: Any) -> dict[str, Any]:
    return {
        "operator": "frame_norm",
        "shape": "4x12x512x32x32",
        "direction": "forward_backward",
        "side": side,
        "dtype": "bfloat16",
        "rounds": 11,
        "seconds": [0.0005, 0.0004, 0.0006],
        "of_ours": None if side == "ours" else [3.0, 2.5, 3.5],
        "gb_per_s": 1500.0,
        "tflop_per_s": 2.0,
        "share_of_copy": 0.75,
        "share_of_matmul": 0.01,
        "peak_bytes": 50_000_000 if side == "ours" else 200_000_000,
    } | changes


def document(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "date": "2026-11-24T12:00:00Z",
        "device": {"kind": "cuda", "name": "NVIDIA H100", "num_threads": None, "driver": "570.1"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.9.0", "cuda": "13.0",
                     "cudnn": "91300"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "quick": False,
        "seconds": 300.0,
        "rates": [
            {"copy_gb_per_s": 2000.0, "matmul_tflop_per_s": 700.0, "matmul_dtype": "bfloat16"}
        ],
        "rows": [row(), row("reference"), row("compiled", of_ours=[1.5, 1.4, 1.6])],
        "counts": [
            {"what": "executed", "of": "stage 2", "plain": 12.37, "ours": 9.62, "unit": "TFLOP"}
        ],
        "skipped": [{"case": "step", "reason": "the budget is spent"}],
        "failed": [],
    } | changes  # fmt: skip


def feed(part: str, seconds: float, cpu_seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "case": "loader_sample[cpu]",
        "clips": "6 frames",
        "decoder": "dali-cpu",
        "num_threads": 2,
        "part": part,
        "batch_size": 8,
        "rounds": 5,
        "seconds": [seconds, 0.8 * seconds, 1.25 * seconds],
        "cpu_seconds": cpu_seconds,
        "needed_per_s": 100.0,
    } | changes


CPU = {"kind": "cpu", "name": "Some CPU", "num_threads": 1, "driver": None}
