"""What a search costs beside the training of its trials: time, and memory that grows.

    python benchmarks/search_overhead.py [--json FILE] [--rounds N] [--trials N]

1. In each round, `hintsearch search digits`, then the trainings of its trials once more without it, as many at a time,
   in processes that are prepared and warm (`bare_training.py`). Compared are, from the moment when every actor has
   reported for the first time, the wall time × trials at once, and the sum of what the trainings took by themselves,
   both by a clock that follows the changing speed of the machine (`machine_clock.py`). The difference is split: actors
   without a trial while the last ones end, and the rest: starts of trials, reports, checkpoints, and processor time
   that the driver takes from the trainings.
2. The same study with a few hundred trials that train nothing, but report the first search's curves at once
   (`replayed_search.py`), with its journal, Tune, the sampler, the scheduler and MLflow as they are: wall time a trial
   once actors are up, and the private memory of driver and actors every 50 trials.

The keys of the JSON file:

- wall_over_bare: median of the rounds of 1; 1.10 or less is wanted.
- seconds_per_trial: wall time of 2 over its trials; 0.15 or less is wanted.
- memory_growth_mb: the larger of driver and largest actor, from the first 50 trials to the last.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from bare_training import BareTraining, bare_trainings, prepare_plain, train_plain
from hintsearch.search.study import load_study
from journal_times import JournalTimes, read_times
from machine_clock import MachineClock, Stop, Yardstick
from process_memory import Usage, below, usage
from rich.console import Console
from rich.table import Table

STUDY = "digits"
CONCURRENT = 2
EVERY = 50
ACTOR = "ray::ImplicitFunc"
OUTCOME = b'{"event": "outcome"'
WANTED = {"wall_over_bare": 1.10, "seconds_per_trial": 0.15}


@dataclass(frozen=True)
class Round:
    """One search beside its bare trainings, in seconds of an actor, from when all actors are up.

    Attributes:
        wall: of the search, times the number of trials at once.
        bare: what the trainings took by themselves.
        idle: of actors for which there was no trial to begin.
        rest: starts of trials, reports, checkpoints, and processor time that the driver took.
        trials: of the search.
        epochs: that were trained.
        yardstick: seconds that it took: the 10th, the 50th and the 90th of 100 times.
    """

    wall: float
    bare: float
    idle: float
    rest: float
    trials: int
    epochs: float
    yardstick: tuple[float, float, float]

    @property
    def wall_over_bare(self) -> float:
        """1 would be a search that costs nothing."""
        return self.wall / self.bare


@dataclass(frozen=True)
class Sample:
    """Memory and processor time after some trials.

    Attributes:
        trials: that have ended.
        driver: the search's own process.
        actors: those that run the trials.
    """

    trials: int
    driver: Usage
    actors: tuple[Usage, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=3, help="searches with bare trainings [default: 3]")
    parser.add_argument("--trials", type=int, default=500, help="that report at once [default: 500]")
    options = parser.parse_args()
    if options.trials < 2 * EVERY:
        parser.error(f"--trials is {options.trials}, but growth is seen from two samples on; give {2 * EVERY} or more")
    keys = [f"resources.concurrent_trials={CONCURRENT}"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HINTSEARCH_CACHE"] = str(folder / "cache")
        with digits_yardstick(CONCURRENT) as yardstick:
            rounds: list[Round] = []
            for number in range(options.rounds):
                rounds.append(one_round(folder, f"round-{number}", keys, yardstick))
                print(f"round {number + 1}: wall over bare {rounds[-1].wall_over_bare:.3f}", file=sys.stderr)
        simulated, samples = replay(folder, "replayed", journal_of(folder, "round-0"), options.trials, CONCURRENT)
    figures = {
        "wall_over_bare": statistics.median(one.wall_over_bare for one in rounds),
        **simulated,
        "memory_growth_mb": max(growth(samples, driver_mb), growth(samples, largest_actor_mb)),
        "rounds": [{**asdict(one), "wall_over_bare": one.wall_over_bare} for one in rounds],
        "memory": [asdict(sample) for sample in samples],
        "load_at_end": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }
    show(rounds, samples, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


@contextmanager
def digits_yardstick(processes: int) -> Iterator[Yardstick]:
    """One whose work is a training of the digits study's student."""
    yardstick = Yardstick(processes, partial(prepare_plain, load_study(STUDY)), train_plain)
    try:
        yield yardstick
    finally:
        yardstick.close()


