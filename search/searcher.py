"""What Tune runs next: trials to go on with, control arms, Optuna's suggestions, then repeats with fresh seeds."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from ..analysis.hint_selection import RANDOM
from .epoch_reports import EPOCHS
from .events import Checkpointed, Finished, History, Outcome, Retried, Suggested
from .failures import FailureBudget
from .interrupts import RayEndedError
from .journal import SearchLog
from .plan import Plan, PlannedTrial, Repeat
from .sampler import ArmSampler
from .study import Study
from .trial import HintResolver, tune_config


def close_decided(log: SearchLog, last_epoch: int) -> None:
    """Gives an outcome to trials whose journaled reports already decide it, so that they are not run again."""
    for trial in list(log.history.unfinished()):
        outcome = _outcome(log.history, trial.number, last_epoch)
        if outcome:
            log.record(Finished(trial.number, outcome, ""))


class JournalSearcher(Searcher):
    """Hands the planned trials to Tune one by one; journals each suggestion and each outcome before it takes effect.

    Trials that the history knows are issued again with their parameters. When no search or control trial is left to
    begin, what is to be confirmed is planned as far as it is decided.

    Args:
        log: the search's log.
        sampler: source of new parameters.
        resolver: turns parameters into hint configurations.
        study: its budget is used.
        failures: when the search is given up.
    """

    def __init__(
        self, log: SearchLog, sampler: ArmSampler, resolver: HintResolver, study: Study, failures: FailureBudget
    ) -> None:
        super().__init__()
        self._log, self._sampler, self._resolver, self._study = log, sampler, resolver, study
        self._plan, self._failures = Plan(study, log.history), failures
        self._remaining = self._plan.remaining
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The Tune configuration of the next trial; FINISHED; None: not before running trials are over."""
        if self._failures.ends_early:
            return Searcher.FINISHED
        if not self._remaining and self._plan.repeats_due():
            self._log.record(self._plan.confirming())
            # Repeats of an earlier plan may be running.
            begun = set(self._numbers.values())
            self._remaining = [planned for planned in self._plan.remaining if planned.number not in begun]
        if not self._remaining:
            # What trials that still run come to decides what is confirmed.
            return Searcher.FINISHED if self._all_planned() else None
        planned = self._remaining.pop(0)
        self._numbers[trial_id] = planned.number
        known = self._log.history.trials.get(planned.number)
        if known is not None:
            return tune_config(known.suggested, known.checkpoint.path if known.checkpoint else None)
        suggested = self._repeated(planned, planned.repeat) if planned.repeat else self._new(planned)
        self._log.record(suggested)
        return tune_config(suggested, None)

    def _all_planned(self) -> bool:
        return self._study.confirm.seeds == 0 or all(trial.arm == "confirm" for trial in self._plan.remaining)

    def _new(self, planned: PlannedTrial) -> Suggested:
        points = self._log.history.points
        point = points[0] if points and planned.arm == "search" else None
        parameters, distributions = self._sampler.suggest(planned.number, planned.control, point)
        if point is not None:
            # Also where the space leaves the number to the clustering.
            parameters["hints.clusters"] = point["hints.clusters"]
        hints, selection = self._resolver.resolve(planned.number, planned.control, parameters)
        return Suggested(
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

    def _repeated(self, planned: PlannedTrial, repeat: Repeat) -> Suggested:
        first = self._log.history.trials[repeat.confirms].suggested
        hints, selection = first.hints, first.selection
        if first.control == RANDOM:
            # Its layers are its seed's.
            configuration, drawn = self._resolver.resolve(planned.number, RANDOM, first.parameters)
            hints, selection = configuration.to_dict(), asdict(drawn) if drawn else {}
        return Suggested(
            planned.number,
            "confirm",
            first.control,
            first.parameters,
            {},
            hints,
            selection,
            data_seed=repeat.data_seed,
            init_seed=repeat.init_seed,
            confirms=repeat.confirms,
        )

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
    """Journals what Tune tells callbacks only: checkpoints, and why a trial failed; lets go of what Tune keeps.

    Args:
        log: the search's log.
    """

    def __init__(self, log: SearchLog) -> None:
        self._log = log

    def on_checkpoint(self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any) -> None:
        """A checkpoint lies in the storage."""
        number, epoch = int(trial.config["number"]), int(trial.last_result[EPOCHS][-1]["epoch"])
        self._log.record(Checkpointed(number, epoch, str(checkpoint.path)))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial raised or its process died, and Tune begins it again from its last checkpoint."""
        number, said = int(trial.config["number"]), _errors(trial)
        _check_driver_s_node(said)
        self._log.record(Retried(number, self._log.history.trials[number].retries + 1, _reason(said)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial is over."""
        _forget_figures(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial raised or its process died once more than it may."""
        _forget_figures(trial)
        number = int(trial.config["number"])
        if self._log.history.trials[number].finished is None:
            said = _errors(trial)
            _check_driver_s_node(said)
            self._log.record(Finished(number, "failed", _reason(said), said))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which the journal replaces."""
        return {}


def _forget_figures(trial: Trial) -> None:
    """Tune holds every trial until its end, and with each the last report and statistics of it: 40 kB."""
    del trial.last_result.get(EPOCHS, [])[:-1]
    trial.metric_analysis.clear()
    trial.metric_n_steps.clear()


def _errors(trial: Trial) -> str:
    """What Tune has just written of all failures; its own `get_error` looks where it is copied later."""
    file = trial.error_file
    return Path(file).read_text(errors="replace") if file and Path(file).is_file() else ""


def _check_driver_s_node(errors: str) -> None:
    """Raises `RayEndedError` if a trial's process was ended because its owner's node is gone.

    Its owner is this process: what is gone is Ray itself, and the trial has not failed.
    """
    if "its owner has died" in _last_attempt(errors):
        raise RayEndedError("Ray on this machine has ended")


def _last_attempt(errors: str) -> str:
    return re.split(r"^Failure # .*\n", errors, flags=re.MULTILINE)[-1]


def _reason(errors: str) -> str:
    """Why the last attempt failed, in one line."""
    said = [line for line in _last_attempt(errors).split("\n") if line.strip()]
    if any(line.lstrip().startswith('File "') for line in said):
        # A traceback.
        return said[-1].strip()[:500]
    # Ray's words on a process or node that is gone: facts of the actor are indented, and what follows them says that it
    # did not run, if it was killed early.
    why = [line for line in said if not line.startswith(("\t", "The actor never ran"))]
    return " ".join(why)[:500] or "the trial's process died"


def _outcome(history: History, number: int, last_epoch: int) -> Outcome | None:
    trial = history.trials[number]
    if trial.stopped:
        return "pruned"
    return "completed" if last_epoch in trial.reports else None
