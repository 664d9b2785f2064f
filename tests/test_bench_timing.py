"""Arithmetic on times, turns, and the floors."""

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks import timing
from benchmarks.bench_operators import OPERATORS, operator_cost
from benchmarks.calls import Call, kinetics, network_calls
from benchmarks.results import Rates
from benchmarks.session import Case, make_row
from benchmarks.timing import (
    Spread,
    num_copies,
    num_rounds,
    paired_ratios,
    spread,
    take_turns,
)
from kernels.common.floor import Cost
from kernels.spectral_norm.floor import spectral_norm_floor

META = torch.device("meta")


def test_percentiles_interpolate_and_ignore_the_order() -> None:
    # At 0.2 · 4 = 0.8 between 1 and 2, and at 0.8 · 4 = 3.2 between 4 and 10.
    assert spread([10, 1, 3, 2, 4]) == pytest.approx((3, 1.8, 5.2))
    assert spread([7]) == (7, 7, 7)
    assert spread([1, 2]).median == 1.5
    with pytest.raises(ValueError, match="no measurements"):
        spread([])


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that halves its speed for a round slows both sides: no ratio moves."""
    ours, other = [1.0, 2.0, 4.0], [3.0, 6.0, 12.0]
    assert paired_ratios(other, ours) == (3, 3, 3)
    assert paired_ratios([1.0, 9.0, 2.0], [1.0, 3.0, 1.0]).median == 2
    with pytest.raises(ValueError, match="2 rounds of one side and 1"):
        paired_ratios([1.0, 2.0], [1.0])


def test_rounds_and_copies() -> None:
    assert num_rounds(0.1, seconds=1, least=5, most=50) == 10
    assert num_rounds(9, seconds=1, least=5, most=50) == 5
    assert num_rounds(0, seconds=1, least=5, most=50) == 50
    # All but the one in use exceed the cache: 3 · 20 > 50, while 2 · 20 do not.
    assert num_copies(20, cache_bytes=50) == 4
    assert num_copies(100, cache_bytes=50) == 1
    assert num_copies(1, cache_bytes=50, most=16) == 16


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {"ours": 2.0, "reference": 5.0}

    def measure(run: object, device: torch.device) -> float:
        assert callable(run)
        run()
        return seconds[order[-1]]

    monkeypatch.setattr(timing, "measure", measure)
    sides = {name: (lambda name=name: order.append(name)) for name in seconds}
    taken = take_turns(sides, "ours", 4, torch.device("cpu"))
    # Neither is always second.
    assert order == ["reference", "ours", "ours", "reference"] * 2
    assert taken == {"ours": [2.0] * 4, "reference": [5.0] * 4}


def test_measured_cpu_time_is_work_and_not_waiting() -> None:
    import time

    assert timing.measure(lambda: time.sleep(0.05), torch.device("cpu")) < 0.04


def test_a_row_has_rates_and_shares_of_the_run() -> None:
    """2e9 bytes and 3e12 FLOPs in a median of half a second."""
    case = Case(
        operator="op",
        shape="s",
        direction="forward",
        dtype=torch.float32,
        cost=Cost(num_bytes=2 * 10**9, flops=3 * 10**12),
        check=lambda: None,
        sides=dict,
    )
    rates = Rates(copy_gb_per_s=8, matmul_tflop_per_s=24, matmul_dtype="float32")
    row = make_row(case, "reference", [0.25, 0.5, 1.0], [0.25, 0.25, 0.25], rates, None)
    assert (row.gb_per_s, row.tflop_per_s) == (4, 6)
    assert (row.share_of_copy, row.share_of_matmul) == (0.5, 0.25)
    assert row.of_ours == Spread(2, *spread([1.0, 2.0, 4.0])[1:])
    assert make_row(case, "ours", [0.5], [0.5], rates, 7).of_ours is None


# --------------------------------------------------------------------------------- floors


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "frame_norm"])
def test_flops_are_those_that_pytorch_counts(operator: str) -> None:
    """Independent of the formulas: what the folded forms execute, forward and backward.

    Without x_l, whose projection is no part of them.
    """
    stage, network, _ = OPERATORS[operator]
    for call in network_calls(kinetics(reduced=True), stage, operator, network):
        call = Call(call.operator, {k: v for k, v in call.arguments.items() if k != "skip"})
        arguments = tree_map_only(
            torch.Tensor, lambda v: v.detach().requires_grad_(v.requires_grad), call.arguments
        )
        with FlopCounterMode(display=False) as forward:
            y = call.function()(**arguments)
        assert forward.get_total_flops() == operator_cost(call, backward=False).flops, call.name
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        both = forward.get_total_flops() + backward.get_total_flops()
        assert both == operator_cost(call, backward=True).flops, call.name


def test_bytes_by_hand() -> None:
    x = torch.empty(2, 3, 16, 4, 4, dtype=torch.bfloat16, device=META, requires_grad=True)
    gain = torch.empty(2, 16, device=META)
    norm = Call("frame_norm", {"x_BTCHW": x, "gain": gain, "bias": gain})
    # 6 and 10 bytes per element of x, as kernels/frame_norm/__init__.py says.
    assert operator_cost(norm, backward=False).num_bytes == 6 * x.numel()
    assert operator_cost(norm, backward=True).num_bytes == (6 + 10) * x.numel()
    weight = torch.empty(8, 3, 3, 16, dtype=torch.bfloat16, device=META)
    conv = Call("conv2d", {"x_BTIHW": x, "weight_OhwI": weight, "bias_O": None})
    # x and y, 8 channels of the same pixels; the weight. Backward dy, x, dx, weight and dW.
    forward = 2 * (1536 + 768) + 2 * 1152
    assert operator_cost(conv, backward=False).num_bytes == forward
    backward = 2 * (768 + 2 * 1536) + 2 * 2 * 1152
    assert operator_cost(conv, backward=True).num_bytes == forward + backward
    # 8 for an iteration, 6 for a bf16 weight, 10 for its gradient.
    assert spectral_norm_floor(100, 2, normalize=True, backward=True).num_bytes == 3000


def test_shapes_come_from_the_networks() -> None:
    """Kinetics-600's stages as the paper gives them, written down here and nowhere else."""
    config = kinetics(reduced=False)
    names = [call.name for call in network_calls(config, 2, "frame_norm")]
    assert names == [
        "4x12x1024x4x4",
        "4x12x1024x8x8",
        "4x12x1024x16x16",
        "4x12x512x32x32",
        "4x12x256x64x64",
        "4x12x128x128x128",
    ]
    names = [call.name for call in network_calls(config, 2, "conv2d")]
    assert [name for name in names if "256x64x64" in name] == [
        "4x12x256x64x64-256-shortcut",
        "4x12x256x64x64-256",
    ]
    first, *later = network_calls(config, 1, "conv_gru")
    assert [call.name for call in later][-1] == "4x25x512x32x32"
    assert first.constant_input
    assert not any(call.constant_input for call in later)
    originals = kernels.frame_norm, kernels.conv2d
    network_calls(kinetics(reduced=True), 2, "conv2d")
    assert (kernels.frame_norm, kernels.conv2d) == originals


def test_drawn_arguments_are_as_the_networks_lay_them_out() -> None:
    first, second = network_calls(kinetics(reduced=True), 1, "conv_gru")[:2]
    device = torch.device("cpu")
    assert first.draw(device, 0)["x_BTCHW"].stride(1) == 0
    x, again, other = (second.draw(device, seed)["x_BTCHW"] for seed in (0, 0, 1))
    assert x.stride(2) == 1, "channels last"
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