def one_round(folder: Path, name: str, keys: Sequence[str], yardstick: Yardstick) -> Round:
    """One search of the digits study, and right after it its trainings by themselves.

    Args:
        folder: where it is called.
        name: of the search.
        keys: of the study, KEY=VALUE each; among them how many trials run at once.
        yardstick: of as many processes.
    """
    command = [sys.executable, "-m", "hintsearch", "search", STUDY, "--name", name]
    command += [word for key in keys for word in ("--set", key)]
    search = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    searched = yardstick.watch(lambda: search.poll() is None, lambda: [search.pid, *below(search.pid)])
    if search.returncode != 0:
        raise SystemExit(f"the search ended with exit code {search.returncode}")
    times = read_times(journal_of(folder, name))
    with ThreadPoolExecutor(1) as beside:
        bare = beside.submit(bare_trainings, load_study(STUDY, keys), times.history, yardstick.processes)
        alone = yardstick.watch(lambda: not bare.done(), yardstick.other_processes)
    return compared(times, bare.result(), searched, alone, yardstick.processes)


def compared(
    times: JournalTimes,
    bare: Mapping[int, BareTraining],
    searched: Sequence[Stop],
    alone: Sequence[Stop],
    concurrent: int,
) -> Round:
    """Takes a search's wall time apart.

    Args:
        times: of the search.
        bare: of its trainings by themselves.
        searched: when the search was stopped.
        alone: when the trainings were.
        concurrent: trials at once.
    """
    yardsticks = [stop.yardstick for stop in (*searched, *alone)]
    usual = statistics.median(yardsticks)
    search_clock, bare_clock = MachineClock(searched, usual), MachineClock(alone, usual)
    up, end = times.actors_up(concurrent), times.end
    trained = trained_epochs = 0.0
    for number, training in bare.items():
        before, epochs = times.begun[number], 0
        late = before >= up
        for together in times.together(number):
            reported, first, epochs = times.reports[number][together[-1]], epochs, together[-1]
            # Of epochs during which the last actor came up, the part after that.
            share = 1.0 if late else min(1.0, max(0.0, (reported - up) / (reported - before)))
            trained += share * bare_clock.between(training.ends[first], training.ends[epochs])
            trained_epochs += share * len(together)
            before = reported
        if late:
            # What came before the first epoch, and an epoch that failed.
            trained += bare_clock.between(training.begun, training.ends[0])
            trained += bare_clock.between(training.ends[epochs], training.ends[-1])
    wall = concurrent * search_clock.between(up, end)
    idle = sum(search_clock.between(ended, end) for ended in sorted(times.ended.values())[-concurrent:])
    tenth, *_, ninetieth = statistics.quantiles(yardsticks, n=10)
    rest = wall - trained - idle
    return Round(wall, trained, idle, rest, len(times.begun), trained_epochs, (tenth, usual, ninetieth))


