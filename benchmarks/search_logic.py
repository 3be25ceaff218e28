"""How much training it takes to beat the best control, by way of searching. Nothing is trained here.

    python benchmarks/search_logic.py [--json FILE] [--seeds N] [--points P ...] [--epochs N] [--curves FILE]

Recorded learning curves (`benchmarks/curves/digits.json.gz`, made by `record_curves.py`) are replayed through the real
searcher with its Optuna sampler, the real journal and the real scheduler, two trials at a time, an epoch of every trial
being as long as one of any other. A configuration gets the curve of the nearest recorded one (`NearestCurve` says
what near is). Compared are, with the same seeds:

- random: every configuration at random, each trained to its end.
- tpe: Optuna's TPE after the study's random start, each trained to its end.
- tpe_asha: the same with ASHA on the study's rungs, as `hintsearch search` does it.

The target is the best control + 1 point (--points) of validation accuracy: the highest mean of a control arm over its
recorded seeds. It is reached when a search trial ends with it after a full training. What counts is the epochs that
all search trials together have trained until then; the control arms come first in each way and cost each the same.
A search that has spent its budget of epochs before that is censored: it counts as longer than all others in medians
and quartiles ("> budget"). Ratios are to random search with the same seed: one that is censored where random is not
counts as infinite, one that is not where random is as its epochs over the whole budget (the least it may have saved);
where both are, there is no ratio.

Below the tables stands what the recording itself says of the target and of the first rung.

The keys of the JSON file: targets, one for each of --points, with points, target, share_of_recorded (random
configurations that have it), survive_first_rung (of those, how many ASHA's first rung lets through if all have reached
it), and ways.WAY.epochs (one a seed, null if censored), .reached, .median_epochs, .quartile_epochs (null if censored),
.ratio_to_random (median) and .ratio_quartiles.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from hintsearch.search.study import validate_study
from recorded_curves import DIGITS, RecordedTrial, Recording, read_recording
from rich.console import Console
from rich.table import Table
from simulated_search import MEMORY, Running, SimulatedSearch

CONCURRENT = 2
OBJECTIVE = "val_accuracy"


@dataclass(frozen=True)
class Way:
    """One way of searching.

    Attributes:
        name: its key.
        budget: keys of the study's budget that it changes.
    """

    name: str
    budget: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One search to simulate.

    Attributes:
        way: of searching.
        seed: of the sampler, and which run of the controls it sees.
        curves: file of recorded curves.
        targets: values to reach; it ends with the highest.
        epochs: its budget.
    """

    way: Way
    seed: int
    curves: Path
    targets: tuple[float, ...]
    epochs: int


@dataclass(frozen=True)
class Reached:
    """When a simulated search had a target.

    Attributes:
        epochs: trained by all search trials until one had it; None if none had within the budget.
        trials: search trials that were begun until then.
    """

    epochs: int | None
    trials: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--seeds", type=int, default=20, help="searches of each way [default: 20]")
    parser.add_argument(
        "--points", type=float, nargs="+", default=[1.0, 4.0], help="targets above the best control [default: 1 4]"
    )
    parser.add_argument(
        "--epochs", type=int, default=1080, help="budget of a search [default: 1080, 60 full trainings]"
    )
    parser.add_argument("--curves", type=Path, default=DIGITS, help=f"recorded curves [default: {DIGITS.name}]")
    options = parser.parse_args()
    started = time.perf_counter()
    recording = read_recording(options.curves)
    arm, control = best_control(recording)
    targets = tuple(control + points / 100 for points in options.points)
    ways = ways_of(recording, options.epochs)
    tasks = [Task(way, seed, options.curves, targets, options.epochs) for seed in range(options.seeds) for way in ways]
    # Forked, so that the imports are there already.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        ended = list(pool.map(simulated, tasks))
    figures = {
        "best_control": {"arm": arm, "mean": control, "seeds": len(recording.controls(arm))},
        "budget_epochs": options.epochs,
        "seeds": options.seeds,
        "targets": [
            {
                "points": points,
                **of_recorded(recording, target),
                "ways": summaries(tasks, [reached[which] for reached in ended], options.epochs),
            }
            for which, (points, target) in enumerate(zip(options.points, targets, strict=True))
        ],
        "wall_seconds": time.perf_counter() - started,
        "recorded": {"trials": len(recording.search_trials()), "machine": recording.machine},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "date": date.today().isoformat(),
    }
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def ways_of(recording: Recording, epochs: int) -> tuple[Way, ...]:
    """What is compared, by the study's own keys: a single rung is one at which nothing is stopped."""
    rungs = recording.study["budget"]["rungs"]
    most_trials = epochs // rungs[0] + CONCURRENT
    # None is given up for failures in a row: what is compared is the choice of trials.
    endless = {"trials": most_trials, "failures": most_trials}
    single = {**endless, "rungs": rungs[-1:]}
    return (
        Way("random", {**single, "startup_trials": most_trials}),
        Way("tpe", single),
        Way("tpe_asha", endless),
    )


