"""What Tune runs next: trials to go on with, control arms, then Optuna's suggestions."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from .events import Arm, Checkpointed, Finished, History, Outcome, Suggested
from .journal import SearchLog
from .sampler import ArmSampler
from .study import Study
from .trial import HintResolver, tune_config


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to run: its number and its arm; `control` names the control arm."""

    number: int
    arm: Arm
    control: str = ""


def plan_trials(study: Study, extended: int = 0) -> list[PlannedTrial]:
    """All trials of a search in the order of their numbers: control arms first, dealt out evenly, then the search's.

    Args:
        study: its controls and budget are used.
        extended: search trials on top of the budget.
    """
    arms = study.controls.arms
    controls = [PlannedTrial(i + 1, "control", arms[i % len(arms)]) for i in range(study.control_trials)]
    first = len(controls) + 1
    return controls + [PlannedTrial(first + i, "search") for i in range(study.budget.trials + extended)]


def remaining_trials(plan: Sequence[PlannedTrial], history: History) -> list[PlannedTrial]:
    """Those of the plan without an outcome."""
    return [p for p in plan if p.number not in history.trials or history.trials[p.number].finished is None]


def close_decided(log: SearchLog, last_epoch: int) -> None:
    """Gives an outcome to trials whose journaled reports already decide it, so that they are not run again."""
    for trial in list(log.history.unfinished()):
        outcome = _outcome(log.history, trial.number, last_epoch)
        if outcome:
            log.record(Finished(trial.number, outcome, ""))


class JournalSearcher(Searcher):
    """Hands the planned trials to Tune one by one; journals each suggestion and each outcome before it takes effect.

    Args:
        log: the search's log.
        sampler: source of new parameters.
        resolver: turns parameters into hint configurations.
        study: its budget is used.
        remaining: trials to run, in order; those that the history knows are issued again with their parameters.
    """

    def __init__(
        self,
        log: SearchLog,
        sampler: ArmSampler,
        resolver: HintResolver,
        study: Study,
        remaining: Sequence[PlannedTrial],
    ) -> None:
        super().__init__()
        self._log, self._sampler, self._resolver, self._study = log, sampler, resolver, study
        self._remaining = list(remaining)
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The Tune configuration of the next trial, or FINISHED."""
        if not self._remaining:
            return Searcher.FINISHED
        planned = self._remaining.pop(0)
        self._numbers[trial_id] = planned.number
        known = self._log.history.trials.get(planned.number)
        if known is not None:
            return tune_config(known.suggested, known.checkpoint.path if known.checkpoint else None)
        parameters, distributions = self._sampler.suggest(planned.number, planned.control)
        hints, selection = self._resolver.resolve(planned.number, planned.control, parameters)
        suggested = Suggested(
            planned.number,
            planned.arm,
            planned.control,
            parameters,
            distributions,
            hints.to_dict(),
            asdict(selection) if selection else {},
            # The same for every trial of the search: arms then differ in their parameters only.
            data_seed=self._study.seed,
            init_seed=self._study.seed,
        )
        self._log.record(suggested)
        return tune_config(suggested, None)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Called by Tune when a trial is over; failures are recorded with their reason by `TrialRecorder`."""
        number = self._numbers[trial_id]
        if error or self._log.history.trials[number].finished is not None:
            return
        outcome = _outcome(self._log.history, number, self._study.budget.rungs[-1])
        # Neither stopped nor at its end: interrupted, hence left open for a resume.
        if outcome:
            self._log.record(Finished(number, outcome, ""))

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; the truth is in the journal."""
        Path(checkpoint_path).write_text(json.dumps({"journal": str(self._log.path)}))

    def restore(self, checkpoint_path: str) -> None:
        """Never used: a resume replays the journal into a new Tune experiment.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a search is resumed by `hintsearch search --resume`, not by Tune's restore")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which the journal replaces."""
        return {}


class TrialRecorder(tune.Callback):
    """Journals what Tune tells callbacks only: checkpoints, and why a trial failed.

    Args:
        log: the search's log.
    """

    def __init__(self, log: SearchLog) -> None:
        self._log = log

    def on_checkpoint(self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any) -> None:
        """A checkpoint lies in the storage."""
        number, epoch = int(trial.config["number"]), int(trial.last_result["epoch"])
        self._log.record(Checkpointed(number, epoch, str(checkpoint.path)))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial raised or its process died."""
        number = int(trial.config["number"])
        if self._log.history.trials[number].finished is None:
            self._log.record(Finished(number, "failed", _reason(trial)))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which the journal replaces."""
        return {}


def _reason(trial: Trial) -> str:
    """The last line of the error that Tune has just written; its own `get_error` looks where it is copied later."""
    file = trial.error_file
    lines = Path(file).read_text().split("\n") if file and Path(file).is_file() else []
    said = [line for line in lines if line.strip()]
    return said[-1].strip()[:500] if said else "the trial's process died"


def _outcome(history: History, number: int, last_epoch: int) -> Outcome | None:
    trial = history.trials[number]
    if trial.stopped:
        return "pruned"
    return "completed" if last_epoch in trial.reports else None
