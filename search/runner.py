"""One search from its launch to its leaderboard: the journal, the teacher, the layers, Tune, MLflow, the export."""

import logging
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from ray import tune
from ray.tune.experiment import Trial

from ..analysis.hint_selection import HintSelection
from ..analysis.trials import SEARCH_FILE, SearchRecord, read_search
from ..distill.execution import Execution
from ..models.candidates import stage_ends
from ..models.errors import InputError
from ..models.own_code import is_own_code, own_code_sha256
from ..models.weights import StateDict, save_weights, weights_sha256
from ..models.zoo import ModelSpec
from .events import Began, Extended, Prepared, Tracked
from .export import export_hints, provenance
from .figures import hint_figures, layer_figures, write_figures
from .hardware import local_execution, trial_execution
from .journal import SearchLog, read_journal
from .layers import Layers, write_distances
from .live import LiveTable
from .mlflow_logger import MlflowLogger
from .networks import as_arrays
from .own_code import code_identities, say_own_code
from .places import JOURNAL_FILE, new_search_name, tracking_uri
from .preflight import Estimate, check_study, estimate, imbalance_note, preset_note
from .preparation import Preparation, prepare
from .ray_session import cluster_cpus, cluster_gpus, ray_session
from .sampler import ArmSampler
from .scheduler import RungScheduler
from .searcher import JournalSearcher, PlannedTrial, TrialRecorder, close_decided, plan_trials, remaining_trials
from .specs import student_spec
from .study import Study, validate_study
from .study_types import NAME_PATTERN, RETRIEVAL_OBJECTIVES
from .tracking import TrackedSearch, check_name_is_free, connect
from .trial import HintResolver, TrialContext, run_trial
from .view import View

HINTS_FILE = "hints.yaml"
OPTUNA_FILE = "optuna.db"
DISTANCES_FILE = "distances.npz"
# A folder of the search, and of its parent run.
FIGURES = "figures"
TEACHER_ARTIFACT = "teacher/teacher.safetensors"
# Of the weights that students start from.
START_ARTIFACT = "student/start.safetensors"


@dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        name: of the search.
        folder: where its journal, checkpoints and hints lie.
        tracking_uri: where its trials are.
        record: its trials, read back from MLflow; None if it was interrupted before the first.
        hints: the exported file; None if there is nothing to export.
        interrupted: whether planned trials are left over.
        validation_images: size of the split that decides.
        missing_writes: what the tracking store has not taken; a resume sends it.
    """

    name: str
    folder: Path
    tracking_uri: str
    record: SearchRecord | None
    hints: Path | None
    interrupted: bool
    validation_images: int
    missing_writes: int


def run_search(
    study: Study,
    *,
    name: str | None = None,
    tracking: str | None = None,
    address: str | None = None,
    view: View | None = None,
) -> SearchResult:
    """Starts a new search and sees it through.

    Args:
        study: what to search.
        name: of the search; `STUDY-YYYYmmdd-HHMMSS` if it is not given.
        tracking: MLflow tracking store, before environment and study.
        address: of a Ray cluster; Ray is started on this machine without one.
        view: where to show progress.

    Raises:
        InputError: anything that preflight finds, or a name that is taken.
    """
    view = view or View()
    name = new_search_name(study.name) if name is None else name
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(f"the name {name!r} may hold letters, digits, '.', '_' and '-' only; choose another --name")
    folder = search_folder(study, name)
    if folder.exists():
        raise InputError(
            f"the search {name} exists already in {folder}; add --resume or --extend, or choose another --name"
        )
    uri = tracking_uri(tracking, study.tracking.uri)
    say_own_code(study, view)
    checked = check_study(study, uri, address)
    for note in (preset_note(study), imbalance_note(study, checked.splits)):
        if note:
            view.say(note)
    view.say(_announcement(name, study, estimate(study, checked, len(plan_trials(study)))))
    check_name_is_free(connect(uri, create=True), study.name, name)
    folder.mkdir(parents=True)
    log = SearchLog(folder / JOURNAL_FILE)
    log.record(Began(name, study.resolved(), version("hintsearch"), uri))
    return _see_through(log, study, view, address)


def resume_search(
    name: str,
    storage: str | Path,
    *,
    extend: int = 0,
    tracking: str | None = None,
    address: str | None = None,
    view: View | None = None,
) -> SearchResult:
    """Goes on with a search from its journal: same study, same numbers, same MLflow runs, none run twice.

    Args:
        name: of the search.
        storage: folder that holds the results of searches.
        extend: search trials to add to its budget.
        tracking: its MLflow tracking store, if it is to be named; a search stays in the store it began in.
        address: of a Ray cluster.
        view: where to show progress.

    Raises:
        InputError: no such search, a damaged journal, or another tracking store.
    """
    view = view or View()
    path = Path(storage) / name / JOURNAL_FILE
    content = read_journal(path)
    if not content.events or not isinstance(content.events[0], Began):
        raise InputError(f"{path} does not start with the launch of a search; restore it from a copy, or start anew")
    began = content.events[0]
    study = validate_study(began.study, str(path))
    if tracking and tracking_uri(tracking, None) != began.tracking_uri:
        raise InputError(f"--tracking is {tracking}, but {name} began in {began.tracking_uri}; leave --tracking out")
    if content.torn:
        view.say(f"The last line of {path} was torn ({content.torn} bytes) and is cut off.")
    log = SearchLog(path)
    log.replay(content.events, content.torn)
    if extend:
        log.record(Extended(extend))
    connect(began.tracking_uri, create=True)
    return _see_through(log, study, view, address)


def search_folder(study: Study, name: str) -> Path:
    """Where a search of that name keeps its files."""
    return Path(study.storage.path) / name


def _see_through(log: SearchLog, study: Study, view: View, address: str | None) -> SearchResult:
    """The common part of new and resumed searches."""
    close_decided(log, study.budget.rungs[-1])
    plan = plan_trials(study, log.history.extended)
    left = remaining_trials(plan, log.history)
    with ExitStack() as stack:
        if left:
            stack.enter_context(ray_session(address))
        preparation = prepare(study, view, address)
        execution = _execution(log, study, view, ray_is_running=bool(left))
        _check_same_teacher(log, preparation, execution)
        view.layers(preparation.layers)
        tracked = _tracked_search(log, study, preparation, execution)
        sampler = ArmSampler(study, tracked.name, len(stage_ends(preparation.student)))
        log.listen(sampler, from_start=True)
        logger = MlflowLogger(tracked, log)
        logger.catch_up()
        log.listen(logger)
        try:
            if left:
                _run_tune(log, study, preparation, execution, sampler, left, len(plan), view)
        finally:
            # Also after an error or a second Ctrl-C: no run is left open.
            interrupted = bool(remaining_trials(plan, log.history))
            missing = logger.close(interrupted)
            sampler.save(log.path.parent / OPTUNA_FILE)
            if interrupted and not missing:
                tracked.close(tracked.parent_run_id, "KILLED", {"outcome": "interrupted"})
    return _conclude(log, tracked, interrupted, missing, preparation)


def _execution(log: SearchLog, study: Study, view: View, ray_is_running: bool) -> Execution:
    """Where and how all trials compute: on the same hardware, and once begun in the same precision."""
    on_gpu = study.resources.gpus_per_trial > 0
    before = log.history.prepared
    if before is not None:
        execution, why = Execution(_device(on_gpu), before.precision, study.resources.compile), "as the search began"
    elif ray_is_running:
        execution, why = trial_execution(study.resources)
    else:
        execution, why = local_execution(study.resources, on_gpu)
    view.say(f"Precision of the trials: {execution.precision} ({why}).")
    return execution


def _device(on_gpu: bool) -> str:
    return "cuda" if on_gpu else "cpu"


def _check_same_teacher(log: SearchLog, preparation: Preparation, execution: Execution) -> None:
    teacher = preparation.teacher
    before = log.history.prepared
    if before is None:
        log.record(Prepared(teacher.sha256, str(teacher.path), teacher.val_accuracy, execution.precision))
    elif before.teacher_sha256 != teacher.sha256:
        raise InputError(
            f"the teacher's weights have sha256 {teacher.sha256[:12]}, but the search began with "
            f"{before.teacher_sha256[:12]}; bring {before.teacher_path} back, or start a new search"
        )


def _tracked_search(log: SearchLog, study: Study, preparation: Preparation, execution: Execution) -> TrackedSearch:
    """The parent run, with everything that comparing and exporting needs, before the first trial."""
    began, folder = log.history.began, log.path.parent
    assert began is not None
    client = connect(began.tracking_uri, create=True)
    tracked = TrackedSearch(client, study.name, began.name, log.history.parent_run_id)
    if log.history.parent_run_id is None:
        log.record(Tracked(0, tracked.parent_run_id))
    write_distances(folder / DISTANCES_FILE, preparation.layers.distances)
    tracked.set_running(tracked.parent_run_id)
    tracked.tag_parent(
        {
            "objective": study.objective.metric,
            "direction": study.objective.direction,
            "teacher.sha256": preparation.teacher.sha256,
            "precision": execution.precision,
            **{f"code.{key}": f"{path} sha256:{sha256}" for key, path, sha256 in code_identities(study)},
        }
    )
    tracked.add_documents(
        {
            "study.yaml": yaml.safe_dump(study.resolved(), sort_keys=False),
            "space.json": study.space.model_dump(mode="json"),
            SEARCH_FILE: search_document(study, preparation, execution),
        }
    )
    tracked.add_file(folder / DISTANCES_FILE, "layers")
    for picture in write_figures(folder / FIGURES, layer_figures(preparation.layers)):
        tracked.add_file(picture, FIGURES)
    _add_weights(tracked, TEACHER_ARTIFACT, preparation.teacher.weights)
    if preparation.start is not None:
        _add_weights(tracked, START_ARTIFACT, preparation.start)
    return tracked


def _add_weights(tracked: TrackedSearch, artifact: str, weights: StateDict) -> None:
    place = Path(artifact)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / place.name
        save_weights(file, weights)
        tracked.add_file(file, str(place.parent))


def search_document(study: Study, preparation: Preparation, execution: Execution) -> dict[str, Any]:
    """What an export says of the search as a whole, as an artifact of the parent run."""
    teacher, splits = preparation.teacher, preparation.splits
    return {
        "study": study.resolved(),
        "teacher": {
            **_model(teacher.spec),
            "candidates": study.layers.candidates,
            "sha256": teacher.sha256,
            "path": str(teacher.path),
            "artifact": TEACHER_ARTIFACT,
            "val_accuracy": teacher.val_accuracy,
        },
        "student": {**_model(student_spec(study, splits)), "start": _start(study, preparation)},
        "data": {**asdict(study.data_spec()), "mean": list(splits.mean), "sd": list(splits.sd)},
        "training": {
            "recipe": asdict(study.recipe.recipe()),
            "rungs": list(study.budget.rungs),
            "device": execution.device,
            "precision": execution.precision,
            "compile": execution.compile,
            "threads": study.resources.cpus_per_trial,
        },
        "loss_code_sha256": {name: own_code_sha256(name) for name in study.losses() if is_own_code(name)},
        "data_code_sha256": own_code_sha256(study.data.name) if is_own_code(study.data.name) else None,
        "validation_images": len(splits.validation),
        "provenance": provenance(version("hintsearch")),
    }


def _start(study: Study, preparation: Preparation) -> dict[str, str] | None:
    """Where the weights lie that students start from."""
    if preparation.start is None:
        return None
    place = str(study.student.checkpoint)
    return {"sha256": weights_sha256(preparation.start), "path": place, "artifact": START_ARTIFACT}


def _model(spec: ModelSpec) -> dict[str, Any]:
    content = spec.to_dict()
    content["model"] = content.pop("name")
    return {**content, "factory_sha256": own_code_sha256(spec.name)}


def _run_tune(
    log: SearchLog,
    study: Study,
    preparation: Preparation,
    execution: Execution,
    sampler: ArmSampler,
    left: Sequence[PlannedTrial],
    planned: int,
    view: View,
) -> None:
    """Runs the trials that are left in a Tune experiment of their own; returns early on Ctrl-C."""
    context = _trial_context(study, preparation, execution)
    storage = log.path.parent / "tune"
    experiment = 1 + sum(1 for _ in storage.iterdir()) if storage.is_dir() else 1
    # Tune's own csv, json and tensorboard files would be a second, partial journal.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Our own table shows the trials; Tune and Optuna would print between its lines.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    resources = {"cpu": study.resources.cpus_per_trial, "gpu": study.resources.gpus_per_trial}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, context=context), resources),
        tune_config=tune.TuneConfig(
            search_alg=JournalSearcher(log, sampler, _resolver(study, preparation), study, left),
            scheduler=RungScheduler(log, study),
            num_samples=len(left),
            max_concurrent_trials=concurrent_trials(study),
            reuse_actors=True,
            trial_name_creator=trial_directory,
            trial_dirname_creator=trial_directory,
        ),
        run_config=tune.RunConfig(
            name=str(experiment),
            storage_path=str(storage),
            callbacks=[TrialRecorder(log)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            verbose=0,
        ),
    )
    with LiveTable(view, log.history, study, planned) as table:
        log.listen(table)
        tuner.fit()


def _trial_context(study: Study, preparation: Preparation, execution: Execution) -> TrialContext:
    return TrialContext(
        student=student_spec(study, preparation.splits),
        teacher=preparation.teacher.trained(),
        splits=preparation.splits,
        recipe=study.recipe.recipe(),
        rungs=study.budget.rungs,
        start=as_arrays(preparation.start) if preparation.start else None,
        execution=execution,
        threads=study.resources.cpus_per_trial,
        checkpoint_seconds=study.budget.checkpoint_seconds,
        rankings=study.objective.metric in RETRIEVAL_OBJECTIVES,
    )


def _resolver(study: Study, preparation: Preparation) -> HintResolver:
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
    fitting = int(cluster_cpus() // study.resources.cpus_per_trial)
    if study.resources.gpus_per_trial:
        fitting = min(fitting, int(cluster_gpus() // study.resources.gpus_per_trial))
    return max(1, fitting)


def trial_directory(trial: Trial) -> str:
    """A short name: Tune's default holds all parameters and can be longer than file systems allow."""
    return str(trial.trial_id)


