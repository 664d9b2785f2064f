"""The choice of the programs that a GPU runs: cuDNN's algorithms, torch.compile, CUDA graphs.

`training.acceleration` accelerates the parts that gain, in place:

compile      every residual block, also of the frozen earlier stages, is compiled by itself. The
             programs are small; checkpointing, prepared weights and DeepSpeed's hooks stay outside
             of them. A block that cannot be compiled whole is an error.
cuda_graphs  passes without gradients are recorded once and replayed: those of the frozen earlier
             stages, whose ConvGRU launches some ten small kernels for every frame, and the
             generator's in the discriminators' step. As long as the run takes, a recording keeps
             the most memory that its pass needs.

Decided: passes with gradients are not recorded. DeepSpeed reduces gradients in hooks of the
parameters, on streams of its own, and a replay would run neither.
"""

from collections.abc import Callable

import torch
from torch import nn

from engine.configuration import Stage
from engine.models.activation_checkpointing import Block
from engine.trainer.previous import PreviousStages
from engine.trainer.ranks import Ranks
from engine.trainer.recorded_passes import record_passes
from engine.trainer.step import Trainer

# Of torch.compile's, which are counted for all blocks of a network together; its default is 8.
_MOST_PROGRAMS = 256


def choose_convolutions(*, benchmark: bool) -> None:
    """Set how cuDNN chooses among its algorithms from now on.

    With `benchmark` it takes the fastest, by timing them. Otherwise its rules choose one of those
    that give the same bits in every run.
    """
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = not benchmark


def accelerate(
    stage: Stage, ranks: Ranks, trainer: Trainer, previous: PreviousStages | None
) -> list[str]:
    """Accelerate what can be; for every part that is left as it is, one line that says why.

    State dicts and results do not change, the latter up to the rounding of compiled arithmetic.
    """
    mode = stage.training.acceleration
    if mode == "none":
        return []
    if mode == "cuda_graphs" and ranks.device.type != "cuda":
        return [f"acceleration={mode} is not used: there is no CUDA device"]
    change: Callable[[nn.Module], None] = compile_blocks if mode == "compile" else record_passes
    for generator in previous.cascade.generators if previous is not None else ():
        change(generator)
    trained = {"generator": trainer.g_engine.module}
    if mode == "compile":  # D has no pass without gradients
        trained["discriminators"] = trainer.d_engine.module
    notes = []
    for name, network in trained.items():
        reason = _obstacle(name, stage, ranks)
        if reason is None:
            change(network)
        else:
            notes.append(f"acceleration={mode} leaves out the {name}: {reason}")
    return notes


def _obstacle(name: str, stage: Stage, ranks: Ranks) -> str | None:
    """Why a network that trains cannot be accelerated; None where it can."""
    training = stage.training
    if training.zero_stage > 1:
        return f"ZeRO-{training.zero_stage} partitions its gradients or weights; use ZeRO 0 or 1"
    if name == "generator" and training.synchronized_norms and ranks.world_size > 1:
        return f"its norms wait for all {ranks.world_size} ranks; use synchronized_norms=false"
    if training.acceleration == "cuda_graphs" and stage.joint:
        return "joint training cuts windows where the host says"
    return None


def compile_blocks(network: nn.Module) -> None:
    """Compile every block when it first runs, once per shape and kind of pass."""
    # Beyond the limit torch would go on uncompiled, and only log it.
    torch._dynamo.config.recompile_limit = _MOST_PROGRAMS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in network.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False, fullgraph=True)
