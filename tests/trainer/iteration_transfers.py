"""What one iteration copies to the device and reads from it, as JSON, on the meta device.

The tiny configuration, trained by the engine's own trainer on its own loader: video files, decoded
by PyAV. DeepSpeed's start-up needs a process of its own.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from small_runs import write_tiny

from benchmarks.trainers import stage_builder
from engine.configuration import Config
from engine.rehearsal import stand_ins
from engine.rehearsal.stand_ins import MetaAccelerator, ShapesOnly, fake_job
from engine.trainer.ranks import Ranks
from engine.transfers import to_device
from engine.video.dataset import open_dataset
from engine.video.index import VideoIndex

ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
WATCHING = (__file__, stand_ins.__file__)
NUM_BEFORE = 2  # DeepSpeed's timers start after two updates


class Transfers(ShapesOnly):
    """Counts what a GPU's host would wait for: numbers read, and copies from pageable memory.

    And DeepSpeed's own waiting.

    What has a size that depends on values, as `nonzero`, raises on the meta device.
    """

    def __init__(self) -> None:
        super().__init__(small_copies=True)
        self.reads: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.pinned: Counter[str] = Counter()
        self.synchronized: Counter[str] = Counter()
        MetaAccelerator.synchronize = self._synchronize

    def _synchronize(self, device_index: Any = None) -> None:
        self.synchronized[_place()] += 1

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().note(func, args, kwargs)
        if func is ATEN._local_scalar_dense.default and args[0].is_meta:
            self.reads[_place()] += 1
        elif func in COPIES:
            copied, to = args[0], kwargs.get("device")
            if func is ATEN.copy_.default:
                copied, to = args[1], args[0].device
            there = copied.is_meta if to is None else torch.device(to).type == "meta"
            if copied.is_meta and not there:
                self.reads[_place()] += 1
            elif there and not copied.is_meta:
                # `to_device` pins where it is told of a GPU, which tests/test_transfers.py checks.
                kind = self.pinned if _within(to_device.__code__) else self.pageable
                kind[_place()] += 1


def _within(code: CodeType) -> bool:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _place() -> str:
    """The innermost line outside of PyTorch, of `ShapesOnly` and of this file."""
    frame = sys._getframe()
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename in WATCHING:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def main() -> None:
    tiny = write_tiny(Path(sys.argv[1]))
    index = open_dataset(tiny.config().data, make=True, say=lambda line: None)
    with fake_job(1) as ranks:
        found = []
        for stage in (1, 2):
            for count in (1, 3):
                batch = "training.micro_batch=2", f"training.global_batch={2 * count}"
                config = tiny.config("data.decoder=pyav", "training.adam=torch", *batch)
                case = transfers_of(config, stage, ranks, index)
                found.append({"stage": stage, "micro_batches": count} | case)
    print("transfers:", json.dumps(found))


def transfers_of(config: Config, number: int, ranks: Ranks, index: VideoIndex) -> dict[str, Any]:
    """Of an iteration after some others."""
    with ShapesOnly(small_copies=True):
        builder = stage_builder(config, number, ranks)
        loader = builder.loader(index)
        trainer = builder.trainer(loader)
        for _ in range(NUM_BEFORE):
            trainer.train_step()
    with Transfers() as transfers:
        trainer.train_step()
    loader.close()
    return {
        "reads": transfers.reads,
        "pageable": transfers.pageable,
        "pinned": transfers.pinned,
        "synchronized": transfers.synchronized,
    }


if __name__ == "__main__":
    main()
