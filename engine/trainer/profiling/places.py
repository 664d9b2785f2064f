"""The places that a profile has rows for: an update, a part of the step, and a kind of work.

`named_parts` puts ranges around the parts of a training step, from outside and only as long as a
step is looked at: the updates, the networks down to their blocks, loader, draws, optimizers. A
part's row counts what it does itself, without the parts inside it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from engine.models.blocks import (
    DiscriminatorBlock,
    GeneratorBlock2D,
    GeneratorBlock3D,
    RecurrentBlock,
)
from engine.trainer import step
from engine.trainer.step import Trainer

BLOCKS = (DiscriminatorBlock, GeneratorBlock2D, GeneratorBlock3D, RecurrentBlock)

STEP, D_UPDATE, G_UPDATE = "step", "D update", "G update"
REST = "rest"
FORWARD, RECOMPUTED, BACKWARD = "forward", "recomputed", "backward"
CONVOLUTION, PRODUCT, NORM = "convolution", "matrix product", "norm"
SPECTRAL_NORM, COMMUNICATION = "spectral norm", "communication"
OTHER = "elementwise and other"
NO_OPERATOR = "Python, between operators"
IDLE = "device idle"


class Place(NamedTuple):
    """Where something is charged."""

    update: str = STEP
    """`D_UPDATE`, `G_UPDATE`, or `STEP` outside both; windows.py has finer ones."""
    part: str = REST
    direction: str = FORWARD
    kind: str = NO_OPERATOR


class Range(NamedTuple):
    """A named piece of the step: of which exactly one of the two changes inside it."""

    update: str | None = None
    part: str | None = None

    @property
    def label(self) -> str:
        """Its name in a trace."""
        return f"update: {self.update}" if self.part is None else f"part: {self.part}"

    @staticmethod
    def of(label: str) -> "Range | None":
        """The range of that label; None for anybody else's."""
        which, _, name = label.partition(": ")
        if which not in ("update", "part"):
            return None
        return Range(update=name) if which == "update" else Range(part=name)


_KINDS = {
    CONVOLUTION: ("aten::conv", "aten::_conv", "aten::cudnn_conv", "aten::mkldnn_conv",
                  "aten::slow_conv", "aten::_slow_conv", "aten::thnn_conv", "sswgan::conv"),
    PRODUCT: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul",
              "aten::linear", "aten::einsum", "aten::mv", "aten::addmv"),
    NORM: ("sswgan::frame_",),
    SPECTRAL_NORM: ("sswgan::power_iteration", "sswgan::spectral_"),
    COMMUNICATION: ("c10d::", "gloo:", "nccl:", "record_param_comms"),
}  # fmt: skip


def kind_of(operator: str) -> str | None:
    """The kind of an operator's work, by its name; None where the name does not tell (`OTHER`)."""
    for kind, beginnings in _KINDS.items():
        if operator.startswith(beginnings):
            return kind
    return None


@contextlib.contextmanager
def inside(
    owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """Inside `with`, what `owner` has by that name is called between `before` and `after`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before()
        try:
            return function(*args, **kwargs)
        finally:
            after()

    is_own = name in vars(owner)
    setattr(owner, name, called)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def named_parts(
    trainer: Trainer, enter: Callable[[Range], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Inside `with`, the trainer's steps call `enter` and `leave` around every part.

    Also when a checkpointed block is computed again in the backward pass. Changes nothing that a
    step computes, and nothing is left of it afterwards.
    """

    def around(owner: Any, name: str, entered: Range) -> None:
        undo.enter_context(inside(owner, name, functools.partial(enter, entered), leave))

    with contextlib.ExitStack() as undo:
        around(trainer, "train_step", Range(update=STEP))
        around(trainer, "d_step", Range(update=D_UPDATE))
        around(trainer, "g_step", Range(update=G_UPDATE))
        around(trainer._reals, "next", Range(part="loader"))
        around(trainer._fakes, "draw", Range(part="latents and frozen stages"))
        around(step, "renew_spectral_norm", Range(part="power iteration"))
        if trainer.average is not None:
            around(trainer.average, "update", Range(part="weight average"))
        for network, engine in (("G", trainer.g_engine), ("D", trainer.d_engine)):
            around(engine, "backward", Range(part=f"{network} gradients"))
            around(engine, "step", Range(part=f"{network} optimizer"))
            for name, module in _rows(engine.module).items():
                entered = Range(part=f"{network}.{name}" if name else network)
                # First and last of all hooks: those that gather partitioned weights are inside.
                before = functools.partial(_entering, enter, entered)
                after = functools.partial(_leaving, leave)
                undo.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                undo.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def _entering(enter: Callable[[Range], None], entered: Range, *_: Any) -> None:
    enter(entered)


def _leaving(leave: Callable[[], None], *_: Any) -> None:
    leave()


def _rows(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks and everything around them, by their paths."""
    modules = dict(network.named_modules())
    blocks = [name.split(".") for name, module in modules.items() if isinstance(module, BLOCKS)]
    paths = {".".join(path[:depth]) for path in blocks for depth in range(len(path) + 1)}
    return {name: module for name, module in modules.items() if name in paths}
