"""What a plan takes for granted: GPUs' data sheets, the memory that tensors get, the FLOPs reached.

`checked` refuses a plan that these assumptions already rule out, before anything is counted.

The data sheets are named so that a row can be checked; the numbers were taken from pages that quote
them or, of the V100, B200, L40S and RTX 4090, from memory. They are peaks, not what a program
reaches: dense matrix products (no structured sparsity), and all links in one direction. Each row is
one board; others of the same name have other clocks.
"""

from dataclasses import dataclass, replace

from engine.batches import accumulation_steps, share_among
from engine.configuration import Config
from engine.errors import UserError
from engine.trainer.sample_bank import batches_per_rank

GOAL_HFU = 0.55
"""Of executed FLOPs (`HFU`), the project's goal on an H100. Not measured on any device yet."""
MOST_SAMPLES = 100_000
"""Of a GPU per update. A step of all of them is counted, with latents and labels, and all their
divisors are tried; a batch with more is mistyped."""


@dataclass(frozen=True)
class Gpu:
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
        Gpu(
            *("v100", "V100 SXM2", 32, None, 15.7, 900, 150),
            source="NVIDIA V100 datasheet, January 2020",
        ),
        Gpu(
            *("a100-40", "A100 SXM4", 40, 312, 19.5, 1555, 300),
            source="NVIDIA A100 datasheet, June 2021",
        ),
        Gpu(
            *("a100", "A100 SXM4", 80, 312, 19.5, 2039, 300),
            source="NVIDIA A100 datasheet, June 2021",
        ),
        Gpu(
            *("h100", "H100 SXM5", 80, 989.4, 66.9, 3350, 450),
            source="NVIDIA H100 datasheet; half of the rates that it gives with sparsity",
        ),
        Gpu(
            *("h200", "H200 SXM5", 141, 989.4, 66.9, 4800, 450),
            source="NVIDIA H200 datasheet; half of the rates that it gives with sparsity",
        ),
        Gpu(
            *("b200", "B200 (HGX)", 180, 2250, 80, 8000, 900),
            source="NVIDIA Blackwell datasheet, HGX B200; half of the rates with sparsity",
        ),
        Gpu(
            *("l40s", "L40S", 48, 362.05, 91.6, 864, 32),
            source="NVIDIA L40S datasheet; PCIe 4.0 x16",
        ),
        Gpu(
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
) -> Gpu:
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


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; each can be given on the command line."""

    device: Gpu
    num_gpus: int
    reserve_gb: float
    """Memory of the device that no tensor gets: CUDA's context, cuDNN's and NCCL's buffers,
    prefetched clips, and the allocator's fragments. Decided, not measured."""
    hfu: float

    @property
    def limit_bytes(self) -> float:
        """The memory that tensors get."""
        return (self.device.memory_gb - self.reserve_gb) * 1e9


def reserve_gb(memory_gb: float) -> float:
    """The part of a device's memory that no tensor gets, where nobody says otherwise."""
    return 2 + memory_gb / 20


def checked(config: Config, number: int, assumptions: Assumptions) -> Config:
    """The configuration with a micro-batch no larger than a GPU's share, as train.py trains it.

    "auto" is left as it is. Raises UserError where the assumptions rule the plan out.
    """
    if number not in config.stages:
        raise UserError(f"--stage {number}: {config.name} has stages 1 to {len(config.stages)}")
    batch, num_gpus = config.stages[number].training.global_batch, assumptions.num_gpus
    if batch > MOST_SAMPLES * num_gpus:
        raise UserError(
            f"--gpus {num_gpus} cannot share training.global_batch {batch}: more than "
            f"{MOST_SAMPLES} samples for each; use more GPUs, or a smaller "
            f"--set stages.{number}.training.global_batch"
        )
    share_of(config, number, num_gpus)
    training = config.stages[number].training
    if training.micro_batch == "auto":
        smallest = training.model_copy(update={"micro_batch": 1})
    else:
        config = share_among(config, number, num_gpus)
        training = smallest = config.stages[number].training
        accumulation_steps(training, num_gpus)
    if training.sample_bank is not None:
        batches_per_rank(training.sample_bank, smallest, num_gpus)
    assumptions.device.tflops(training.precision)
    if assumptions.limit_bytes <= 0:
        raise UserError(
            f"--reserve {assumptions.reserve_gb:g} leaves nothing of --gpu-memory "
            f"{assumptions.device.memory_gb:g}"
        )
    return config


def share_of(config: Config, number: int, num_ranks: int) -> int:
    """Samples of a rank per update. Raises UserError where the ranks cannot share them evenly."""
    batch = config.stages[number].training.global_batch
    share, remainder = divmod(batch, num_ranks)
    if share == 0 or remainder:
        fewer = next(ranks for ranks in range(min(num_ranks, batch), 0, -1) if batch % ranks == 0)
        more = (batch // num_ranks + 1) * num_ranks
        raise UserError(
            f"--gpus {num_ranks} cannot share training.global_batch {batch} evenly; use --gpus "
            f"{fewer}, or --set stages.{number}.training.global_batch={more}"
        )
    return share
