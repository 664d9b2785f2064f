"""Synchronised norms: two ranks with half of a batch each compute what one computes with all."""

from pathlib import Path

import torch
import torch.distributed as dist
from small_networks import clip_generator
from torch import Tensor, nn
from torch import multiprocessing as mp

from engine.models.activation_checkpointing import set_checkpointing
from engine.models.norms import synchronize_norms

NUM_FRAMES = 3
EPS = torch.finfo(torch.float32).eps


def _inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    z_BZ = torch.randn(4, 16, generator=random, dtype=torch.float64)
    upstream = torch.randn(4, NUM_FRAMES, 3, 16, 16, generator=random, dtype=torch.float64)
    return z_BZ, upstream


def _generator() -> nn.Module:
    torch.manual_seed(0)
    return clip_generator(compute_dtype=torch.float64).double()


def _gradients(generator: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in generator.parameters() if p.grad is not None]
    assert len(gradients) == len(list(generator.parameters()))
    return gradients


def _compare(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    z_BZ, upstream = _inputs()
    whole = _generator()
    expected = whole(z_BZ, None, NUM_FRAMES)
    expected.backward(upstream)

    mine = slice(2 * rank, 2 * rank + 2)
    shared = _generator()
    alone = shared(z_BZ[mine], None, NUM_FRAMES)
    assert (alone - expected[mine]).abs().max() > 1e-3  # else there is nothing to synchronise
    synchronize_norms(shared, dist.group.WORLD)
    video = shared(z_BZ[mine], None, NUM_FRAMES)
    # z is cast to fp32 by the condition, the rest is fp64 throughout.
    torch.testing.assert_close(video, expected[mine])
    video.backward(upstream[mine])
    mine_alone = [gradient.clone() for gradient in _gradients(shared)]
    scale = max(wanted.abs().max().item() for wanted in _gradients(whole))
    for gradient, wanted in zip(_gradients(shared), _gradients(whole), strict=True):
        dist.all_reduce(gradient)
        # Latents, gains and pixels are fp32 in any network: sums of hundreds of their products.
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=100 * EPS * scale)
    # A block that is computed again repeats its all-reduces, in one order on all ranks.
    for mode in ("none", "blocks"):
        again = _generator()
        synchronize_norms(again, dist.group.WORLD)
        set_checkpointing(again, mode)
        same = again(z_BZ[mine], None, NUM_FRAMES)
        same.backward(upstream[mine])
        assert torch.equal(same, video)
        for gradient, wanted in zip(_gradients(again), mine_alone, strict=True):
            assert torch.equal(gradient, wanted)
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(_compare, (tmp_path / "store",), nprocs=2)
