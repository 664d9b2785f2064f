"""Convolutions with a norm before and terms after them: derivatives, and what is kept for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from convolution_cases import (
    CASES,
    DEVICE,
    GIVEN,
    IN,
    KINDS,
    LOW,
    NORM,
    OUT,
    POOLINGS,
    SHORTCUT,
    TERMS,
    B,
    H,
    T,
    Tensors,
    W,
    case,
    follows_norm,
    gradients,
    plain,
    run,
    terms_of,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels


@pytest.mark.parametrize(("kind", "more"), CASES, ids=str)
def test_second_derivatives(kind: str, more: list[str]) -> None:
    """Those of a nonlinear function of all gradients, against the composition's."""
    tensors = case(kind, more)
    seconds = []
    for function in (run, plain):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        y = function(kind, leaves)
        grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        total = torch.stack([g.square().sum() for g in grads]).sum()
        seconds.append(torch.autograd.grad(total, list(leaves.values())))
    for name, got, expected in zip(tensors, *seconds, strict=True):
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    tensors = case(kind, [*(NORM if follows_norm(kind) else []), *terms_of(kind)])
    tensors["x"] = tensors["x"][:, :2, :, :2, :2]
    if "residual" in tensors:
        frames, rows, columns = (2 // size for size in POOLINGS.get(kind, (1, 1, 1)))
        tensors["residual"] = tensors["residual"][:, :frames, :, :rows, :columns]
    if "low" in tensors:
        tensors["low"] = tensors["low"][:, :1, :, :4, :2]

    def function(*values: Tensor) -> Tensor:
        return run(kind, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(
        function, [v.detach().requires_grad_() for v in tensors.values()]
    )


@pytest.mark.parametrize(
    ("kind", "more", "implementation"),
    [
        ("conv 3x3", GIVEN, None),
        ("conv 3x3", ["residual"], "pytorch"),
        ("conv 3x3", [], "epilogue"),
        ("conv 3x3", [*NORM, *SHORTCUT], "pytorch"),
        ("conv 3x3", [*NORM, *SHORTCUT, *LOW], "epilogue"),
        ("separable", [*NORM, *TERMS], "pytorch"),
        ("separable", [*NORM, *TERMS], "epilogue"),
        ("separable", [*NORM, *TERMS], "triton"),
        ("upsample", NORM, None),
        ("relu 3x3", [], None),
        ("relu 3x3", [], "epilogue"),
        ("relu 3x3", [*NORM, *TERMS], "pytorch"),
        ("relu 3x3", [*NORM, *TERMS], "epilogue"),
        ("relu 3x3", [*NORM, *TERMS], "triton"),
        ("relu 3x3x3", [], None),
        ("relu 3x3x3", ["residual"], "pytorch"),
        ("relu 3x3x3", ["residual"], "epilogue"),
        ("pool 2d", ["residual"], "epilogue"),
        ("pool 3d", ["residual"], None),
        ("pool 3d, time too", ["residual"], None),
    ],
    ids=str,
)
def test_compiled_and_checkpointed_equal_eager(
    kind: str, more: list[str], implementation: str | None
) -> None:
    tensors = case(kind, more, dtype=torch.float32)
    function = partial(run, kind, implementation=implementation)
    torch.compiler.reset()  # every case is a program of its own
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def rerun(leaves: Tensors) -> Tensor:
        y: Tensor = checkpoint(function, leaves, use_reentrant=False)
        return y

    expected = gradients(function, tensors)
    for other in (compiled, rerun):
        got = gradients(other, tensors)
        # PyTorch's own convolution sums its bias's gradient in another order when compiled.
        rounding = {"projection_bias": 1e-6 * expected["y"].numel() ** 0.5}
        for name, value in expected.items():
            atol = rounding.get(name, 0.0)
            torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def test_two_runs_are_bit_equal_and_read_nothing_unwritten(kind: str) -> None:
    """The second finds NaN in all memory that it allocates."""
    tensors = case(
        kind, [*(NORM if follows_norm(kind) else []), *terms_of(kind)], dtype=torch.float32
    )
    first = gradients(partial(run, kind), tensors)
    # cuBLAS, in x_l's gradients, needs no CUBLAS_WORKSPACE_CONFIG for it: PyTorch gives a stream a
    # workspace of its own, and 2.11 asks for that variable no more (pytorch#161749).
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        second = gradients(partial(run, kind), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(second[name], value) for name, value in first.items())


@dataclass(frozen=True)
class Kept:
    """Bytes of distinct storages."""

    x: int
    rest: int


def kept(kind: str, tensors: Tensors, then: Callable[[Tensor], object] = lambda y: y) -> Kept:
    """What a call keeps for its backward pass, besides weights, and what is made of its result."""
    storages: dict[int, int] = {}
    alive = []

    def pack(v: Tensor) -> Tensor:
        storages[v.untyped_storage()._cdata] = v.untyped_storage().nbytes()
        alive.append(v)  # so that no storage takes another's place
        return v

    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    with saved_tensors_hooks(pack, lambda v: v):
        then(run(kind, leaves))
    own = {leaves[k].untyped_storage()._cdata for k in ("weight", "spatial") if k in leaves}
    x = storages.pop(leaves["x"].untyped_storage()._cdata, 0)
    return Kept(x, sum(size for key, size in storages.items() if key not in own))


@pytest.mark.parametrize(
    ("kind", "videos"), [("conv 3x3", 0), ("conv 1x1", 0), ("upsample", 0), ("separable", 1)]
)
def test_a_convolution_after_a_norm_keeps_x_alone(kind: str, videos: int) -> None:
    """The separable one keeps what lies between its halves too; the residual is not kept."""
    more = NORM if kind == "upsample" else [*NORM, *TERMS]
    tensors = case(kind, more, dtype=torch.float32)
    # Channels last, as videos are here: else x would be copied.
    tensors["x"] = tensors["x"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    got = kept(kind, tensors)
    assert got.x == tensors["x"].nbytes
    small = 2 * T * IN * 4 + 2 * B * IN * 4 + tensors["weight"].nbytes * 2
    small += sum(tensors[k].nbytes for k in ("low", "low_weight") if k in tensors)
    assert got.rest - videos * B * T * OUT * H * W * 4 <= small
    with kernels.use("reference"):
        assert kept(kind, tensors).rest > got.rest + tensors["x"].nbytes


@pytest.mark.parametrize("more", [[], ["residual"]], ids=str)
@pytest.mark.parametrize("kind", ["relu 3x3", "relu 3x3x3"])
@pytest.mark.parametrize("form", ["epilogue", "pytorch"])
def test_a_relu_keeps_what_comes_next_keeps(
    kind: str, more: list[str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, y, and no third video."""
    monkeypatch.setitem(globals(), "run", partial(run, implementation=form))
    tensors = case(kind, more, dtype=torch.float32)
    tensors["x"] = tensors["x"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weight = torch.randn(OUT, 3, 3, OUT, device=DEVICE)
    got = kept(
        kind, tensors, lambda y: kernels.conv2d(y, weight.requires_grad_(), implementation=form)
    )
    assert got == Kept(tensors["x"].nbytes, B * T * OUT * H * W * 4 + weight.nbytes)


@pytest.mark.parametrize("kind", ["conv 3x3", "relu 3x3"])
def test_a_residual_alone_may_want_a_gradient(kind: str) -> None:
    tensors = case(kind, [*NORM, *TERMS])
    residual = tensors["residual"].requires_grad_()
    y = run(kind, tensors)
    for graph in (False, True):
        [dresidual] = torch.autograd.grad(y.square().sum(), residual, create_graph=graph)
        torch.testing.assert_close(dresidual, 2 * y)
        y = run(kind, tensors)
    tensors = case(kind, [*NORM, *SHORTCUT])
    bias = tensors["projection_bias"].requires_grad_()
    y = run(kind, tensors)
    [dbias] = torch.autograd.grad(y.square().sum(), bias)
    torch.testing.assert_close(dbias, 2 * y.sum((0, 1, 3, 4)))


@pytest.mark.parametrize("implementation", ["pytorch", "epilogue"])
@pytest.mark.parametrize("more", [[*NORM, *TERMS], [*NORM, *SHORTCUT, *LOW]], ids=str)
def test_a_graph_alone_has_the_same_gradients_and_costs_nothing(
    more: list[str], implementation: str
) -> None:
    """But for the shortcut's projection, where that is PyTorch's own convolution."""
    tensors = case("conv 3x3", more, dtype=torch.float32)

    def function(leaves: Tensors, only_graph: bool) -> Tensor:
        x = kernels.Normalized(leaves["x"], leaves["gain"], leaves["shift"], wants_moments=True)
        residual: Any = leaves.get("residual")
        if "shortcut" in leaves:
            residual = kernels.UpsampledShortcut(*(leaves[k] for k in SHORTCUT))
        y = kernels.conv2d(
            x,
            leaves["weight"],
            leaves["bias"],
            residual_BTOHW=residual,
            skip=kernels.LowSkip(*(leaves[k] for k in LOW)),
            only_graph=only_graph,
            implementation=implementation,
        )
        return y.video

    expected = gradients(partial(function, only_graph=False), tensors)
    got = gradients(partial(function, only_graph=True), tensors)
    assert got.pop("y").shape == expected.pop("y").shape
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        function(leaves, only_graph=True)
    projection = 2 * B * T * H * W // 4 * IN * OUT
    its_own = projection if "shortcut" in more and implementation == "pytorch" else 0
    assert counter.get_total_flops() == its_own
