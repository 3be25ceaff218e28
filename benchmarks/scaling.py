"""A search's time and money on N GPUs: a model from measured parts, checked on 1 and 2 workers, then carried on.

    python benchmarks/scaling.py [--parts FILE] [--json FILE] [--gpus N ...] [--epoch-seconds S ...] [--price P]

The model plays a search through, event by event: the real searcher and scheduler, so that pruning is theirs, on
recorded learning curves of the digits study (`benchmarks/curves`), N trials at once. An epoch takes a given time. Its
report waits for the driver, which takes one after the other, and the trial waits for it, as in Tune. A trial that ends
gives its GPU to the next one after what a start takes, and what the sampler takes, which grows with the trials, is
timed while the model plays. MLflow's writer sends what has come in, one request a trial, one
after the other, and waits a second before each round; how far it lags behind is told. All these times are measured:
by `throughput.py` (--parts), and an epoch of the check by the trainings themselves.

1. Check: the digits study without its confirm phase, one and two trials at once, from when all actors have reported
   until the last outcome, beside the model with what an epoch takes by itself in as many processes
   (`bare_training.py`); by a clock that follows the machine's speed (`machine_clock.py`).
2. For each length of an epoch (not measured: give your own) and each number of GPUs, a search of --trials-per-gpu × N
   trials of 18 epochs: its wall time, how much of the GPUs' time is training, what they cost at --price, how busy the
   driver and the tracking store are, how late MLflow is, and the first thing at its limit: a part that is busy 80 % of
   the time. "tail" is none: GPUs without a trial at the end take more than a fifth.

The keys of the JSON file: check (workers, predicted_s, measured_s, predicted_over_measured), sizes (epoch_seconds,
gpus, trials, hours, used, price, driver_busy, store_busy, mlflow_lag_s, first_limit).
"""

import argparse
import heapq
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

from hintsearch.search.epoch_reports import REPORT_SECONDS
from hintsearch.search.mlflow_logger import GATHER_SECONDS
from hintsearch.search.study import validate_study
from recorded_curves import DIGITS, Recording, read_recording
from rich.console import Console
from rich.table import Table
from search_overhead import digits_yardstick, one_round
from simulated_search import MEMORY, Running, SimulatedSearch
from throughput import SERVER

PARTS = Path(__file__).parent.parent / "docs" / "results" / "throughput.json"
BUSY = 0.8


@dataclass(frozen=True)
class Parts:
    """What is measured, in seconds.

    Attributes:
        start: of an actor between two trials.
        report: of the driver, for a message, however many epochs it has.
        trial: of the driver, for all else of a trial: its start, its end, what is journaled and logged of its epochs.
        request: of the tracking store, for a trial's epochs of a moment.
        run: of the tracking store, for a trial's run.
    """

    start: float
    report: float
    trial: float
    request: float
    run: float


@dataclass(frozen=True)
class Course:
    """How a search goes, in seconds.

    Attributes:
        wall: from the first trial's start to the last one's end.
        up: when each worker had reported.
        trained: of all workers together, in training.
        idle: of workers for which no trial was left to begin, all together.
        driver: that it was busy.
        store: that it was busy.
        lag: the longest time from a report to the store.
        trials: of it.
    """

    wall: float
    up: float
    trained: float
    idle: float
    driver: float
    store: float
    lag: float
    trials: int


@dataclass(frozen=True)
class Checked:
    """Model and measurement from when all workers were up, in seconds."""

    workers: int
    predicted_s: float
    measured_s: float

    @property
    def predicted_over_measured(self) -> float:
        """1 would be a model without error."""
        return self.predicted_s / self.measured_s


