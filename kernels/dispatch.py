"""Which of its implementations an operator runs.

Every operator names its implementations, best first, each with the reason why it cannot run on
a given device and dtype. A choice is made in this order:

1. the `implementation=` argument of the operator's public function: a name, "reference" or "auto";
2. the process's setting, "auto" or "reference": `kernels.use(...)` or `kernels.set_default(...)`,
   at first the environment variable `KERNELS`;
3. automatically ("auto"): the first that can run and is worth running there.

What is asked for by name and cannot run raises; only "auto" looks further. "reference" is every
operator's composition of differentiable PyTorch operators: its definition, in code.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

REFERENCE = "reference"
AUTO = "auto"
SETTINGS = (AUTO, REFERENCE)

_TRITON_INSTALLED = find_spec("triton") is not None
_setting = os.environ.get("KERNELS", AUTO)
_meta_as = torch.device("meta")
_operators: dict[str, "Operator"] = {}


class ImplementationError(RuntimeError):
    """An implementation was asked for by name that cannot run here."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    name: str
    unsupported: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run on a device and dtype; None where it can."""
    not_preferred: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    """Why "auto" passes it over although it can run; None where it does not."""


@dataclass(frozen=True)
class Choice:
    """What an operator runs, and why."""

    implementation: str
    reason: str


class Operator:
    """An operator's implementations, best first; the reference is always the last of them."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self._implementations = (
            *implementations,
            Implementation(REFERENCE, lambda device, dtype: None),
        )
        self._choices: dict[tuple[str, str, torch.dtype], str] = {}
        _operators[name] = self

    def choose(self, implementation: str | None, device: torch.device, dtype: torch.dtype) -> str:
        """The one to run for an `implementation=` argument (None: the process's setting).

        Raises ImplementationError when what was asked for cannot run, ValueError when the
        environment's setting is no setting.
        """
        # Every call of an operator comes here, and looking for a reason takes a CPU 10 µs. The
        # answer depends on the key and on what does not change while a process runs.
        if torch.compiler.is_compiling():  # costs nothing there, and what is kept would be guarded
            return self._chosen(implementation, device, dtype)[0]
        asked = _setting if implementation is None else implementation
        key = asked, (_meta_as if device.type == "meta" else device).type, dtype
        if key not in self._choices:
            self._choices[key] = self._chosen(implementation, device, dtype)[0]
        return self._choices[key]

    def explain(
        self, implementation: str | None, device: torch.device, dtype: torch.dtype
    ) -> Choice:
        """As `choose`, with the reason."""
        name, passed_over = self._chosen(implementation, device, dtype)
        if (_setting if implementation is None else implementation) != AUTO:
            return Choice(name, "asked for")
        reasons = [f"not {implementation}: {reason}" for implementation, reason in passed_over]
        return Choice(name, "; ".join(reasons) or "the best there is")

    def _chosen(
        self, implementation: str | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[str, list[tuple[str, str]]]:
        """Its name, and what "auto" passed over, with the reasons."""
        asked = _checked(_setting) if implementation is None else implementation
        device = _meta_as if device.type == "meta" else device
        if asked != AUTO:
            return self._named(asked, device, dtype), []
        passed_over = []
        for one in self._implementations:
            reason = one.unsupported(device, dtype) or one.not_preferred(device, dtype)
            if reason is None:
                break
            passed_over.append((one.name, reason))
        return one.name, passed_over

    def _named(self, asked: str, device: torch.device, dtype: torch.dtype) -> str:
        for one in self._implementations:
            if one.name == asked:
                reason = one.unsupported(device, dtype)
                if reason is not None:
                    raise ImplementationError(
                        f"kernels.{self.name} cannot run as {asked}: {reason}"
                    )
                return asked
        known = ", ".join(one.name for one in self._implementations)
        raise ImplementationError(
            f"kernels.{self.name} has no implementation {asked!r}, only {known}"
        )


def implementations(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Choice]:
    """What each operator runs on `device` (None: CUDA where there is one) for `dtype`, and why."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        name: operator.explain(None, device, dtype) for name, operator in sorted(_operators.items())
    }


def chosen(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which of its implementations an operator runs if it is called without `implementation=`."""
    return _operators[operator].choose(None, device, dtype)


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Within this context, operators called without `implementation=` run this: "auto" or
    "reference".

    In the whole process, all its threads. A backward pass runs what its forward pass ran,
    wherever it is called.
    """
    global _setting
    before, _setting = _setting, _checked(implementation)
    try:
        yield
    finally:
        _setting = before


@contextmanager
def meta_as(device: torch.device | str) -> Iterator[None]:
    """Within this context, operators on meta tensors run what they run on `device`.

    In the whole process. For planning: what a step on that device allocates, counted without one.
    """
    global _meta_as
    before, _meta_as = _meta_as, torch.device(device)
    try:
        yield
    finally:
        _meta_as = before


def set_default(implementation: str) -> None:
    """From now on, operators called without `implementation=` run this (`use` without an end)."""
    global _setting
    _setting = _checked(implementation)


def everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """No reason: for an implementation that runs on every device, in every dtype."""
    return None


def triton_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run; the interpreter (TRITON_INTERPRET=1) runs them on the CPU."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{_short(dtype)} is not among fp32, fp16 and bf16"
    if device.type == "cpu" and not interpreting():
        return "tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device.type not in ("cuda", "cpu", "meta"):
        return f"tensors are on {device.type}, not on CUDA"
    return None


def triton_not_preferred(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why "auto" does not run Triton where it can."""
    return None if device.type == "cuda" else f"tensors are on {device.type}, not on CUDA"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter; set before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked(setting: str) -> str:
    if setting not in SETTINGS:
        raise ValueError(f"kernels can be set to {' or '.join(SETTINGS)}, not to {setting!r}")
    return setting


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
