"""A search whose trials are recorded learning curves, played by what decides in a real one."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hintsearch.models.candidates import stage_ends
from hintsearch.search.epoch_reports import EPOCHS
from hintsearch.search.events import Began
from hintsearch.search.failures import FailureBudget
from hintsearch.search.journal import SearchLog
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.scheduler import RungScheduler
from hintsearch.search.searcher import JournalSearcher
from hintsearch.search.study import Study
from hintsearch.search.trial import HintResolver
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from recorded_curves import NearestCurve, RecordedTrial, Recording

# The journal is fsynced at every event; in memory that costs nothing.
MEMORY = Path("/dev/shm")


@dataclass
class Running:
    """A trial under way.

    Attributes:
        trial: Tune's own.
        curve: what it reports.
        epoch: the last one that it has reported.
    """

    trial: Trial
    curve: RecordedTrial
    epoch: int = 0


class SimulatedSearch:
    """The parts of a search that decide, driven as Tune drives them.

    Args:
        study: what is searched, and how.
        recording: takes the place of the training.
        folder: of the journal.
    """

    def __init__(self, study: Study, recording: Recording, folder: Path) -> None:
        self.study, self.recording = study, recording
        self._log = SearchLog(folder / "journal.jsonl")
        self._log.record(Began("simulated", study.resolved(), version("hintsearch"), ""))
        sampler = ArmSampler(study, "simulated", len(stage_ends(recording.student)))
        self._log.listen(sampler)
        resolver = HintResolver(recording.teacher, recording.student, recording.distances, study.seed)
        failures = FailureBudget(study.budget.failures)
        self._log.listen(failures)
        self._searcher = JournalSearcher(self._log, sampler, resolver, study, failures)
        self._scheduler = RungScheduler(self._log, study, failures)
        self._nearest = NearestCurve(recording)

    def start(self) -> Running | None:
        """Tune's next trial; None: there is none."""
        name = f"{len(self._log.history.trials):08d}"
        config = self._searcher.suggest(name)
        if config == Searcher.FINISHED:
            return None
        trial = Trial("replayed", trial_id=name, config=config, stub=True)
        suggested = self._log.history.trials[config["number"]].suggested
        if suggested.control:
            runs = self.recording.controls(suggested.control)
            return Running(trial, runs[self.study.seed % len(runs)])
        return Running(trial, self._nearest.find(suggested.parameters, suggested.selection["indices"]))

    def train_epoch(self, running: Running) -> bool:
        """Reports one epoch; whether the trial goes on."""
        running.epoch += 1
        figures: dict[str, Any] = {"epoch": running.epoch, "epoch_seconds": 1.0}
        if running.epoch > running.curve.epochs:
            figures["failure"] = running.curve.failure
        else:
            figures |= running.curve.metrics(running.epoch)
        result = {EPOCHS: [figures]}
        decision = self._scheduler.on_trial_result(None, running.trial, result)
        if decision == TrialScheduler.CONTINUE and running.epoch < self.study.budget.rungs[-1]:
            return True
        self._searcher.on_trial_complete(running.trial.trial_id, result)
        return False

    def completed(self, ended: Running) -> bool:
        """Whether a trial came to the end of a full training: no value of one that was stopped or failed counts."""
        finished = self._log.history.trials[ended.trial.config["number"]].finished
        assert finished is not None
        return finished.outcome == "completed"
