"""When a trial is stopped: ASHA on annealed rungs, with its memory in the journal.

Ray's own ASHA keeps its rungs by Tune's trial id inside the scheduler, where a restart loses them, and knows no trial
that counts but is never stopped.
"""

import math
import sys
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from .epoch_reports import EPOCHS, NO_ROOM, NOT_SHARED
from .events import Decision, Finished, History, Reported, TrialHistory
from .failures import FailureBudget
from .journal import SearchLog
from .study import Study
from .study_types import STUDENT_PARAMETERS, TRAINING_SECONDS


def rung_decision(history: History, study: Study, number: int, epoch: int, value: float) -> Decision:
    """ASHA's decision at a rung's end (Li et al. 2020, arXiv 1810.05934, asynchronous successive halving).

    A search trial goes on if its value is not worse than the best 1/reduction of the values that reached this rung
    before it. Control arms' values count, but they are never stopped; repeats neither count nor are stopped.
    """
    sign = 1.0 if study.objective.direction == "maximize" else -1.0
    if history.trials[number].suggested.arm != "search":
        return "continue"
    earlier = [
        sign * trial.reports[epoch].metrics[study.objective.metric]
        for trial in history.trials.values()
        if epoch in trial.reports and trial.number != number and trial.suggested.arm != "confirm"
    ]
    if not earlier:
        return "continue"
    cutoff = float(np.percentile(earlier, (1 - 1 / study.budget.reduction) * 100))
    return "stop" if sign * value < cutoff else "continue"


class RungScheduler(FIFOScheduler):
    """Journals every report with ASHA's decision, before Tune acts on it.

    Args:
        log: the search's log.
        study: its objective and budget are used.
        failures: when the search is given up, and no trial goes on.
    """

    def __init__(self, log: SearchLog, study: Study, failures: FailureBudget) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log, self._study, self._failures = log, study, failures
        # With two objectives no value is worse than another.
        self._stops = study.objective.against is None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Called by Tune for every report, and once more with the last report when the function returns."""
        number = int(trial.config["number"])
        for figures in result[EPOCHS]:
            if self._log.history.trials[number].finished is not None or not self._take(number, figures):
                return str(TrialScheduler.STOP)
        ends = self._log.history.trials[number].stopped or self._failures.ends_early
        return str(TrialScheduler.STOP if ends else TrialScheduler.CONTINUE)

    def _take(self, number: int, figures: dict[str, Any]) -> bool:
        """Journals an epoch, or what happened in its place; whether the trial can go on."""
        known = self._log.history.trials[number]
        # Left without an outcome, for a resume.
        if NO_ROOM in figures:
            self._failures.no_room = str(figures[NO_ROOM])
            return False
        if NOT_SHARED in figures:
            self._failures.not_shared = str(figures[NOT_SHARED])
            return False
        if "failure" in figures:
            self._log.record(Finished(number, "failed", figures["failure"], figures.get("traceback", "")))
            return False
        epoch = int(figures["epoch"])
        # A trial that went on from a checkpoint repeats epochs that the journal has: they are not recorded again.
        if epoch in known.reports:
            return True
        # Names come anew with each report from another process; the history needs one copy of each.
        metrics = {sys.intern(name): float(figures[name]) for name in figures if _is_ours(name)}
        metrics[TRAINING_SECONDS] = _seconds_so_far(known) + float(figures["epoch_seconds"])
        # Rankings are measured at the end of a rung only.
        value = metrics.get(self._study.objective.metric)
        if value is not None and not math.isfinite(value):
            # No comparison with NaN is true: neither this trial nor any after it would ever be stopped.
            reason = f"{self._study.objective.metric} is {value} in epoch {epoch}; lower lr or the weights"
            self._log.record(Finished(number, "failed", reason))
            return False
        decision: Decision | None = None
        if self._stops and value is not None and epoch in self._study.budget.rungs[:-1]:
            decision = rung_decision(self._log.history, self._study, number, epoch, value)
        self._log.record(Reported(number, epoch, metrics, decision))
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which the journal replaces."""
        return {}


def _seconds_so_far(trial: TrialHistory) -> float:
    return trial.last.metrics.get(TRAINING_SECONDS, 0.0) if trial.last else 0.0


def _is_ours(metric: str) -> bool:
    single = (
        "lr",
        "train_loss",
        "images_per_second",
        "warmup_seconds",
        "adapter_parameters",
        "accumulation_steps",
        "halved_passes",
        STUDENT_PARAMETERS,
    )
    return metric in single or metric.startswith(("val_", "loss_", "normaliser_", "warmup_loss_", "hint_weight."))
