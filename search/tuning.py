"""The Tune experiment of a search: what its trials share, and how Tune runs them."""

import logging
import os
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from ..distill.execution import Execution
from .failures import FailureBudget
from .journal import SearchLog
from .networks import as_arrays
from .plan import Plan
from .preparation import Preparation
from .ray_session import cluster_cpus, cluster_gpus
from .scheduler import RungScheduler
from .searcher import TrialRecorder
from .specs import student_spec
from .study import Study
from .study_types import RETRIEVAL_OBJECTIVES
from .trial import HintResolver, TrialContext

# What the process of a trial takes that has several workers, which ask for CPUs and GPUs themselves: a byte of memory,
# for Ray places no trial that asks for nothing, and any part of a CPU would be missing for the last worker.
WAITING: dict[str, int | float] = {"memory": 1}
# Seconds between Tune's snapshots: a year.
NEVER = str(365 * 24 * 3600)


def make_tuner(trainable: Any, log: SearchLog, study: Study, searcher: Searcher, failures: FailureBudget) -> tune.Tuner:
    """A Tune experiment of the trials that are left, in a folder of its own.

    Args:
        trainable: what trains a trial; what it captures is sent with every trial, so large things are to be read from
            a file (`shared_file`).
        log: the search's log.
        study: its budget and resources are used.
        searcher: hands out the trials.
        failures: when the search is given up.
    """
    storage = log.path.parent / "tune"
    experiment = 1 + sum(1 for _ in storage.iterdir()) if storage.is_dir() else 1
    # Tune's own csv, json and tensorboard files would be a second, partial journal.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Our own table shows the trials; Tune and Optuna would print between its lines.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Why a trial failed is journaled, said in one line, and an artifact of its run; Tune's own snapshots, which a full
    # disk fails, are read by nobody, and grow with the number of trials.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = NEVER
    for module in ("tune_controller", "experiment_state"):
        logging.getLogger(f"ray.tune.execution.{module}").setLevel(logging.CRITICAL)
    several = study.resources.workers > 1
    resources = {"cpu": study.resources.cpus_per_trial, "gpu": study.resources.gpus_per_trial}
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([WAITING]) if several else resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=RungScheduler(log, study, failures),
            # The searcher says when it is finished.
            num_samples=Plan(study, log.history).most,
            max_concurrent_trials=concurrent_trials(study),
            # A trial that waits for its workers in a thread of its own would fail the next one of its process.
            reuse_actors=not several,
            trial_name_creator=trial_directory,
            trial_dirname_creator=trial_directory,
        ),
        run_config=tune.RunConfig(
            name=str(experiment),
            storage_path=str(storage),
            callbacks=[TrialRecorder(log)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            failure_config=tune.FailureConfig(max_failures=study.budget.retries),
            verbose=0,
        ),
    )


def trial_context(study: Study, preparation: Preparation, execution: Execution) -> TrialContext:
    """What all trials of the search share."""
    return TrialContext(
        student=student_spec(study, preparation.splits),
        teacher=preparation.teacher.trained(),
        splits=preparation.splits,
        recipe=study.recipe.recipe(),
        rungs=study.budget.rungs,
        start=as_arrays(preparation.start) if preparation.start else None,
        execution=execution,
        threads=study.resources.cpus_per_worker,
        checkpoint_seconds=study.budget.checkpoint_seconds,
        rankings=study.objective.metric in RETRIEVAL_OBJECTIVES,
    )


def trial_resolver(study: Study, preparation: Preparation) -> HintResolver:
    """What turns the suggestions of the search into hint configurations."""
    return HintResolver(
        preparation.layers.candidates,
        preparation.student,
        preparation.layers.distances,
        study.seed,
        study.space.hints.metric_weights,
        preparation.similarity,
        study.space.normalise,
        study.warmup.warmup() if study.warmup else None,
        study.dynamic_weights.dynamic_weights() if study.dynamic_weights else None,
    )


def concurrent_trials(study: Study) -> int:
    """Trials at once: as the study says, else as many as fit on the cluster as it is now.

    A cluster that scales from zero grows for trials that wait: there the study has to say it.
    """
    if study.resources.concurrent_trials:
        return study.resources.concurrent_trials
    fitting = int(cluster_cpus() // study.resources.cpus)
    if study.resources.gpus_per_trial:
        fitting = min(fitting, int(cluster_gpus() // study.resources.gpus_per_trial))
    return max(1, fitting)


def trial_directory(trial: Trial) -> str:
    """A short name: Tune's default holds all parameters and can be longer than file systems allow."""
    return str(trial.trial_id)
