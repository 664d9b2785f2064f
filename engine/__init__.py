"""SSW-GAN: stage-wise training of video GANs, with DVD-GAN as its baseline."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.pretrained import Cascade

__all__ = ["Cascade"]


def __getattr__(name: str) -> Any:
    """`Cascade`, imported when it is asked for: the package's modules do not wait for it."""
    if name == "Cascade":
        from engine.pretrained import Cascade

        return Cascade
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
