"""The trainings of a search without the search: the same configurations in as many processes, one after the other."""

import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.synchronize import Barrier

import torch
from hintsearch.distill.allocation import keep_freed_memory
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution, best_precision
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.stepping import NonFiniteLossError
from hintsearch.distill.trainer import Seeds, Trainer
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.events import History, TrialHistory
from hintsearch.search.preparation import Preparation, prepare, study_data
from hintsearch.search.specs import student_spec
from hintsearch.search.study import Study
from hintsearch.search.view import View

PLAIN_EPOCHS = 4


@dataclass(frozen=True)
class BareTraining:
    """When one training by itself was where, in seconds since 1970.

    Attributes:
        number: of the trial.
        begun: when it was constructed.
        ends: when it could begin, and the end of each epoch, validation included; of one that failed, then.
    """

    number: int
    begun: float
    ends: tuple[float, ...]


def bare_trainings(study: Study, history: History, concurrent: int) -> dict[int, BareTraining]:
    """Trains every trial of a search once more, as far as it came, and takes the time.

    Args:
        study: of the search; teacher and layers are in the cache.
        history: of the search.
        concurrent: how many processes share the trials, as the search's actors did.
    """
    trials = [trial for _, trial in sorted(history.trials.items())]
    context = multiprocessing.get_context("spawn")
    warm = context.Barrier(concurrent)
    assert history.prepared is not None
    given = (study, Execution("cpu", history.prepared.precision), trials[0], warm)
    with ProcessPoolExecutor(concurrent, context, _prepare, given) as processes:
        trainings = list(processes.map(_timed, trials))
    return {training.number: training for training in trainings}


@dataclass(frozen=True)
class _Prepared:
    """What a process has of the search."""

    study: Study
    preparation: Preparation
    execution: Execution


# Of this process; an executor's initializer can hand it on in no other way.
_ready: list[_Prepared] = []
_plain: list[tuple[ModelSpec, DataSplits, Study]] = []


def prepare_plain(study: Study) -> None:
    """Readies a process of a yardstick: the student's training without a teacher."""
    _ready_process(study)
    splits = study_data(study)
    _plain.append((student_spec(study, splits), splits, study))


def train_plain() -> None:
    """Trains a fresh student for a few epochs."""
    spec, splits, study = _plain[0]
    execution = Execution("cpu", best_precision("cpu")[0])
    trainer = Trainer(spec, splits, study.recipe.recipe(), study.budget.rungs, Seeds(1, 1), execution=execution)
    for _ in islice(trainer.epochs(), PLAIN_EPOCHS):
        pass


def _ready_process(study: Study) -> None:
    gc.freeze()
    keep_freed_memory()
    torch.set_num_threads(study.resources.cpus_per_trial)


def _prepare(study: Study, execution: Execution, first: TrialHistory, warm: Barrier) -> None:
    """Starts a process: warm before any training is timed, as an actor is after its first epoch."""
    _ready_process(study)
    view = View()
    view.console.quiet = True
    _ready.append(_Prepared(study, prepare(study, view), execution))
    next(_trainer(first).epochs())
    warm.wait()


def _timed(trial: TrialHistory) -> BareTraining:
    begun = time.time()
    trainer = _trainer(trial)
    ends = [time.time()]
    try:
        for _ in islice(trainer.epochs(), _epochs(trial)):
            ends.append(time.time())
    except NonFiniteLossError:
        ends.append(time.time())
    return BareTraining(trial.number, begun, tuple(ends))


def _epochs(trial: TrialHistory) -> int:
    """As many as were trained; one that fails does so in an epoch that is not reported."""
    failed = trial.finished is not None and trial.finished.outcome == "failed"
    return max(trial.reports, default=0) + failed


def _trainer(trial: TrialHistory) -> Trainer:
    ready, suggested = _ready[0], trial.suggested
    study, preparation = ready.study, ready.preparation
    hints = HintConfiguration.from_dict(suggested.hints)
    return Trainer(
        student_spec(study, preparation.splits),
        preparation.splits,
        replace(study.recipe.recipe(), lr=suggested.parameters["lr"]),
        study.budget.rungs,
        Seeds(suggested.data_seed, suggested.init_seed),
        hints=hints,
        teacher=preparation.teacher.trained().as_teacher() if hints.needs_teacher else None,
        execution=ready.execution,
    )
