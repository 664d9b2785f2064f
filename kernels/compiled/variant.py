"""One kernel as it is launched, to be compiled for a GPU that is not there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHANNEL_TILES = (
    *(("bf16", num_channels, True) for num_channels in (128, 64, 32)),
    *(("fp32", num_channels, True) for num_channels in (128, 64, 32, 16)),
    ("fp32", 32, False),
    ("fp32", 8, False),
)
"""What the widths of configs/*.yaml are cut into, for the `variants()` of kernels that have tiles
of channels: dtype, a tile's channels, and whether the width is a multiple of 16. The configurations
stand above kernels, so this list is held by a test; wider fp32 and narrower bf16 come on top."""


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: the types of its arguments, its constants, its options."""

    kernel: Any
    label: str
    """What tells it from the kernel's other variants."""
    types: dict[str, str]
    """Triton's type of each argument that is no constant: "*bf16", "i32", "fp32"."""
    constants: Mapping[str, int | bool | None]
    options: dict[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()
    """Integers that are multiples of 16 in this variant, as all pointers are."""
    multiplies_matrices: bool = False

    @property
    def name(self) -> str:
        """Its key in the table."""
        module = self.kernel.__module__.removeprefix("kernels.").removesuffix("triton")
        return f"{module.rstrip('._')}.{self.kernel.__name__} {self.label}"

    def compile(self, arch: str) -> Any:
        """Triton's compiled kernel for "sm_80", "sm_90" or "sm_100"."""
        import triton

        return triton.compile(self.source(), target=self.target(arch), options=self.options)

    def source(self) -> Any:
        """The kernel, the types and the constants as Triton's compiler takes them."""
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        unknown = (self.types.keys() | self.constants.keys()) ^ set(names)
        if unknown:
            raise ValueError(f"{self.name}: arguments do not match the kernel's: {sorted(unknown)}")
        aligned = [
            i
            for i, name in enumerate(names)
            if self.types.get(name, "").startswith("*") or name in self.divisible
        ]
        return ASTSource(
            fn=self.kernel,
            signature={name: self.types.get(name, "constexpr") for name in names},
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )

    def target(self, arch: str) -> Any:
        """An architecture as Triton's compiler takes it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
