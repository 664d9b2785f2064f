"""The parts of a call: each is recorded when it ends, however it ends.

A part that raises is recorded as failed and the next one runs. A part that takes the process with
it, or the GPU's context, after which no kernel runs any more, is found recorded as begun: the call
is started again and goes on behind it. So the file says of every part what became of it.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from benchmarks.results import Made, Record, made_here
from engine.durable_files import write_json

Status = Literal["begun", "done", "failed", "left out"]
"""A part has begun where its process did not come to its end."""
LONGEST = 2000
"""Of an error that many last characters are kept."""
START_AGAIN = 75
"""The exit code of a process whose GPU context is lost while parts are left."""


class Part(NamedTuple):
    """Something that is found out by itself."""

    name: str
    run: Callable[[], Any]  # gives what JSON can hold


class Outcome(Record):
    """What became of a part."""

    name: str
    status: Status
    seconds: Annotated[float, Field(ge=0)] | None = None
    value: Any = None
    error: str | None = None  # the exception's last lines, or why it was left out


class CallFile(Made):
    """The file of a call."""

    call: str
    small: bool  # of a few channels and samples: to see that it runs, not to measure
    parts: list[Outcome]


class Recorder:
    """Keeps a call's file up to date. `budget`: start no part after so many seconds.

    What the file says already, of this commit and machine, it goes on with.
    """

    def __init__(self, path: Path, call: str, *, small: bool, budget: float | None = None) -> None:
        self._path, self._budget = path, budget
        self._started = time.monotonic()
        self._file = CallFile(**made_here(), call=call, small=small, parts=[])
        self.outcomes: dict[str, Outcome] = {}
        """By the part's name."""
        if path.exists():
            found = CallFile.model_validate_json(path.read_text())
            if found == self._file.model_copy(update={"parts": found.parts, "date": found.date}):
                self._file = found
                self.outcomes = {outcome.name: outcome for outcome in found.parts}

    def run(self, parts: Iterable[Part]) -> int:
        """All that are not recorded yet; the process's exit code."""
        for part in parts:
            if part.name in self.outcomes:
                continue
            if self._budget is not None and time.monotonic() - self._started > self._budget:
                self.record(part.name, "left out", error="the time was up")
                continue
            self.record(part.name, "begun")
            began, value, error = time.monotonic(), None, None
            try:
                value = part.run()
                json.dumps(value, allow_nan=False)
            except Exception as raised:  # whatever it is, the next part is another one
                value, error = None, "".join(traceback.format_exception(raised)[-2:]).strip()
            seconds = round(time.monotonic() - began, 3)
            gc.collect()  # tensors that the exception's frames held
            status: Status = "done" if error is None else "failed"
            self.record(part.name, status, seconds=seconds, value=value, error=error)
            if not context_is_whole():
                return START_AGAIN
        return 0

    def record(self, name: str, status: Status, **found: Any) -> None:
        """In place of what was known of the part; written before it returns.

        `found` are an `Outcome`'s other fields. It is also said in a short line for whoever
        watches, since only the end of a log may come back.
        """
        if found.get("error"):
            found["error"] = found["error"][-LONGEST:]
        outcome = self.outcomes[name] = Outcome(name=name, status=status, **found)
        file = self._file.model_copy(update={"parts": list(self.outcomes.values())})
        write_json(self._path, file.model_dump(mode="json"))
        if status != "begun":
            said = json.dumps(outcome.value) if status == "done" else str(outcome.error)
            *_, last = said.splitlines() or [""]
            took = "" if outcome.seconds is None else f" {outcome.seconds:.1f} s"
            print(f"{status}{took}: {name}: {last[:160]}", flush=True)


def context_is_whole() -> bool:
    """Whether kernels still run: after an illegal access none does, for as long as the process."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
