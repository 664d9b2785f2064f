"""What is wrong is not timed; what is counted is what is there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from benchmarks import bench_spectral_norm
from benchmarks.bench_accounting import LaunchCounter, count_spectral_launches
from benchmarks.bench_operators import OPERATORS, side_functions
from benchmarks.bench_spectral_norm import check_weights, draw, parametrized_weight
from benchmarks.calls import kinetics, network_calls
from benchmarks.correctness import Refused, check, check_call, check_networks
from benchmarks.session import Case, Session
from benchmarks.setups import CONFIGS
from benchmarks.trainers import make_trainer
from engine.configuration import load_config
from engine.models.layers import Linear
from engine.trainer.ranks import Ranks

CPU = torch.device("cpu")


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is a twentieth too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return 1.05 * dy[0]


def upsampling() -> Any:
    return network_calls(kinetics(reduced=True), 2, "upsample_conv")[0]


def test_every_side_passes() -> None:
    """The plain forms too, which a CPU run does not measure."""
    for operator, (stage, network, _) in OPERATORS.items():
        call = network_calls(kinetics(reduced=True), stage, operator, network)[0]
        sides = side_functions(operator, compiled=False, plain=True)
        check_call(call, sides, sides["reference"], CPU)


def test_a_wrong_pixel_is_refused() -> None:
    """A thousandth of the largest value, in one place."""
    call = upsampling()

    def off_by_one_pixel(**arguments: Any) -> Tensor:
        y = kernels.upsample_conv(**arguments)
        wrong = torch.zeros_like(y)
        wrong[-1, -1, -1, -1, -1] = 1e-3 * y.detach().abs().max()
        return y + wrong

    reference = side_functions("upsample_conv", compiled=False, plain=False)["reference"]
    with pytest.raises(Refused, match="mine: y errs by"):
        check_call(call, {"mine": off_by_one_pixel}, reference, CPU)


def test_a_wrong_recurrence_is_refused() -> None:
    """However often it is drawn: one bias of three is scaled by a ten thousandth."""
    call = network_calls(kinetics(reduced=True), 1, "conv_gru")[1]

    def scaled(**arguments: Any) -> Tensor:
        return kernels.conv_gru(**arguments | {"bias_u_C": 1.0001 * arguments["bias_u_C"]})

    reference = side_functions("conv_gru", compiled=False, plain=False)["reference"]
    check_call(call, {"mine": kernels.conv_gru}, reference, CPU)
    with pytest.raises(Refused, match="mine: y errs by"):
        check_call(call, {"mine": scaled}, reference, CPU)


def test_a_wrong_gradient_is_refused() -> None:
    call = upsampling()

    def detached_bias(**arguments: Any) -> Tensor:
        bias = arguments["bias_O"]
        return kernels.upsample_conv(
            **arguments | {"bias_O": bias.detach() + 0.999 * (bias - bias.detach())}
        )

    reference = side_functions("upsample_conv", compiled=False, plain=False)["reference"]
    with pytest.raises(Refused, match="dbias_O errs by"):
        check_call(call, {"mine": detached_bias}, reference, CPU)


def test_nan_and_missing_results_are_refused() -> None:
    exact = {"y": torch.ones(3, dtype=torch.float64)}
    usual = {"y": torch.ones(3)}
    check("mine", {"y": torch.ones(3) * (1 + 2**-23)}, usual, exact, num_terms=1)
    with pytest.raises(Refused):
        check("mine", {"y": torch.tensor([1.0, float("nan"), 1.0])}, usual, exact, num_terms=1)
    with pytest.raises(Refused, match="returns"):
        check("mine", {}, usual, exact, num_terms=1)


def test_spectral_norm_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = draw([torch.Size((6, 3, 4)), torch.Size((5, 7))], torch.float32, CPU)
    check_weights(weights)
    true = kernels.spectral_normalize_all

    def wrong(*arguments: Any) -> list[Tensor]:
        by = 1 if kernels.dispatch._setting == "reference" else 1.001
        return [by * weight for weight in true(*arguments)]

    monkeypatch.setattr(kernels, "spectral_normalize_all", wrong)
    with pytest.raises(Refused, match="ours: weight errs"):
        check_weights(weights)


@pytest.mark.parametrize("wrong", ["weight", "dweight"])
def test_torchs_spectral_norm_is_checked(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = draw([torch.Size((6, 3, 4)), torch.Size((5, 7))], torch.float32, CPU)

    def scaled(module: torch.nn.Module) -> Tensor:
        weight = parametrized_weight(module)
        return 1.001 * weight if wrong == "weight" else ScaledGradient.apply(weight)

    monkeypatch.setattr(bench_spectral_norm, "parametrized_weight", scaled)
    with pytest.raises(Refused, match=f"^parametrizations: {wrong} errs"):
        check_weights(weights)


@pytest.mark.parametrize(("operator", "whose"), [("upsample_conv", "G"), ("conv_pool3d", "D")])
def test_a_step_with_a_wrong_gradient_is_not_timed(
    operator: str, whose: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one operator's weights; every value is right."""
    config = load_config(
        CONFIGS / "sample.yaml", ["training.micro_batch=2", "training.global_batch=2"]
    )
    torch.manual_seed(0)
    trainer = make_trainer(config, 1, ranks)
    check_step = partial(check_networks, trainer, config, partial(kernels.use, "reference"))
    before = {name: value.clone() for name, value in trainer.d_engine.module.state_dict().items()}
    check_step()
    after = trainer.d_engine.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    true = getattr(kernels, operator)

    def wrong(x: Any, weight: Any, *others: Any, **named: Any) -> Any:
        if kernels.dispatch._setting != "reference" and torch.is_grad_enabled():
            weight = kernels.Folded(ScaledGradient.apply(weight.kernel), weight.fold)
        return true(x, weight, *others, **named)

    monkeypatch.setattr(kernels, operator, wrong)
    session, calls = Session(CPU), list[str]()
    with pytest.raises(Refused, match=f"^{whose}'s gradients of .* differ by"):
        session.run(case(check_step, calls), Pedantic(session))
    assert calls == []


