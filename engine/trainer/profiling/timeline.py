"""Seconds and memory of a profiled step by place, out of torch.profiler's trace.

A trace is the Chrome format's dict: events with a thread, a begin and a duration in microseconds.
On a CPU the main thread's time is charged, every moment to the innermost range or node of
autograd's graph at that moment. On a GPU the device's time is: every kernel to the place from
which the host launched it, and a moment without one (`IDLE`) to the place where the host was. Both
add up to the step, or to the window of it, whatever is in the trace. Where kernels overlap, the one
that began first is charged until it ends.

A node of the graph belongs to the range in which it was made: the profiler gives forward operator
and node the same number.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from engine.trainer.profiling.places import (
    BACKWARD,
    FORWARD,
    IDLE,
    NO_OPERATOR,
    OTHER,
    RECOMPUTED,
    STEP,
    Place,
    Range,
    kind_of,
)

_NODE = "autograd::engine::evaluate_function: "
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # c10::DeviceType


class Interval(NamedTuple):
    """A span of time, in microseconds."""

    start: float
    end: float


@dataclass
class Peak:
    """The most memory that was allocated at once of what the trace saw allocated."""

    num_bytes: int = 0
    by_part: dict[str, int] = field(default_factory=dict)
    """By the part that allocated it."""


def times(trace: dict[str, Any], device_type: str) -> dict[Place, float]:
    """Seconds in all steps, or windows of steps, of the trace; `device_type` is cpu or cuda.

    Raises ValueError for a trace without any.
    """
    host = _Host(trace)
    seconds: dict[Place, float] = defaultdict(float)
    device = _device_events(trace, host) if device_type == "cuda" else []
    for step in host.steps:
        spent = host.main.spread(step) if device_type == "cpu" else _device_time(step, device, host)
        for place, microseconds in spent:
            seconds[place] += microseconds / 1e6
    return dict(seconds)


def peak(trace: dict[str, Any], device_type: str) -> Peak:
    """The peak of the device's memory, from the profiler's record of every allocation."""
    host, found = _Host(trace), Peak()
    live: dict[int, tuple[int, str]] = {}
    by_part: dict[str, int] = defaultdict(int)
    total = 0
    events = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    for event in sorted(events, key=lambda e: float(e["ts"])):
        args = event["args"]
        if args["Device Type"] != _DEVICE_TYPES[device_type]:
            continue
        if args["Bytes"] > 0:
            num_bytes, part = args["Bytes"], host.at(event["tid"], float(event["ts"])).part
            live[args["Addr"]] = num_bytes, part
        elif args["Addr"] in live:
            num_bytes, part = live.pop(args["Addr"])
            num_bytes = -num_bytes
        else:  # allocated before the profile began
            continue
        total += num_bytes
        by_part[part] += num_bytes
        if total > found.num_bytes:
            found = Peak(total, {name: value for name, value in by_part.items() if value})
    return found


@dataclass(frozen=True)
class _Open:
    """An event of the host's that has begun, with all that stands around it."""

    end: float
    place: Place
    in_node: bool


