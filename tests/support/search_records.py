"""What a search leaves in its journal and in MLflow, in a form that can be compared with another search's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from processes import Ended

Event = dict[str, Any]
Epochs = dict[int, dict[str, float]]
# What a rerun cannot repeat.
TIMED = ("images_per_second", "_seconds")


@dataclass(frozen=True)
class JournaledTrial:
    """A trial by the journal, without run id, paths and times.

    Attributes:
        suggestion: arm, parameters, hints, seeds.
        reports: metrics by epoch.
        decisions: ASHA's, by epoch.
        outcome: how it ended; None if it did not.
    """

    suggestion: Event
    reports: Epochs
    decisions: dict[int, str | None]
    outcome: str | None


@dataclass(frozen=True)
class Records:
    """What MLflow has of a search, or by its journal must have.

    Attributes:
        runs: ids of the runs by number of the trial; 0 is the search's own.
        outcomes: by number.
        metrics: by number and epoch.
        repeated: (number, metric, epoch) of which there is more than one entry.
    """

    runs: dict[int, str]
    outcomes: dict[int, str | None]
    metrics: dict[int, Epochs]
    repeated: list[tuple[int, str, int]]


def journaled_trials(events: Sequence[Event]) -> dict[int, JournaledTrial]:
    """The trials by number."""
    trials = {}
    for suggestion in _of(events, "suggestion"):
        number = suggestion["number"]
        reports = {e["epoch"]: e for e in _of(events, "report") if e["number"] == number}
        outcomes = [e["outcome"] for e in _of(events, "outcome") if e["number"] == number]
        trials[number] = JournaledTrial(
            {key: value for key, value in suggestion.items() if key not in ("event", "time", "crc")},
            {epoch: untimed(report["metrics"]) for epoch, report in reports.items()},
            {epoch: report["decision"] for epoch, report in reports.items()},
            outcomes[-1] if outcomes else None,
        )
    return trials


def repeated_events(events: Sequence[Event]) -> list[tuple[str, int, int]]:
    """(kind, number, epoch) of suggestions, reports, outcomes and runs that the journal has twice."""
    kinds = ("suggestion", "report", "outcome", "mlflow_run")
    keys = Counter((e["event"], e["number"], e.get("epoch", 0)) for e in events if e["event"] in kinds)
    return [key for key, count in keys.items() if count > 1]


def missing_epochs(events: Sequence[Event]) -> dict[int, list[int]]:
    """By number, the epochs before its last that a trial did not report."""
    trials = journaled_trials(events)
    missing = {n: sorted(set(range(1, max(t.reports, default=0))) - set(t.reports)) for n, t in trials.items()}
    return {number: epochs for number, epochs in missing.items() if epochs}


def records_by_journal(events: Sequence[Event]) -> Records:
    """What MLflow must have."""
    trials = journaled_trials(events)
    return Records(
        {e["number"]: e["run_id"] for e in _of(events, "mlflow_run")},
        {number: trial.outcome for number, trial in trials.items()},
        {number: trial.reports for number, trial in trials.items()},
        [],
    )


def wrong_decisions(events: Sequence[Event], rungs: Sequence[int], reduction: float, metric: str) -> list[Event]:
    """Reports whose decision is not ASHA's on the reports that stand before them (a larger metric is better)."""
    arms = {e["number"]: e["arm"] for e in _of(events, "suggestion")}
    wrong, seen = [], {rung: [] for rung in rungs[:-1]}
    for report in _of(events, "report"):
        value, expected = report["metrics"].get(metric), None
        if report["epoch"] in seen:
            before = seen[report["epoch"]]
            cutoff = np.percentile(before, 100 - 100 / reduction) if before else -np.inf
            expected = "stop" if arms[report["number"]] == "search" and value < cutoff else "continue"
            before.append(value)
        if report["decision"] != expected:
            wrong.append(report)
    return wrong


def records(client: MlflowClient, experiment: str, search: str) -> Records:
    """What MLflow has.

    Raises:
        AssertionError: a search or a trial has two runs.
    """
    everything = _runs(client, experiment)
    (parent,) = [run for run in everything if run.data.tags.get("search") == search]
    found = Records({0: parent.info.run_id}, {}, {}, [])
    for run in everything:
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id:
            number = int(run.data.tags["trial"])
            if number in found.runs:
                raise AssertionError(f"trial {number} has the runs {found.runs[number]} and {run.info.run_id}")
            _add_trial(found, client, run, number)
    return found


def statuses(client: MlflowClient, experiment: str) -> dict[str, int]:
    """How many runs of an experiment, of all its searches, have which status."""
    return dict(Counter(run.info.status for run in _runs(client, experiment)))


def comparable(ended: Ended) -> list[dict[str, Any]]:
    """The trials that a search prints, but for run ids and times."""
    return [
        {
            **{key: value for key, value in trial.items() if key != "run_id"},
            "metrics": untimed(trial["metrics"]),
        }
        for trial in ended.document()["trials"]
    ]


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that a rerun repeats."""
    return {name: value for name, value in metrics.items() if not name.endswith(TIMED)}


def _add_trial(found: Records, client: MlflowClient, run: Run, number: int) -> None:
    epochs: Epochs = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        counts = Counter(entry.step for entry in history)
        found.repeated.extend((number, name, step) for step, count in counts.items() if count > 1)
        # Not the journal's, but made of the step.
        if name == "epoch":
            continue
        for entry in history:
            epochs.setdefault(entry.step, {})[name] = entry.value
    found.runs[number] = run.info.run_id
    found.outcomes[number] = run.data.tags.get("outcome")
    found.metrics[number] = {epoch: untimed(metrics) for epoch, metrics in epochs.items()}


def _runs(client: MlflowClient, experiment: str) -> list[Run]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], max_results=1000))


def _of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]
