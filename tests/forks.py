"""Jobs of several ranks without a launcher: forks of a process that has imported what they need."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from small_runs import REPOSITORY, Finished, environment, free_port


class Forks:
    """The process that starts them, tests/trainer/forked_jobs.py; it is started on first use.

    For tests of what ranks do. Those of launchers, and of what a process says of its own start,
    start real ones.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._answers = -1

    def script(
        self, num_ranks: int, script: str | Path, *arguments: str | Path, **more: object
    ) -> Finished:
        """So many times `python SCRIPT ARGUMENTS`; `script` is below the repository.

        `more` environment variables are set.
        """
        words = [str(REPOSITORY / script), *map(str, arguments)]
        return self.job("script", words, ranks_of(num_ranks, **more))

    def alone(self, script: str | Path, *arguments: str | Path) -> Finished:
        """`python SCRIPT ARGUMENTS`, once and of no job."""
        return self.job("script", [str(REPOSITORY / script), *map(str, arguments)], [{}])

    def job(
        self,
        function: str,
        arguments: list[Any],
        ranks: list[dict[str, str]],
        *,
        seconds: float = 240,
    ) -> Finished:
        """Call a function of forked_jobs.py in every rank, with these environment variables each.

        The code is that of the first rank that failed.
        """
        with self.running(function, arguments, ranks, seconds=seconds) as (_, ended):
            pass
        return ended[0]

    @contextmanager
    def running(
        self,
        function: str,
        arguments: list[Any],
        ranks: list[dict[str, str]],
        *,
        seconds: float = 240,
    ) -> Iterator[tuple[list[int], list[Finished]]]:
        """As `job`: the ranks' process numbers, and what they left behind, after the block."""
        ended: list[Finished] = []
        with TemporaryDirectory() as folder:
            console = Path(folder, "console")
            job = {"function": function, "arguments": arguments, "ranks": ranks}
            server = self._started()
            try:
                assert server.stdin is not None
                server.stdin.write(json.dumps(job | {"console": str(console)}).encode() + b"\n")
                yield self._answer(seconds), ended
                codes = self._answer(seconds)
            except BaseException:
                self.close()
                raise
            said = [console.with_suffix(suffix) for suffix in (".out", ".err")]
            out, err = (file.read_text() if file.exists() else "" for file in said)
            ended.append(Finished(next(filter(None, codes), 0), out, err))

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            os.close(self._answers)
            self._server = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            self._answers, written = os.pipe()
            # pytest-benchmark measures nothing where it believes to be a worker of pytest-xdist.
            given = {k: v for k, v in environment().items() if not k.startswith("PYTEST_XDIST")}
            program = str(REPOSITORY / "tests/trainer/forked_jobs.py")
            self._server = subprocess.Popen(
                [sys.executable, program, str(written)],
                bufsize=0,
                stdin=subprocess.PIPE,
                pass_fds=[written],
                env=given,
                start_new_session=True,  # a process group, to be killed as one
            )
            os.close(written)
        return self._server

    def _answer(self, seconds: float) -> list[int]:
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._answers], [], [], seconds)[0]:
                raise TimeoutError(f"forked ranks took more than {seconds} s")
            read = os.read(self._answers, 1)
            if not read:
                raise RuntimeError("the process that forks ranks has ended")
            line += read
        numbers: list[int] = json.loads(line)
        return numbers


def ranks_of(num_ranks: int, **more: object) -> list[dict[str, str]]:
    """The variables that a launcher on one node sets, for each rank; and more of them."""
    job = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **more}
    by_rank = [{"RANK": rank, "LOCAL_RANK": rank, **job} for rank in range(num_ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in by_rank]
