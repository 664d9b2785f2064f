"""Small tensors reach the device as they are, and nobody waits for them."""

import weakref
from typing import ClassVar

import pytest
import torch

from engine.transfers import HeldUntilRead, to_device


def test_values_are_kept() -> None:
    values = torch.arange(6).view(2, 3).T
    assert to_device(values, torch.device("cpu")).equal(values)
    assert to_device(values, torch.device("meta")).shape == values.shape


def test_what_has_gaps_is_closed_before_it_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch copies it together in pageable memory otherwise, and the host waits."""
    pinned: list[torch.Tensor] = []

    def pin(values: torch.Tensor) -> torch.Tensor:
        pinned.append(values)
        return values

    asked: list[tuple[torch.device, bool]] = []

    def to(values: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        assert values is pinned[-1]
        asked.append((device, non_blocking))
        return values

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    device = torch.device("cuda", 0)
    values = torch.arange(12).view(3, 4)[:, :2]
    there = to_device(values, device)
    assert there.is_contiguous()
    assert there.equal(values)
    assert asked == [(device, True)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for() -> None:
    values, device = torch.arange(6), torch.device("cuda", 0)
    to_device(values, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = to_device(values, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.cpu().equal(values)


class FakeEvent:
    """Passes when told to."""

    passed: ClassVar[list["FakeEvent"]] = []
    waited: ClassVar[list["FakeEvent"]] = []
    clips: ClassVar[list[weakref.ref]] = []
    held_meanwhile: ClassVar[list[list[bool]]] = []

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self in self.passed

    def synchronize(self) -> None:
        self.waited.append(self)
        self.held_meanwhile.append([ref() is not None for ref in self.clips])


class OnAGpu:
    device = torch.device("cuda", 0)


def test_what_a_gpu_still_reads_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[FakeEvent] = []

    def event() -> FakeEvent:
        events.append(FakeEvent())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(FakeEvent, "passed", [])
    monkeypatch.setattr(FakeEvent, "waited", [])
    held = HeldUntilRead(most=3)
    held.add(torch.zeros(2))  # on the CPU nothing is pending
    assert len(held) == 0
    clips = [OnAGpu() for _ in range(6)]
    gone = [weakref.ref(each) for each in clips]
    monkeypatch.setattr(FakeEvent, "clips", gone)
    monkeypatch.setattr(FakeEvent, "held_meanwhile", [])
    while clips:
        held.add(clips.pop(0))  # type: ignore[arg-type]
        if len(events) == 3:
            assert [ref() is None for ref in gone[:3]] == [False] * 3
            FakeEvent.passed += events[:2]
    # The first two went when they were read; the host waited for none.
    assert len(held) == 3
    assert [ref() is None for ref in gone] == [True, True, True, False, False, False]
    # One more than three are pending: the host waits for the oldest.
    assert FakeEvent.waited == [events[2]]
    # And holds it until then.
    assert FakeEvent.held_meanwhile == [[False, False, True, True, True, True]]
