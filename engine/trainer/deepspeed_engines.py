"""The seam to DeepSpeed: one engine for G and one for D, built from the configuration.

A stage-wise GAN needs three things that DeepSpeed's tutorials do not tell:

- In the generator's step D must not collect gradients, or ZeRO reduces them into D's next update
  (0 and 1 silently, 2 and 3 by an assertion): `frozen`.
- Weights stay fp32 and layers cast them after dividing by sigma, so DeepSpeed's own bf16 mode,
  which casts the module itself, is not used; ZeRO shards the fp32 state.
- Checkpoint files are pickles that DeepSpeed would execute: `SafeCheckpointEngine` does not.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from engine.configuration import Training
from engine.models.spectral import spectral_weights, update_spectral_norm
from engine.trainer.adam import make_adam
from engine.trainer.host_copies import Copy, new_copy


def deepspeed_settings(
    training: Training, *, world_size: int, accumulation_steps: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived so that no JSON has to be kept beside ours."""
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": training.samples_per_pass * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": training.samples_per_pass,
        "gradient_accumulation_steps": accumulation_steps,
        "zero_optimization": {
            "stage": training.zero_stage,
            "offload_optimizer": offload if training.offload_optimizer else None,
            # DeepSpeed's half a billion values would be a buffer of 2 GB for each network.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # The two networks take turns, so a prefetched trace of one is wrong for the other.
            "stage3_prefetch_bucket_size": 0,
            # Small parameters, such as biases, stay whole: to gather each takes a collective.
            "stage3_param_persistence_threshold": 10_000,
        },
        "gradient_clipping": training.max_gradient_norm or 0.0,  # unsaid, it would be 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # the console is ours
        # It makes the host wait for the GPU three times in every pass, even if it prints nothing.
        "timers": {"throughput": {"enabled": False}},
    }


def make_engine(
    network: nn.Module, *, lr: float, training: Training, world_size: int, accumulation_steps: int
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around one network and its Adam."""
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=make_adam(network.parameters(), lr=lr, training=training),
        config=deepspeed_settings(
            training, world_size=world_size, accumulation_steps=accumulation_steps
        ),
    )
    return engine


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients flow through `network` to its input but not into its parameters."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def gathered(network: nn.Module, *, zero_stage: int) -> contextlib.AbstractContextManager[None]:
    """Whole parameters on every rank, also under ZeRO-3; collective, for reading only."""
    return deepspeed.zero.GatheredParameters(list(network.parameters()), enabled=zero_stage == 3)


def renew_spectral_norm(network: nn.Module, *, zero_stage: int) -> None:
    """One power iteration for every weight, due once after each optimizer step."""
    weights = [layer.weight for layer in spectral_weights(network)]
    with deepspeed.zero.GatheredParameters(weights, enabled=zero_stage == 3):
        update_spectral_norm(network)


def whole_state(
    network: nn.Module, *, zero_stage: int, keep: bool, copy: Copy = new_copy
) -> dict[str, torch.Tensor]:
    """The network's parameters and buffers on the CPU, unsharded. Collective.

    Ranks that do not `keep` them help to gather and get an empty dict.
    """
    with gathered(network, zero_stage=zero_stage):
        if not keep:
            return {}
        return {name: copy(name, value) for name, value in network.state_dict().items()}


class EngineUpdate:
    """`engine.step()`, which also tells the norm of the gradient that it applied.

    ZeRO computes its own; without ZeRO the gradients still stand in `.grad` at that moment.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> None:
        self._engine = engine
        self._zero_stage = zero_stage

    def step(self) -> torch.Tensor:
        """Step; the gradient's 2-norm over all ranks at an accumulation boundary, zero before."""
        norm = torch.zeros((), device=self._engine.device)
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary and self._zero_stage == 0:
            grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.stack(torch._foreach_norm(grads)).norm()
        self._engine.step()
        if boundary and self._zero_stage > 0:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=norm.device)
        return norm
