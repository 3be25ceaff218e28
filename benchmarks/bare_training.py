"""The trainings of a search without the search: the same configurations in as many processes, one after the other."""

import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from multiprocessing.synchronize import Barrier

import torch
from hintsearch.distill.allocation import keep_freed_memory
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.stepping import NonFiniteLossError
from hintsearch.distill.trainer import Seeds, Trainer
from hintsearch.search.events import History, TrialHistory
from hintsearch.search.preparation import Preparation, prepare
from hintsearch.search.specs import student_spec
from hintsearch.search.study import Study
from hintsearch.search.view import View


@dataclass(frozen=True)
class BareTraining:
    """What one training took by itself.

    Attributes:
        number: of the trial.
        construction: seconds until it could begin.
        epochs: seconds of each, validation included; of one that failed, until then.
        steps: seconds of each without validation, of those that came to their end.
    """

    number: int
    construction: float
    epochs: tuple[float, ...]
    steps: tuple[float, ...]


def bare_trainings(study: Study, history: History, concurrent: int) -> dict[int, BareTraining]:
    """Trains every trial of a search once more, as far as it came, and takes the time.

    Args:
        study: of the search; teacher and layers are in the cache.
        history: of the search.
        concurrent: how many processes share the trials, as the search's actors did.
    """
    assert history.prepared is not None
    trials = [trial for _, trial in sorted(history.trials.items())]
    execution = Execution("cpu", history.prepared.precision)
    context = multiprocessing.get_context("spawn")
    warm = context.Barrier(concurrent)
    with ProcessPoolExecutor(concurrent, context, _prepare, (study, execution, trials[0], warm)) as processes:
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


def _prepare(study: Study, execution: Execution, first: TrialHistory, warm: Barrier) -> None:
    """Starts a process: warm before any training is timed, as an actor is after its first epoch."""
    gc.freeze()
    keep_freed_memory()
    torch.set_num_threads(study.resources.cpus_per_trial)
    view = View()
    view.console.quiet = True
    _ready.append(_Prepared(study, prepare(study, view), execution))
    next(_trainer(first).epochs())
    warm.wait()


def _timed(trial: TrialHistory) -> BareTraining:
    started = time.perf_counter()
    trainer = _trainer(trial)
    ends, steps = [time.perf_counter()], []
    images = len(_ready[0].preparation.splits.train)
    try:
        for result in islice(trainer.epochs(), _epochs(trial)):
            ends.append(time.perf_counter())
            steps.append(images / result.metrics["images_per_second"])
    except NonFiniteLossError:
        ends.append(time.perf_counter())
    epochs = tuple(end - begin for begin, end in pairwise(ends))
    return BareTraining(trial.number, ends[0] - started, epochs, tuple(steps))


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
