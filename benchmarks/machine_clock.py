"""Time on a machine whose speed changes while it is taken: in seconds at the machine's median speed.

A virtual machine's neighbours make the same training take up to twice as long for some seconds or minutes. What runs is
therefore stopped every other second, and a yardstick, which is a training too, is timed in its place; each second of
what runs then counts by how fast the yardstick was right before and after it.
"""

import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.synchronize import Barrier

RUNS_S = 1.5


@dataclass(frozen=True)
class Stop:
    """What ran was stopped for this long, in seconds since 1970, and the yardstick took so many seconds then."""

    begin: float
    end: float
    yardstick: float


class MachineClock:
    """Seconds of what ran between stops.

    Args:
        stops: in their order; at least one.
        usual: what the yardstick takes at the speed at which a second counts as one.
    """

    def __init__(self, stops: Sequence[Stop], usual: float) -> None:
        begins = [-math.inf, *(stop.end for stop in stops)]
        ends = [*(stop.begin for stop in stops), math.inf]
        # Before the first stop and after the last one, the speed is theirs.
        yardsticks = [stops[0].yardstick, *(stop.yardstick for stop in stops), stops[-1].yardstick]
        speeds = [2 * usual / (before + after) for before, after in pairwise(yardsticks)]
        self._runs = list(zip(begins, ends, speeds, strict=True))

    def between(self, begin: float, end: float) -> float:
        """Seconds that count, of those from one time to another, both in seconds since 1970."""
        return sum(speed * max(0.0, min(end, stopped) - max(begin, resumed)) for resumed, stopped, speed in self._runs)


class Yardstick:
    """A piece of work that as many warm processes do at once as what runs has.

    Args:
        processes: how many.
        prepare: what each does first.
        work: what is timed.
    """

    def __init__(self, processes: int, prepare: Callable[[], None], work: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = processes
        self._work = work
        self._executor = ProcessPoolExecutor(processes, context, _prepare, (prepare, context.Barrier(processes)))
        self.seconds()
        self._own = _processes()

    def seconds(self) -> float:
        """What the work takes now, the mean of the processes."""
        return statistics.mean(self._executor.map(_timed, [self._work] * self.processes))

    def other_processes(self) -> frozenset[int]:
        """Those that this one has started by `multiprocessing`."""
        return _processes() - self._own

    def close(self) -> None:
        """Ends its processes."""
        self._executor.shutdown()

    def watch(self, running: Callable[[], bool], family: Callable[[], Iterable[int]]) -> list[Stop]:
        """Stops what runs every other second, as long as it runs.

        Args:
            running: whether it does.
            family: its processes as they are at that time.
        """
        stops: list[Stop] = []
        while running():
            begin = time.time()
            stopped: set[int] = set()
            try:
                _stop(family, stopped)
                took = self.seconds()
            finally:
                _signal(stopped, signal.SIGCONT)
            stops.append(Stop(begin, time.time(), took))
            resumed = time.time()
            while running() and time.time() < resumed + RUNS_S:
                time.sleep(0.02)
        return stops


def _processes() -> frozenset[int]:
    return frozenset(process.pid for process in multiprocessing.active_children() if process.pid is not None)


def _stop(family: Callable[[], Iterable[int]], stopped: set[int]) -> None:
    """Until all processes stand still, those too that were started meanwhile; notes which ones it stops."""
    while new := set(family()) - stopped:
        stopped |= new
        _signal(new, signal.SIGSTOP)


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


# Of a process of the yardstick.
_together: list[Barrier] = []


def _prepare(prepare: Callable[[], None], together: Barrier) -> None:
    _together.append(together)
    prepare()


def _timed(work: Callable[[], None]) -> float:
    _together[0].wait()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
