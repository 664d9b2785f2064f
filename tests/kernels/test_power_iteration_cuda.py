"""The CUDA C++ power iteration, its own code run on the CPU (tests/kernels/cuda_on_cpu)."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels.spectral_norm.power_iteration_tables import addresses, cut

HERE = Path(__file__).parent / "cuda_on_cpu"
CSRC = Path(__file__).parents[2] / "csrc"

# (R, K): tiles are 128 x 256 and 16 x 2048, and a row of K = 4n values is read in fours.
SHAPES = [
    (1, 1),
    (5, 3),
    (1, 70),
    (300, 1),
    (128, 256),
    (127, 255),
    (129, 257),
    (17, 2049),
    (16, 2052),
    (1040, 8),
]

Iterate = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]


@pytest.fixture(scope="module")
def iterate(tmp_path_factory: pytest.TempPathFactory) -> Iterate:
    """One iteration by the CUDA code; σ."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "power_iteration.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    source = HERE / "power_iteration.cpp"
    # The stand-in for CUDA's header is found before a real one.
    command = [compiler, *flags, f"-I{HERE}", f"-I{CSRC}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    run = ctypes.CDLL(str(library)).power_iteration

    def call(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
        shapes = tuple((weight.shape[0], weight[0].numel()) for weight in weights)
        work = cut(shapes, torch.device("cpu"))
        tables = [addresses(weights, us, vs), *work[:4]]
        counts = [len(weights), *(len(work) for work in tables[2:])]
        workspace = torch.full((work.workspace_values,), torch.nan)
        sigma_L = torch.full((len(weights),), torch.nan)
        num_launches = run(
            (ctypes.c_void_p * 5)(*(table.data_ptr() for table in tables)),
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_void_p(sigma_L.data_ptr()),
            (ctypes.c_uint32 * 4)(*counts),
        )
        assert num_launches == 4
        return sigma_L

    return call


def draw(shapes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, u, and v full of NaN, which an iteration overwrites unread."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]
    us = [torch.nn.functional.normalize(torch.randn(R), dim=0) for R, _ in shapes]
    return weights, us, [torch.full((K,), torch.nan) for _, K in shapes]


def test_against_fp64_and_bit_equal(iterate: Iterate) -> None:
    weights, us, vs = draw(SHAPES)
    again_us, again_vs = [u.clone() for u in us], [v.clone() for v in vs]
    exact_us, exact_vs = [u.double() for u in us], [v.double() for v in vs]
    doubles = [weight.double() for weight in weights]
    exact = kernels.power_iteration_(doubles, exact_us, exact_vs, implementation="reference")
    sigma = iterate(weights, us, vs)
    assert torch.equal(sigma, iterate(weights, again_us, again_vs))
    for shape, *pairs in zip(
        SHAPES,
        zip(us, exact_us, strict=True),
        zip(vs, exact_vs, strict=True),
        zip(sigma, exact, strict=True),
        strict=True,
    ):
        # Unit vectors through two sums of at most R and K terms: √n roundings of 2⁻²⁴, eightfold.
        allowed = 8 * (shape[0] + shape[1]) ** 0.5 * 2**-24
        for got, true in pairs:
            assert (got - true).abs().max() <= allowed * max(1, true.abs().max()), shape
    assert all(torch.equal(a, b) for a, b in zip(us + vs, again_us + again_vs, strict=True))


def test_a_weight_off_the_alignment_gives_the_same(iterate: Iterate) -> None:
    """A slice of a flat buffer, as ZeRO's parameters are."""
    weights, us, vs = draw([(130, 260)])
    buffer = torch.empty(130 * 260 + 1)
    buffer[1:] = weights[0].flatten()
    moved = buffer[1:].view(130, 260)
    assert moved.data_ptr() % 16 == 4
    moved_us, moved_vs = [us[0].clone()], [vs[0].clone()]
    iterate(weights, us, vs)
    iterate([moved], moved_us, moved_vs)
    assert torch.equal(us[0], moved_us[0])
    assert torch.equal(vs[0], moved_vs[0])


def test_nan_and_zero(iterate: Iterate) -> None:
    """NaN is not dropped by a maximum; of a zero matrix the vectors become zero, not NaN."""
    weights, us, vs = draw([(20, 30), (20, 30)])
    weights[0][3, 4] = torch.nan
    weights[1].zero_()
    sigma = iterate(weights, us, vs)
    assert sigma[0].isnan()
    assert us[0].isnan().all()
    assert vs[0].isnan().all()
    assert sigma[1] == 0
    assert us[1].eq(0).all()
    assert vs[1].eq(0).all()
