"""Whole training iterations for the parts of a call: one setup in one build at a time."""

from benchmarks.first_hour.scale import Scale
from benchmarks.setups import BUILDS, SETUPS, Setup
from benchmarks.whole_step import Iterations, free_memory
from engine.trainer.ranks import Ranks

DEFAULT_SETUPS = ("stage1", "stage2_generated")
"""The paper's two stages as it trains them."""


class CurrentIterations:
    """The networks of a setup in a build; asking for others lets go of them.

    In a job of one rank, which is connected for as long as the process is.
    """

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._ranks = Ranks(rank=0, world_size=1, local_rank=0, device=scale.device)
        self._ranks.connect()
        self._key: tuple[str, str] | None = None
        self._iterations: Iterations | None = None

    def of(self, setup: str, build: str) -> Iterations:
        """As they were left, or initialised."""
        key = setup, build
        if self._key != key or self._iterations is None:
            self.close()
            chosen = self.setup(setup)
            overrides = self._scale.overrides(chosen.number)
            made = Iterations(chosen, BUILDS[build], self._ranks, overrides)
            made.accelerate()
            self._key, self._iterations = key, made
        return self._iterations

    def setup(self, name: str) -> Setup:
        """At the scale."""
        setup = SETUPS[name]
        return setup._replace(samples=self._scale.samples[0])

    def close(self) -> None:
        """Free their memory."""
        if self._iterations is not None:
            self._iterations.close()
        self._key = self._iterations = None
        if self._scale.device.type == "cuda":
            free_memory()