def replay(
    folder: Path, name: str, curves: Path, trials: int, concurrent: int, *more: str
) -> tuple[dict[str, Any], list[Sample]]:
    """A search that trains nothing, watched from outside.

    Args:
        folder: where it is called.
        name: of the search.
        curves: journal of the search whose curves it reports.
        trials: of it.
        concurrent: of them at once.
        *more: arguments of `replayed_search.py`.
    """
    script = Path(__file__).parent / "replayed_search.py"
    sampler = folder / "sampler.json"
    command = [sys.executable, str(script), str(curves), "--trials", str(trials), "--name", name]
    command += ["--concurrent", str(concurrent), "--seconds", str(sampler), *more]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    samples = watched(process, journal_of(folder, name))
    if process.wait() != 0:
        raise SystemExit(f"the replayed search ended with exit code {process.returncode}")
    times = read_times(journal_of(folder, name))
    up = times.actors_up(concurrent)
    counted = sum(ended > up for ended in times.ended.values())
    used = samples[-1].driver.cpu_seconds - samples[0].driver.cpu_seconds
    figures = {
        "seconds_per_trial": (times.end - up) / counted,
        "reports_per_trial": statistics.mean(len(reports) for reports in times.reports.values()),
        # Reports at rungs' ends, and the last one.
        "messages_per_trial": statistics.mean(times.rungs(number) for number in times.reports),
        "sampler_seconds_per_trial": statistics.mean(json.loads(sampler.read_text())),
        "driver_cpu_seconds_per_trial": used / (samples[-1].trials - samples[0].trials),
    }
    return figures, samples


def watched(process: "subprocess.Popen[bytes]", journal: Path) -> list[Sample]:
    """A sample every so many trials, as long as the search runs them."""
    samples: list[Sample] = []
    while process.poll() is None:
        time.sleep(0.2)
        ended = journal.read_bytes().count(OUTCOME) if journal.exists() else 0
        if ended >= EVERY * (len(samples) + 1):
            try:
                actors = tuple(usage(actor) for actor in below(process.pid, ACTOR))
                samples.append(Sample(ended, usage(process.pid), actors))
            except OSError:
                # The search has ended in the meantime.
                break
    return samples


def journal_of(folder: Path, name: str) -> Path:
    """Of the search of that name."""
    return folder / "results" / name / "journal.jsonl"


def growth(samples: Sequence[Sample], megabytes: Callable[[Sample], float]) -> float:
    """From the first sample to the last."""
    return megabytes(samples[-1]) - megabytes(samples[0])


def driver_mb(sample: Sample) -> float:
    """Private memory of the driver."""
    return sample.driver.megabytes


def largest_actor_mb(sample: Sample) -> float:
    """Private memory of the largest actor."""
    return max((actor.megabytes for actor in sample.actors), default=float("nan"))


def show(rounds: Sequence[Round], samples: Sequence[Sample], figures: dict[str, Any]) -> None:
    """Prints one table a part."""
    table = Table(title=f"The digits study, {CONCURRENT} trials at once, seconds of an actor once all actors are up")
    for column in (
        "round",
        "trials",
        "wall × 2",
        "bare",
        "idle",
        "rest",
        "wall/bare",
        "yardstick",
    ):
        table.add_column(column, justify="right")
    for number, one in enumerate(rounds, start=1):
        parts = (one.wall, one.bare, one.idle, one.rest)
        yardstick = " … ".join(f"{seconds:.2f}" for seconds in one.yardstick)
        numbers = (f"{part:.1f}" for part in parts)
        table.add_row(str(number), str(one.trials), *numbers, f"{one.wall_over_bare:.3f}", yardstick)
    Console(width=140).print(table)
    memory = Table(title="Trials that report at once: private memory in MB")
    for column in ("trials", "driver", "largest actor", "actors"):
        memory.add_column(column, justify="right")
    for sample in samples:
        sizes = (f"{driver_mb(sample):.1f}", f"{largest_actor_mb(sample):.1f}")
        memory.add_row(str(sample.trials), *sizes, str(len(sample.actors)))
    Console(width=140).print(memory)
    for key, most in WANTED.items():
        print(f"{key} {figures[key]:.3f}; {most:.2f} or less is wanted")
    sampler, driver = figures["sampler_seconds_per_trial"], figures["driver_cpu_seconds_per_trial"]
    print(
        f"{figures['reports_per_trial']:.1f} reports a trial; the sampler took {sampler:.3f} s of it, and the driver "
        f"{driver:.3f} s of processor time, MLflow's writes included\n"
        f"growth from trial {samples[0].trials} to {samples[-1].trials}: {figures['memory_growth_mb']:.1f} MB\n"
        f"load average at the end {figures['load_at_end']:.1f}; {figures['machine']}, {figures['date']}"
    )


if __name__ == "__main__":
    main()
