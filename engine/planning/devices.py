"""What GPUs can do at best, after their makers' data sheets.

The sheets are named so that a row can be checked; the numbers were taken from pages that quote them
or, of the V100, B200, L40S and RTX 4090, from memory.
Peaks, not what a program reaches: dense matrix products (no structured sparsity), all links in one
direction. One of a kind each; other clocks and boards differ.
"""

from dataclasses import dataclass, replace

from engine.errors import UserError


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    title: str
    memory_gb: float
    """10^9 bytes."""
    bf16_tflops: float | None
    """On tensor cores, sums in fp32; None where it has no bf16."""
    fp32_tflops: float
    """True fp32, which is what `precision: fp32` runs: not TF32."""
    bandwidth_gb_per_second: float
    """Of its memory."""
    link_gb_per_second: float
    """To the other GPUs of a node, in one direction."""
    source: str

    def tflops(self, precision: str) -> float:
        """The peak rate of matrix products. Raises UserError where there is none."""
        rate = self.bf16_tflops if precision == "bf16" else self.fp32_tflops
        if rate is None:
            raise UserError(
                f"--device {self.name} has no bf16; plan with --set training.precision=fp32, or "
                "give its rate by --tflops"
            )
        return rate


DEVICES = {
    device.name: device
    for device in (
        Device(
            *("v100", "V100 SXM2", 32, None, 15.7, 900, 150),
            source="NVIDIA V100 datasheet, January 2020",
        ),
        Device(
            *("a100-40", "A100 SXM4", 40, 312, 19.5, 1555, 300),
            source="NVIDIA A100 datasheet, June 2021",
        ),
        Device(
            *("a100", "A100 SXM4", 80, 312, 19.5, 2039, 300),
            source="NVIDIA A100 datasheet, June 2021",
        ),
        Device(
            *("h100", "H100 SXM5", 80, 989.4, 66.9, 3350, 450),
            source="NVIDIA H100 datasheet; half of the rates that it gives with sparsity",
        ),
        Device(
            *("h200", "H200 SXM5", 141, 989.4, 66.9, 4800, 450),
            source="NVIDIA H200 datasheet; half of the rates that it gives with sparsity",
        ),
        Device(
            *("b200", "B200 (HGX)", 180, 2250, 80, 8000, 900),
            source="NVIDIA Blackwell datasheet, HGX B200; half of the rates with sparsity",
        ),
        Device(
            *("l40s", "L40S", 48, 362.05, 91.6, 864, 32),
            source="NVIDIA L40S datasheet; PCIe 4.0 x16",
        ),
        Device(
            *("rtx4090", "GeForce RTX 4090", 24, 165.2, 82.6, 1008, 32),
            source="NVIDIA Ada GPU architecture whitepaper, appendix A; PCIe 4.0 x16",
        ),
    )
}


def find_device(
    name: str,
    *,
    memory_gb: float | None = None,
    tflops: float | None = None,
    bandwidth_gb_per_second: float | None = None,
    link_gb_per_second: float | None = None,
) -> Device:
    """The device of that name, with what the caller knows better. Raises UserError."""
    if name not in DEVICES:
        raise UserError(f"--device {name!r} is not among {', '.join(DEVICES)}")
    device = DEVICES[name]
    changes: dict[str, float] = {}
    for field, value in (
        ("memory_gb", memory_gb),
        ("bf16_tflops", tflops),
        ("fp32_tflops", tflops),
        ("bandwidth_gb_per_second", bandwidth_gb_per_second),
        ("link_gb_per_second", link_gb_per_second),
    ):
        if value is not None and value != getattr(device, field):
            changes[field] = value
    if not changes:
        return device
    return replace(device, **changes, source=f"{device.source}, and the command line")  # type: ignore[arg-type]