def best_control(recording: Recording) -> tuple[str, float]:
    """The control arm with the highest mean at the end, and that mean; arms that fail on a seed are none."""
    means = {}
    for name in recording.study["controls"]["arms"]:
        runs = recording.controls(name)
        if runs and not any(run.failure for run in runs):
            means[name] = statistics.mean(final(run) for run in runs)
    best = max(means, key=lambda name: means[name])
    return best, means[best]


def of_recorded(recording: Recording, target: float) -> dict[str, float | None]:
    """How rare the target is among random configurations, and what ASHA's first rung makes of those that have it."""
    trials = recording.search_trials()
    budget = recording.study["budget"]
    first = np.array([trial.curves[OBJECTIVE][budget["rungs"][0] - 1] for trial in trials if not trial.failure])
    at_end = np.array([final(trial) for trial in trials if not trial.failure])
    cutoff = np.quantile(first, 1 - 1 / budget["reduction"])
    have_it = at_end >= target
    return {
        "target": target,
        "share_of_recorded": float(have_it.sum()) / len(trials),
        "survive_first_rung": float((first[have_it] >= cutoff).mean()) if have_it.any() else None,
    }


def final(trial: RecordedTrial) -> float:
    """The objective at the end of a full training."""
    return float("-inf") if trial.failure else trial.curves[OBJECTIVE][-1]


def simulated(task: Task) -> list[Reached]:
    """One search, from its launch until its last target or the end of its budget: what became of each target."""
    recording = read_recording(task.curves)
    # Nothing is confirmed: it would come after the last search trial.
    changed = {"seed": task.seed, "budget": {**recording.study["budget"], **task.way.budget}, "confirm": {"seeds": 0}}
    study = validate_study({**recording.study, **changed}, task.way.name)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        return searched(SimulatedSearch(study, recording, Path(folder)), task.targets, task.epochs)


def searched(search: SimulatedSearch, targets: Sequence[float], epochs: int) -> list[Reached]:
    """Searches until a search trial ends with the highest target, or so many epochs of search trials are trained.

    Args:
        search: to play.
        targets: values to reach.
        epochs: the budget.

    Returns:
        When each target was reached.
    """
    running: list[Running | None] = [None] * CONCURRENT
    reached: dict[float, Reached] = {}
    spent = begun = 0
    for slot in itertools.cycle(range(CONCURRENT)):
        current = running[slot] or search.start()
        assert current is not None, "a way's trials are endless"
        of_search = current.curve.arm == "search"
        begun += of_search and current.epoch == 0
        spent += of_search
        running[slot] = current if search.train_epoch(current) else None
        if running[slot] is None and of_search:
            value = final(current.curve) if search.completed(current) else -math.inf
            reached |= {t: Reached(spent, begun) for t in targets if t <= value and t not in reached}
        if len(reached) == len(targets) or spent >= epochs:
            break
    return [reached.get(target, Reached(None, begun)) for target in targets]