@dataclass(frozen=True)
class Size:
    """A search on so many GPUs.

    Attributes:
        epoch_seconds: of a trial on its GPU.
        gpus: with one trial each.
        trials: of the search, controls included.
        hours: wall time.
        used: share of the GPUs' time that is training.
        price: of all GPUs for that long.
        driver_busy: share of the time.
        store_busy: share of the time.
        mlflow_lag_s: longest time from a report to the store, in seconds.
        first_limit: what is at its limit.
    """

    epoch_seconds: float
    gpus: int
    trials: int
    hours: float
    used: float
    price: float
    driver_busy: float
    store_busy: float
    mlflow_lag_s: float
    first_limit: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=PARTS, help="figures of throughput.py [default: docs/results]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="[default: 8 64 512]")
    parser.add_argument(
        "--epoch-seconds", type=float, nargs="+", default=[0.1, 1, 10, 600], help="[default: 0.1 1 10 600]"
    )
    parser.add_argument("--trials-per-gpu", type=int, default=2, help="search trials [default: 2]")
    parser.add_argument("--price", type=float, default=3.0, help="of a GPU and hour [default: 3]")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of the check [default: 1 2]")
    options = parser.parse_args()
    parts = parts_of(options.parts)
    recording = read_recording(DIGITS)
    checks = [checked(recording, parts, workers) for workers in options.workers]
    sizes = []
    for seconds in options.epoch_seconds:
        for gpus in options.gpus:
            sizes.append(sized(recording, parts, seconds, gpus, options.trials_per_gpu, options.price))
            print(sizes[-1], file=sys.stderr)
    figures = {
        "parts": asdict(parts),
        "check": [{**asdict(one), "predicted_over_measured": one.predicted_over_measured} for one in checks],
        "sizes": [asdict(size) for size in sizes],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }
    show(parts, checks, sizes, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def parts_of(file: Path) -> Parts:
    """What `throughput.py` has measured; of the driver with the fewest actors, which disturb it least."""
    measured = json.loads(file.read_text())
    driver = min(measured["driver"], key=lambda one: one["actors"])
    (store,) = (
        one
        for one in measured["stores"]
        if one["store"] == SERVER and one["writers"] == 1 and one["epochs_per_request"] == 1
    )
    return Parts(
        driver["start_s"], driver["report_cpu_s"], driver["trial_cpu_s"], 1 / store["requests_per_s"], store["trial_s"]
    )


def checked(recording: Recording, parts: Parts, workers: int) -> Checked:
    """A real search beside the model of it."""
    keys = [f"resources.concurrent_trials={workers}", "confirm.seeds=0"]
    with tempfile.TemporaryDirectory() as folder, digits_yardstick(workers) as yardstick:
        os.environ["HINTSEARCH_CACHE"] = str(Path(folder) / "cache")
        found = one_round(Path(folder), "check", keys, yardstick)
    course = played(recording, parts, found.bare / found.epochs, workers, recording.study["budget"]["trials"])
    check = Checked(workers, course.wall - course.up, found.wall / workers)
    print(f"checked on {workers}: model over measured {check.predicted_over_measured:.2f}", file=sys.stderr)
    return check


def sized(recording: Recording, parts: Parts, epoch: float, gpus: int, per_gpu: int, price: float) -> Size:
    """The model of a search on many GPUs."""
    course = played(recording, parts, epoch, gpus, gpus * per_gpu)
    busy = {"driver": course.driver / course.wall, "tracking store": course.store / course.wall}
    limit, most = max(busy.items(), key=lambda item: item[1])
    if most < BUSY:
        limit = "tail" if course.idle > (1 - BUSY) * course.wall * gpus else "none"
    return Size(
        epoch,
        gpus,
        course.trials,
        course.wall / 3600,
        course.trained / (course.wall * gpus),
        price * gpus * course.wall / 3600,
        busy["driver"],
        busy["tracking store"],
        course.lag,
        limit,
    )


def played(recording: Recording, parts: Parts, epoch: float, workers: int, trials: int) -> Course:
    """Plays a search of so many search trials."""
    budget = {**recording.study["budget"], "trials": trials, "failures": trials}
    study = validate_study({**recording.study, "budget": budget, "confirm": {"seeds": 0}}, "played")
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        return Player(SimulatedSearch(study, recording, Path(folder)), parts, epoch, workers).play()


class Player:
    """Plays a search in time.

    Args:
        search: what decides.
        parts: what each step takes.
        epoch: seconds of a trial's epoch.
        workers: trials at once.
    """

    def __init__(self, search: SimulatedSearch, parts: Parts, epoch: float, workers: int) -> None:
        self._search, self._parts, self._epoch = search, parts, epoch
        self._rungs = search.study.budget.rungs
        self._due = [(0.0, worker) for worker in range(workers)]
        self._running: dict[int, Running] = {}
        self._reported: dict[int, float] = {}
        self._driver_free = self._driver_busy = self._trained = 0.0
        self._writes: list[tuple[float, str, bool]] = []
        self._trials = 0
        # When each worker found no trial to begin.
        self._ended: list[float] = []

    def play(self) -> Course:
        """To the end."""
        wall = 0.0
        while self._due:
            time, worker = heapq.heappop(self._due)
            running = self._running.get(worker)
            if running is not None:
                wall = max(wall, self._report(time, worker, running))
            else:
                self._start(time, worker)
        store, lag = logged(self._writes, self._parts)
        up = max(self._reported.values())
        idle = sum(wall - ended for ended in self._ended)
        return Course(wall, up, self._trained, idle, self._driver_busy, store, lag, self._trials)

    def _start(self, time: float, worker: int) -> None:
        """The next trial, if there is one."""
        began = perf_counter()
        started = self._search.start()
        sampling = perf_counter() - began
        if started is None:
            self._ended.append(time)
            return
        self._running[worker] = started
        self._trials += 1
        begun = self._driven(time, self._parts.trial + sampling)
        self._writes.append((begun, started.trial.trial_id, True))
        self._train(max(begun, time + self._parts.start), worker, started)

    def _train(self, time: float, worker: int, running: Running) -> None:
        """Until the next report."""
        seconds = self._epochs(running) * self._epoch
        self._trained += seconds
        heapq.heappush(self._due, (time + seconds, worker))

    def _epochs(self, running: Running) -> int:
        """Of the next report: as many as a second has, and none beyond a rung."""
        rung = next(rung for rung in self._rungs if rung > running.epoch)
        return min(rung - running.epoch, math.ceil(REPORT_SECONDS / self._epoch))

    def _report(self, time: float, worker: int, running: Running) -> float:
        """What comes of a report; when the driver has taken it."""
        taken = self._driven(time, self._parts.report)
        self._reported.setdefault(worker, taken)
        self._writes.append((taken, running.trial.trial_id, False))
        if all(self._search.train_epoch(running) for _ in range(self._epochs(running))):
            self._train(taken, worker, running)
        else:
            del self._running[worker]
            heapq.heappush(self._due, (taken, worker))
        return taken

    def _driven(self, time: float, seconds: float) -> float:
        """When the driver is done with something that comes now."""
        self._driver_free = max(time, self._driver_free) + seconds
        self._driver_busy += seconds
        return self._driver_free


def logged(writes: Sequence[tuple[float, str, bool]], parts: Parts) -> tuple[float, float]:
    """What the store is busy with a search's writes, and the longest time that one waits.

    Args:
        writes: when, of which trial, and whether it is the trial's run.
        parts: what a write takes.
    """
    busy = lag = clock = 0.0
    done = 0
    while done < len(writes):
        clock = max(clock, writes[done][0]) + GATHER_SECONDS
        first, taken = writes[done][0], done
        while done < len(writes) and writes[done][0] <= clock:
            done += 1
        round_writes = writes[taken:done]
        runs = sum(run for _, _, run in round_writes)
        requests = len({trial for _, trial, run in round_writes if not run})
        spent = runs * parts.run + requests * parts.request
        busy, clock = busy + spent, clock + spent
        lag = max(lag, clock - first)
    return busy, lag


def show(parts: Parts, checks: Sequence[Checked], sizes: Sequence[Size], figures: dict[str, Any]) -> None:
    """Prints the parts and two tables."""
    print(
        f"start of a trial {parts.start:.2f} s; driver {1e3 * parts.report:.1f} ms a report, "
        f"{1e3 * parts.trial:.1f} ms a trial; tracking store {1e3 * parts.request:.1f} ms a request, "
        f"{1e3 * parts.run:.0f} ms a run"
    )
    table = Table(title="Check: the digits study once all workers are up")
    for column in ("workers", "model, s", "measured, s", "model/measured"):
        table.add_column(column, justify="right")
    for one in checks:
        seconds = (f"{one.predicted_s:.1f}", f"{one.measured_s:.1f}")
        table.add_row(str(one.workers), *seconds, f"{one.predicted_over_measured:.2f}")
    Console(width=140).print(table)
    table = Table(title="Searches of 18 epochs a trial")
    headings = ("epoch, s", "GPUs", "trials", "hours", "used", "price", "driver busy", "store busy", "MLflow late, s")
    for column in (*headings, "at its limit"):
        table.add_column(column, justify="right")
    for size in sizes:
        table.add_row(
            f"{size.epoch_seconds:g}",
            *(str(size.gpus), str(size.trials), f"{size.hours:.2f}", f"{size.used:.0%}", f"{size.price:.0f}"),
            *(f"{size.driver_busy:.0%}", f"{size.store_busy:.0%}", f"{size.mlflow_lag_s:.1f}", size.first_limit),
        )
    Console(width=140).print(table)
    print(f"{figures['machine']}, {figures['date']}")


if __name__ == "__main__":
    main()
