"""Work on many files in several processes, where any one file may crash the process it is in."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

# Results come in the items' order within a pool, give or take what each worker holds.
_IN_FLIGHT_PER_WORKER = 4
# A future takes a kilobyte or two: half a million of them would be a gigabyte.
_FILES_QUEUED = 4096
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_all(
    work: Callable[[_Item], _Result],
    items: Mapping[str, _Item],
    num_workers: int,
    start: Callable[[], None] | None = None,
) -> Generator[tuple[str, _Result | None], None, None]:
    """Each item's name and what `work` returns for it, as it comes; None if it ends its process.

    `num_workers` processes work, each after it has called `start`, which is a module's function as
    `work` is; 0 works in this process. Raises what `work` raises, and works on nothing more then.
    """
    if num_workers == 0:
        yield from ((name, work(item)) for name, item in items.items())
        return
    left = list(items)
    while left:
        done = set()
        for name, result in _in_processes(work, items, left, num_workers, start):
            done.add(name)
            yield name, result
        # A file crashed a library, and its process with it. It is among the first that are left.
        left = [name for name in left if name not in done]
        num_suspects = _IN_FLIGHT_PER_WORKER * num_workers
        for name in left[:num_suspects]:
            yield next(_in_processes(work, items, [name], 1, start), (name, None))
        left = left[num_suspects:]


def _in_processes(
    work: Callable[[_Item], _Result],
    items: Mapping[str, _Item],
    names: list[str],
    num_workers: int,
    start: Callable[[], None] | None,
) -> Iterator[tuple[str, _Result]]:
    """Results as they come; fewer than `names` when a worker died."""
    # Spawned, because the caller may hold threads and CUDA, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(start,))
    try:
        for first in range(0, len(names), _FILES_QUEUED):
            queued = names[first : first + _FILES_QUEUED]
            futures = {pool.submit(work, items[name]): name for name in queued}
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    yield futures[future], future.result()
    except BrokenProcessPool:
        return  # a pool that is broken takes no more
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if start is not None:
        start()


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