def summaries(tasks: Sequence[Task], ended: Sequence[Reached], budget: int) -> dict[str, Any]:
    """The figures of each way."""
    found: dict[str, list[Reached]] = {}
    for task, reached in zip(tasks, ended, strict=True):
        found.setdefault(task.way.name, []).append(reached)
    return {name: summary(of_way, found["random"], budget) for name, of_way in found.items()}


def summary(found: Sequence[Reached], random: Sequence[Reached], budget: int) -> dict[str, Any]:
    """The figures of one way; `random` has the same seeds."""
    epochs = quartiles([math.inf if one.epochs is None else one.epochs for one in found])
    pairs = (ratio_of(one, other, budget) for one, other in zip(found, random, strict=True))
    ratios = [ratio for ratio in pairs if ratio is not None]
    low, median, high = quartiles(ratios)
    return {
        "epochs": [one.epochs for one in found],
        "reached": sum(one.epochs is not None for one in found),
        "median_epochs": finite(epochs[1]),
        "quartile_epochs": [finite(epochs[0]), finite(epochs[2])],
        "trials": statistics.median(one.trials for one in found),
        "ratio_to_random": finite(median),
        "ratio_quartiles": [finite(low), finite(high)],
        "ratios": len(ratios),
    }


def ratio_of(one: Reached, random: Reached, budget: int) -> float | None:
    """Epochs over those of random search; None if neither got there."""
    if one.epochs is None:
        return None if random.epochs is None else math.inf
    return one.epochs / (budget if random.epochs is None else random.epochs)


def quartiles(values: Sequence[float]) -> list[float]:
    """The three quartiles, each of them one of the values: a mean with a censored one would say nothing."""
    return [float(value) for value in np.quantile(values or [math.inf], (0.25, 0.5, 0.75), method="inverted_cdf")]


def finite(value: float) -> float | None:
    """None for what is censored; JSON has no infinity."""
    return value if math.isfinite(value) else None


def show(figures: dict[str, Any]) -> None:
    """Prints a table for each target, one row a way."""
    budget, seeds, control, recorded = (figures[key] for key in ("budget_epochs", "seeds", "best_control", "recorded"))
    for at in figures["targets"]:
        table = Table(
            title=f"Epochs until a search trial has {at['target']:.4f}, that is {control['arm']} (the best control, "
            f"{control['mean']:.4f}) + {at['points']:g} points"
        )
        table.add_column("way")
        for column in ("median [quartiles]", "reached", "trials begun", "over random's of the same seed", "pairs"):
            table.add_column(column, justify="right")
        for name, way in at["ways"].items():
            epochs = spread(way["median_epochs"], way["quartile_epochs"], "{:.0f}", f"> {budget}")
            ratio = spread(way["ratio_to_random"], way["ratio_quartiles"], "{:.2f}", "∞")
            reached = f"{way['reached']} of {seeds}"
            table.add_row(name, epochs, reached, f"{way['trials']:.0f}", ratio, str(way["ratios"]))
        Console(width=140).print(table)
        survive = at["survive_first_rung"]
        through = "" if survive is None else f"; ASHA's first rung lets {survive:.0%} of those through"
        print(
            f"{at['share_of_recorded']:.1%} of {recorded['trials']} recorded random configurations have it{through}.\n"
        )
    print(
        f"Recorded on {recorded['machine']}; replayed in {figures['wall_seconds']:.1f} s on {figures['machine']}, "
        f"{figures['date']}"
    )


def spread(median: float | None, ends: Sequence[float | None], shape: str, censored: str) -> str:
    """Median [lower, upper quartile]."""
    middle, low, high = (censored if value is None else shape.format(value) for value in (median, *ends))
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    main()
