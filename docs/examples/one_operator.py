"""One operator by itself: nearest-neighbour 2x upsampling and the 3x3 convolution after it.

Shows which implementation runs here and why, that it computes the reference's function with the
reference's gradients, and how its time compares. Needs no GPU and no data:

    python docs/examples/one_operator.py
"""

import time

import torch
from torch import Tensor

import kernels


def run(x_BTIHW: Tensor, weight_OhwI: Tensor, implementation: str) -> tuple[float, list[Tensor]]:
    """Milliseconds of a forward and backward pass, the second of two; y and both gradients."""
    for _ in range(2):
        began = time.perf_counter()
        y_BTOHW = kernels.upsample_conv(x_BTIHW, weight_OhwI, implementation=implementation)
        gradients = torch.autograd.grad(y_BTOHW.square().mean(), (x_BTIHW, weight_OhwI))
        milliseconds = 1000 * (time.perf_counter() - began)
    return milliseconds, [y_BTOHW.detach(), *gradients]


if __name__ == "__main__":
    torch.manual_seed(0)
    x_BTIHW = torch.randn(2, 6, 64, 16, 16).requires_grad_()
    weight_OhwI = torch.randn(32, 3, 3, 64).requires_grad_()  # input channels last
    print(kernels.implementations("cpu")["upsample_conv"])
    ours_ms, ours = run(x_BTIHW, weight_OhwI, "auto")
    reference_ms, reference = run(x_BTIHW, weight_OhwI, "reference")
    for name, a, b in zip(("y", "dx", "dweight"), ours, reference, strict=True):
        print(f"{name}: {list(a.shape)}, relative difference {(a - b).norm() / b.norm():.0e}")
    print(f"{ours_ms:.1f} ms, reference {reference_ms:.1f} ms")