class Pedantic:
    """Stands for pytest-benchmark's fixture: what it reads off the session's clock."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.seconds: list[float] = []

    def pedantic(self, target: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            before = self.session.clock
            target()
            self.seconds.append(self.session.clock - before)


def case(check: Callable[[], None], calls: list[str]) -> Case:
    sides = {name: (lambda name=name: calls.append(name)) for name in ("ours", "reference")}
    return Case("op", "s", "forward", torch.float32, check, lambda: dict(sides))


def test_a_refused_case_is_not_run_at_all() -> None:
    session, calls = Session(CPU), list[str]()

    def refuse() -> None:
        raise Refused("wrong")

    with pytest.raises(Refused):
        session.run(case(refuse, calls), Pedantic(session))
    assert calls == []
    assert session.results.rows == []


def test_a_right_case_is_measured_on_every_side(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1, 10_000))
    monkeypatch.setattr("benchmarks.timing.time.process_time", lambda: float(next(ticks)))
    session, calls = Session(CPU, least_rounds=3, seconds_per_case=0), list[str]()
    benchmark = Pedantic(session)
    session.run(case(lambda: None, calls), benchmark)
    assert benchmark.seconds == [1, 1, 1], "our side's times, and no other's"
    assert [(row.side, row.rounds) for row in session.results.rows] == [
        ("ours", 3),
        ("reference", 3),
    ]
    assert session.results.rows[1].of_ours == (1, 1, 1)  # every call took one tick
    assert session.results.rows[0].peak_bytes is None, "a CPU does not tell"


# ------------------------------------------------------------------------------- launches


def test_launches() -> None:
    x = torch.empty(4, 6, device="meta")
    with LaunchCounter() as counter:
        (x.t().mm(x) + 1).view(36)[2:]
    assert counter.launches == 2  # the product and the sum; views launch nothing
    with LaunchCounter() as counter:
        kernels.frame_statistics(x[:, None, :, None, None], implementation="pytorch")
    with pytest.raises(KeyError, match="LAUNCHES does not say what sswgan::frame_moments"):
        _ = counter.launches


def test_spectral_launches_grow_only_where_they_must() -> None:
    """The iteration's do not depend on the number of weights."""
    with torch.device("meta"):
        one = torch.nn.Sequential(Linear(4, 5))
        three = torch.nn.Sequential(*(Linear(4, 5) for _ in range(3)))
    assert count_spectral_launches(one, "triton")["iteration"] == 4
    assert count_spectral_launches(three, "triton")["iteration"] == 4
    plain = [count_spectral_launches(net, "reference")["iteration"] for net in (one, three)]
    assert plain[1] > 2 * plain[0]
