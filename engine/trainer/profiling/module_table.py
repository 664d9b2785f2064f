"""The profile's table: what a training step spends, by update, by part and by kind of work.

Every row counts what its part does itself, without the parts inside it, so the rows of each table
add up to the step that was measured. Work that belongs to no part is in the row `rest`.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.trainer.profiling.counts import CountedWork
from engine.trainer.profiling.places import BACKWARD, FORWARD, RECOMPUTED, REST, Place
from engine.trainer.profiling.timeline import Peak

NOTES = """\
- Time: {clock}, mean of {num_steps} profiled steps; a row is what the part does itself, without \
the parts inside it, and all rows together are the step.
- TFLOP: two per multiply-add of the convolutions and matrix products that were executed, counted \
in another step.
- GB: every operator's inputs and outputs once, counted in the same step as the FLOPs: what \
operators move at least, whatever caches do.
- HFU: TFLOP / (time · matmul rate); {rate:.4g} TFLOP/s in {dtype}, measured after the profile.
- MB at peak: allocated by the part {during}, and alive when most was.
"""
SCALED = """\
- Of {total} micro-batches {looked_at} were looked at, and the tables are scaled to all: the \
first, the second and the last of a D update and of the G update, where the second stands for all \
between. Multiplied, times and counts alike: {weights}.
"""
CLOCKS = {
    "cpu": "the main thread's",
    "cuda": "the device's; a moment in which it does nothing counts for the part the host was in",
}


@dataclass(frozen=True)
class Entry:
    """The cost of one place in one step."""

    place: Place
    seconds: float
    flops: int
    num_bytes: int


@dataclass(frozen=True)
class StepCosts:
    """One training step of one rank, in full."""

    device_type: str
    entries: list[Entry]
    num_steps: int
    """How many were profiled; of their times these are the means."""
    weights: dict[str, int]
    """`Place.update` → by how much its entries have been multiplied, where that is not 1."""
    num_micro_batches: int
    num_looked_at: int
    """Micro-batches of each profiled step."""
    plain_step_seconds: float
    """Of a step before, without the profiler: what profiling adds is the difference."""
    matmul_flop_per_s: float
    matmul_dtype: str
    peak: Peak

    @staticmethod
    def of(
        seconds: dict[Place, float],
        counted: dict[Place, CountedWork],
        *,
        weights: dict[str, int],
        num_steps: int,
        **others: Any,
    ) -> "StepCosts":
        """Join what was timed in all steps and counted in one, in the order in which things happen.

        Both are of what was looked at, and are scaled here.
        """
        entries = []
        for place in dict.fromkeys([*seconds, *counted]):
            weight, counts = weights.get(place.update, 1), counted.get(place, CountedWork())
            entries.append(
                Entry(
                    place,
                    seconds.get(place, 0.0) * weight / num_steps,
                    counts.flops * weight,
                    counts.num_bytes * weight,
                )
            )
        entries.sort(key=lambda entry: entry.place.part == REST)
        return StepCosts(entries=entries, weights=weights, num_steps=num_steps, **others)

    @property
    def step_seconds(self) -> float:
        """Mean of the profiled steps."""
        return sum(entry.seconds for entry in self.entries)

    def grouped(self, key: Callable[[Place], str]) -> dict[str, list[Entry]]:
        """The entries by some property of their places."""
        groups: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            groups[key(entry.place)].append(entry)
        return groups

    def hfu(self, entries: list[Entry]) -> float | None:
        """Executed FLOPs over what a matmul does in that time; None for those without FLOPs."""
        flops, seconds = sum(e.flops for e in entries), sum(e.seconds for e in entries)
        return flops / (seconds * self.matmul_flop_per_s) if flops and seconds else None

    def document(self) -> dict[str, Any]:
        """For modules.json: times in seconds, bytes, FLOPs."""
        return {
            "device": self.device_type,
            "step_seconds": self.step_seconds,
            "num_steps": self.num_steps,
            "num_micro_batches": self.num_micro_batches,
            "num_looked_at": self.num_looked_at,
            "weights": self.weights,
            "plain_step_seconds": self.plain_step_seconds,
            "matmul_flop_per_s": self.matmul_flop_per_s,
            "matmul_dtype": self.matmul_dtype,
            "peak_bytes": self.peak.num_bytes,
            "peak_bytes_by_part": self.peak.by_part,
            "entries": [
                {
                    **entry.place._asdict(),
                    "seconds": entry.seconds,
                    "flops": entry.flops,
                    "bytes": entry.num_bytes,
                }
                for entry in self.entries
            ],
        }

    def markdown(self, title: str) -> str:
        """For people."""
        total = sum(entry.flops for entry in self.entries) / 1e12
        notes = NOTES.format(
            clock=CLOCKS[self.device_type],
            num_steps=self.num_steps,
            rate=self.matmul_flop_per_s / 1e12,
            dtype=self.matmul_dtype,
            during="while micro-batches were looked at"
            if self.weights
            else "during the profiled steps",
        )
        if self.weights:
            notes += SCALED.format(
                total=self.num_micro_batches,
                looked_at=self.num_looked_at,
                weights=", ".join(f"{update} by {n}" for update, n in self.weights.items()),
            )
        parts = self.grouped(lambda place: place.part)
        lines = [
            f"# {title}",
            "",
            f"Step {self.step_seconds * 1e3:.4g} ms under the profiler, "
            f"{self.plain_step_seconds * 1e3:.4g} ms without it; {total:.4g} TFLOP, HFU "
            f"{_percent(self.hfu(self.entries))}; {self.peak.num_bytes / 1e6:.4g} MB allocated at "
            "the peak.",
            "",
            notes,
            *self._table("part", self.grouped(lambda place: _network(place.part))),
            *self._table("update", self.grouped(lambda place: place.update)),
            *self._table("kind", self.grouped(lambda place: place.kind)),
            *self._table("module or part", parts, self.peak.by_part),
        ]
        return "\n".join(lines)

    def _table(
        self, name: str, groups: dict[str, list[Entry]], by_part: dict[str, int] | None = None
    ) -> list[str]:
        directions = [FORWARD, BACKWARD]
        if any(entry.place.direction == RECOMPUTED for entry in self.entries):
            directions.insert(1, RECOMPUTED)
        header = [name, *(f"{d} ms" for d in directions), "share", "TFLOP", "GB", "HFU"]
        header += [] if by_part is None else ["MB at peak"]
        rows = []
        for group, entries in [*groups.items(), ("total", self.entries)]:
            cells = [group]
            for direction in directions:
                seconds = sum(e.seconds for e in entries if e.place.direction == direction)
                cells.append(f"{seconds * 1e3:.2f}")
            cells.append(_percent(sum(e.seconds for e in entries) / self.step_seconds))
            cells.append(f"{sum(e.flops for e in entries) / 1e12:.4g}")
            cells.append(f"{sum(e.num_bytes for e in entries) / 1e9:.4g}")
            cells.append(_percent(self.hfu(entries)))
            if by_part is not None:
                num_bytes = self.peak.num_bytes if group == "total" else by_part.get(group, 0)
                cells.append(f"{num_bytes / 1e6:.4g}")
            rows.append(cells)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _network(part: str) -> str:
    """All of G's modules together, and all of D's."""
    return part.partition(".")[0]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