def _conclude(
    log: SearchLog, tracked: TrackedSearch, interrupted: bool, missing: int, preparation: Preparation
) -> SearchResult:
    began, folder = log.history.began, log.path.parent
    assert began is not None
    # What the store has not taken cannot be read back from it.
    record = None if missing else read_search(tracked.client, began.name)
    hints: Path | None = None
    if record is not None and not interrupted:
        if record.winner():
            hints = folder / HINTS_FILE
            export_hints(tracked.client, record, hints)
            tracked.add_file(hints, "")
        for picture in _hint_figures(log, record, preparation.layers):
            tracked.add_file(picture, FIGURES)
        tracked.close(tracked.parent_run_id, "FINISHED", {"outcome": "completed"})
    images = len(preparation.splits.validation)
    return SearchResult(began.name, folder, began.tracking_uri, record, hints, interrupted, images, missing)


def _hint_figures(log: SearchLog, record: SearchRecord, layers: Layers) -> list[Path]:
    """The pictures of the winner's hint points, or of the search's best if no metrics chose the winner's."""
    winner = record.winner()
    rows = [*([winner] if winner else []), *(row for row in record.trials if row.arm == "search")]
    for row in rows:
        chosen = log.history.trials[row.number].suggested.selection
        if chosen and chosen["metrics"]:
            figures = hint_figures(layers, HintSelection.from_dict(chosen))
            return write_figures(log.path.parent / FIGURES, figures)
    return []


def _announcement(name: str, study: Study, cost: Estimate) -> str:
    """What the search will cost at most, before anything is spent."""
    gpu_hours = cost.training_seconds / 3600 * study.resources.gpus_per_trial
    device = "measured on this machine's CPU" if gpu_hours else "measured"
    warming = f" after {cost.warmup_epochs} of warm-up" if cost.warmup_epochs else ""
    compiling = "" if study.resources.compile == "off" else ", and what torch.compile takes in each trial"
    teacher = "is cached" if cost.teacher_cached else f"is trained first, {study.teacher.recipe.epochs} epochs"
    return (
        f"Search {name}: {cost.trials} trials of at most {study.budget.rungs[-1]} epochs{warming}, "
        f"{cost.epoch_seconds:.2f} s an epoch ({device}): at most {_duration(cost.wall_seconds)} and "
        f"{gpu_hours:.1f} GPU-hours{compiling}. The teacher {teacher}."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
