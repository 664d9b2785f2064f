"""Traces of several windows as one file, which Perfetto opens."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import profile

from engine.errors import UserError

_FLOW = {"s", "t", "f"}  # an arrow's begin, middle and end in the Chrome format
_NUM_FLOW_IDS = 2**32


def exported(profiler: profile, file: Path) -> dict[str, Any]:
    """The trace of a profiler that has ended, for `file`; once only.

    Raises UserError where there is no room for it.
    """
    with tempfile.TemporaryDirectory() as aside:
        whole = Path(aside) / "trace.json"
        profiler.export_chrome_trace(str(whole))  # what fails there is only logged
        try:
            trace: dict[str, Any] = json.loads(whole.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            where = tempfile.gettempdir()
            raise UserError(f"cannot write {file}: it is cut short; is {where} full?") from None
    return trace


class TraceFile:
    """Gets the events of one trace after the other, so that they never are in memory together.

    Traces of one process share their clock, their threads and the numbers of autograd's nodes. Only
    the arrows are numbered from 1 in each.
    """

    def __init__(self, file: Path) -> None:
        """For use in `with`. Raises OSError where there is no room."""
        self._text = gzip.open(file, "wt", encoding="utf-8")  # noqa: SIM115 — closed on exit
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self._num_traces = 0
        self._said: set[str] = set()

    def __enter__(self) -> "TraceFile":
        self._text.write("{")
        self._text.flush()  # a disk that refuses does so before anything is exported
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._text:
            if kind is None:
                self._text.write("\n]}\n")

    def add(self, trace: dict[str, Any]) -> None:
        """Another trace of the same process."""
        if self._num_traces == 0:
            about = {k: v for k, v in trace.items() if k not in ("traceEvents", "traceName")}
            self._text.write(self._encode(about)[1:-1] + ',"traceEvents":[')
            separator = "\n"
        else:
            separator = ",\n"
        for event in trace["traceEvents"]:
            if event["ph"] in _FLOW:
                event = event | {"id": event["id"] + self._num_traces * _NUM_FLOW_IDS}
            if event["ph"] == "M":  # a thread's name and the like, which every trace has
                fact = self._encode(event | {"ts": 0})
                if fact in self._said:
                    continue
                self._said.add(fact)
            self._text.write(separator + self._encode(event))
            separator = ",\n"
        self._num_traces += 1