class _Line:
    """Where one thread was at any time."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._places: list[Place | None] = []

    def note(self, time: float, place: Place | None) -> None:
        """From `time` on; times never decrease."""
        if self._places and self._places[-1] == place:
            return
        self._starts.append(time)
        self._places.append(place)

    def at(self, time: float) -> Place | None:
        """None outside every step."""
        position = bisect_right(self._starts, time)
        return self._places[position - 1] if position else None

    def spread(self, within: Interval) -> Iterator[tuple[Place, float]]:
        """The places within an interval and how long each lasted; together the interval."""
        position = bisect_right(self._starts, within.start)
        start = within.start
        while start < within.end:
            following = self._starts[position] if position < len(self._starts) else within.end
            end = min(following, within.end)
            place = self._places[position - 1] if position else None
            yield place or Place(), end - start
            start, position = end, position + 1


class _Host:
    """All threads, read from the trace in time's order; the main one first."""

    def __init__(self, trace: dict[str, Any]) -> None:
        kept = {"user_annotation", "cpu_op"}
        by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for event in trace["traceEvents"]:
            if event.get("ph") == "X" and event.get("cat") in kept:
                by_thread[event["tid"]].append(event)
        begun = Range(update=STEP).label
        of_steps = [
            (tid, event) for tid, events in by_thread.items() for event in events
            if event["name"] == begun
        ]  # fmt: skip
        if not of_steps:
            raise ValueError("the trace has no whole training step")
        self._main_thread = of_steps[0][0]
        self.steps = sorted(_interval(event) for _, event in of_steps)
        self._makers: dict[int, str] = {}  # a node's number → the part that made it
        self.main = self._read(by_thread.pop(self._main_thread), is_main=True)
        self._others = {tid: self._read(events, is_main=False) for tid, events in by_thread.items()}

    def at(self, tid: Any, time: float) -> Place:
        """Where a thread was; one that does nothing of its own works for the main one."""
        line = self.main if tid == self._main_thread else self._others.get(tid, self.main)
        return line.at(time) or self.main.at(time) or Place()

    def _read(self, events: Sequence[dict[str, Any]], *, is_main: bool) -> _Line:
        line, stack = _Line(), list[_Open]()

        def close(until: float) -> None:
            while stack and stack[-1].end <= until:
                ended = stack.pop()
                line.note(ended.end, stack[-1].place if stack else None)

        for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            start, end = _interval(event)
            close(start)
            if not stack and event["name"] != Range(update=STEP).label:
                around = None if is_main else self.main.at(start)
                if around is None:
                    continue  # before or after the steps
                outer = _Open(end, around, False)
            else:
                outer = stack[-1] if stack else _Open(end, Place(), False)
            # Times are rounded: what is inside must not seem to end later.
            end = min(end, outer.end)
            stack.append(self._opened(event, end, outer, is_main=is_main))
            line.note(start, stack[-1].place)
        close(float("inf"))
        return line

    def _opened(self, event: dict[str, Any], end: float, outer: _Open, *, is_main: bool) -> _Open:
        name, place = event["name"], outer.place
        number = event.get("args", {}).get("Sequence number")
        if event["cat"] == "user_annotation":
            entered = Range.of(name)
            if entered is None:
                return replace(outer, end=end)
            return _Open(end, Place(
                entered.update or place.update,
                entered.part or place.part,
                RECOMPUTED if outer.in_node else FORWARD,
            ), outer.in_node)  # fmt: skip
        if name.startswith(_NODE):
            part = self._makers.get(number, place.part)
            return _Open(end, Place(place.update, part, BACKWARD, OTHER), True)
        if is_main and not outer.in_node and number is not None:
            # Until a node is made, every operator carries the number that it is going to have.
            self._makers[number] = place.part
        kind = kind_of(name)
        if kind is None:
            kind = OTHER if place.kind == NO_OPERATOR else place.kind
        return _Open(end, place._replace(kind=kind), outer.in_node)


class _Work(NamedTuple):
    """Something that the device did, and where it was launched."""

    start: float
    end: float
    place: Place


def _device_events(trace: dict[str, Any], host: _Host) -> list[_Work]:
    launched: dict[int, Place] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {}):
            place = host.at(event["tid"], float(event["ts"]))
            launched[event["args"]["correlation"]] = place
    work = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE:
            place = launched.get(event["args"].get("correlation"), Place())
            if place.kind == NO_OPERATOR:  # launched by Python itself, as Triton's are
                place = place._replace(kind=OTHER)
            work.append(_Work(*_interval(event), place))
    return sorted(work)


def _device_time(
    step: Interval, work: Sequence[_Work], host: _Host
) -> Iterator[tuple[Place, float]]:
    """The step's time: what the device did, and in between what the host was at."""
    reached = step.start
    for start, end, place in work:
        start, end = max(start, reached), min(end, step.end)
        if end <= start:
            continue
        yield from _idle(Interval(reached, start), host)
        yield place, end - start
        reached = end
    yield from _idle(Interval(reached, step.end), host)


def _idle(gap: Interval, host: _Host) -> Iterator[tuple[Place, float]]:
    for place, microseconds in host.main.spread(gap):
        yield place._replace(kind=IDLE), microseconds


def _interval(event: dict[str, Any]) -> Interval:
    start = float(event["ts"])
    return Interval(start, start + float(event["dur"]))
