"""One search from its launch to its leaderboard: the journal, the teacher, the layers, Tune, MLflow, the export."""

import errno
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mlflow.exceptions import MlflowException
from ray.tune.error import TuneError

from ..analysis.hint_selection import HintSelection
from ..analysis.importance import Importances
from ..analysis.trials import SearchRecord, read_search
from ..distill.execution import Execution
from ..models.candidates import stage_ends
from ..models.errors import InputError, reason
from .collector import keep_what_there_is
from .estimate import Estimate, estimate
from .events import Began, Enqueued, Extended, Prepared
from .export import HintFile, export_hints
from .failures import FailureBudget
from .figures import hint_figures, write_figures
from .findings import IMPORTANCES_FILE, PARETO, export_pareto, search_importances
from .hardware import local_execution, trial_execution
from .interrupts import InterruptDeadline, RayEndedError, interrupt_the_main_thread, interrupts_ignored
from .journal import JournalContent, SearchLog, read_journal
from .layers import Layers
from .live import LiveTable
from .mlflow_logger import MlflowLogger
from .node_checks import check_nodes, waiting_note
from .own_code import say_own_code
from .parent_run import FIGURES, open_parent_run
from .places import JOURNAL_FILE, new_search_name, tracking_uri
from .plan import Plan, most_repeats
from .points import point_of
from .preflight import check_study, imbalance_note, job_note, preset_note
from .preparation import Preparation, prepare, study_data
from .ray_session import ray_session
from .ray_watch import ray_watched
from .running import running
from .sampler import ArmSampler
from .searcher import JournalSearcher, close_decided
from .shared_file import reading, shared
from .study import Study, validate_study
from .study_types import NAME_PATTERN
from .tracking import TrackedSearch, check_name_is_free, connect
from .trial import run_trial
from .trial_workers import by_workers, workers_folder
from .tuning import make_tuner, trial_context, trial_resolver
from .view import View

HINTS_FILE = "hints.yaml"
OPTUNA_FILE = "optuna.db"
# Only while trials run.
CONTEXT_FILE = "trial_context.pickle"
# How long the tracking store may take nothing where an interrupt is late already.
LATE_SECONDS = 3.0


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
        given_up: why, if too many trials in a row failed; else empty.
        importances: what decided how good the search's trials were; None if it was interrupted.
    """

    name: str
    folder: Path
    tracking_uri: str
    record: SearchRecord | None
    hints: Path | None
    interrupted: bool
    validation_images: int
    missing_writes: int
    given_up: str = ""
    importances: Importances | None = None


def run_search(
    study: Study,
    *,
    name: str | None = None,
    tracking: str | None = None,
    address: str | None = None,
    points: Sequence[HintFile] = (),
    view: View | None = None,
    deadline: InterruptDeadline | None = None,
) -> SearchResult:
    """Starts a new search and sees it through.

    Args:
        study: what to search.
        name: of the search; `STUDY-YYYYmmdd-HHMMSS` if it is not given.
        tracking: MLflow tracking store, before environment and study.
        address: of a Ray cluster; Ray is started on this machine without one.
        points: exported configurations of earlier searches, which the first search trials try.
        view: where to show progress.
        deadline: of an interrupt; what has to be done before the process ends is given to it.

    Raises:
        InputError: anything that preflight finds, a name that is taken, or a point outside of the space.
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
    enqueued = [point_of(point, study) for point in points]
    checked = check_study(study, uri, address)
    view.notes(preset_note(study), imbalance_note(study, checked.splits), job_note(study, uri))
    view.say(_announcement(name, study, estimate(study, checked)))
    with ray_session(address, study.resources.workers > 1):
        check_nodes(study, lambda: checked.splits)
        view.notes(waiting_note(study))
        check_name_is_free(connect(uri, create=True), study.name, name)
        folder.mkdir(parents=True)
        with running(folder):
            log = SearchLog(folder / JOURNAL_FILE)
            log.record(Began(name, study.resolved(), version("hintsearch"), uri))
            if enqueued:
                log.record(Enqueued(enqueued))
            return _see_through(log, study, view, address, deadline)


def resume_search(
    name: str,
    storage: str | Path,
    *,
    extend: int = 0,
    tracking: str | None = None,
    address: str | None = None,
    points: Sequence[HintFile] = (),
    view: View | None = None,
    deadline: InterruptDeadline | None = None,
) -> SearchResult:
    """Goes on with a search from its journal: same study, same numbers, same MLflow runs, none run twice.

    Args:
        name: of the search.
        storage: folder that holds the results of searches.
        extend: search trials to add to its budget.
        tracking: its MLflow tracking store, if it is to be named; a search stays in the store it began in.
        address: of a Ray cluster.
        points: exported configurations of earlier searches, which the added trials try first.
        view: where to show progress.
        deadline: of an interrupt; what has to be done before the process ends is given to it.

    Raises:
        InputError: no such search, a damaged journal, another tracking store, or a point outside of the space.
    """
    view = view or View()
    path = Path(storage) / name / JOURNAL_FILE
    if not path.is_file():
        # Says so.
        read_journal(path)
    with running(path.parent), ExitStack() as stack:
        content = read_journal(path)
        began, study = _as_it_began(path, content)
        if tracking and tracking_uri(tracking, None) != began.tracking_uri:
            raise InputError(
                f"--tracking is {tracking}, but {name} began in {began.tracking_uri}; leave --tracking out"
            )
        if points and not extend:
            raise InputError("--points adds to the trials to come; give it at the launch of a search, or with --extend")
        enqueued = [point_of(point, study) for point in points]
        if content.torn:
            view.say(f"The last line of {path} was torn ({content.torn} bytes) and is cut off.")
        log = SearchLog(path)
        log.replay(content.events, content.torn)
        if extend:
            log.record(Extended(extend))
            if enqueued:
                log.record(Enqueued(enqueued))
        connect(began.tracking_uri, create=True)
        close_decided(log, study.budget.rungs[-1])
        if not Plan(study, log.history).over:
            stack.enter_context(ray_session(address, study.resources.workers > 1))
            check_nodes(study, lambda: study_data(study))
            view.notes(waiting_note(study))
        return _see_through(log, study, view, address, deadline)


def _as_it_began(path: Path, content: JournalContent) -> tuple[Began, Study]:
    """The launch of a journaled search, and its study."""
    if not content.events or not isinstance(content.events[0], Began):
        raise InputError(f"{path} does not start with the launch of a search; restore it from a copy, or start anew")
    began = content.events[0]
    return began, validate_study(began.study, str(path))


def search_folder(study: Study, name: str) -> Path:
    """Where a search of that name keeps its files."""
    return Path(study.storage.path) / name


def _see_through(
    log: SearchLog, study: Study, view: View, address: str | None, deadline: InterruptDeadline | None
) -> SearchResult:
    """The common part of new and resumed searches."""
    plan, failures = Plan(study, log.history), FailureBudget(study.budget.failures)
    begun_over = plan.over
    with ExitStack() as stack:
        if not begun_over:
            stack.enter_context(ray_session(address, study.resources.workers > 1))
            stack.enter_context(ray_watched(partial(_end_without_ray, view)))
        preparation = prepare(study, view, address)
        execution = _execution(log, study, view, ray_is_running=not begun_over)
        _check_same_teacher(log, preparation, execution)
        view.layers(preparation.layers)
        tracked = open_parent_run(log, study, preparation, execution)
        sampler = ArmSampler(study, tracked.name, len(stage_ends(preparation.student)))
        log.listen(sampler, from_start=True)
        logger = MlflowLogger(tracked, log)
        logger.catch_up()
        log.listen(logger)
        log.listen(failures)
        if deadline:
            deadline.finish = partial(_close_late, logger, tracked)
        try:
            if not begun_over:
                _run_tune(log, study, preparation, execution, sampler, failures, view)
        except RayEndedError:
            # Shutting it down may take for ever.
            if deadline:
                deadline.begin()
            raise
        finally:
            # Also after an error or a second Ctrl-C: no run is left open, and a third one changes nothing of that.
            closing = stack.enter_context(ExitStack())
            closing.enter_context(interrupts_ignored())
            interrupted = not plan.over
            if not interrupted:
                # It ends by itself, after what a slow store takes: that may be interrupted.
                closing.close()
            if deadline:
                deadline.finish = None
            missing = logger.close(interrupted)
            given_up = failures.last_error if interrupted and failures.spent else ""
            if interrupted and not missing:
                status, outcome = ("FAILED", "given up") if given_up else ("KILLED", "interrupted")
                # It answered just now, for all writes of the trials; if it no longer does, a resume closes the run.
                with suppress(MlflowException, OSError):
                    tracked.close(tracked.parent_run_id, status, {"outcome": outcome})
    try:
        sampler.save(log.path.parent / OPTUNA_FILE)
        return _conclude(log, study, tracked, interrupted, missing, preparation, given_up)
    except (MlflowException, OSError) as error:
        # The store went away after the last trial was sent, or an artifact found no room: a resume concludes again.
        view.say(f"The results could not be read back or exported ({reason(error)}).")
        images = len(preparation.splits.validation)
        return SearchResult(
            tracked.name, log.path.parent, tracked.client.tracking_uri, None, None, interrupted, images, 1, given_up
        )


def _end_without_ray(view: View) -> None:
    """From another thread: what waits for Ray would wait for ever."""
    view.say("Ray on this machine has ended.")
    interrupt_the_main_thread()


def _close_late(logger: MlflowLogger, tracked: TrackedSearch) -> None:
    """Closes the runs while the main thread hangs."""
    if not logger.close(interrupted=True, seconds=LATE_SECONDS):
        with suppress(MlflowException, OSError):
            tracked.close(tracked.parent_run_id, "KILLED", {"outcome": "interrupted"})


def _execution(log: SearchLog, study: Study, view: View, ray_is_running: bool) -> Execution:
    """Where and how all trials compute: on the same hardware, and once begun in the same precision."""
    on_gpu = study.resources.on_gpu
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


def _run_tune(
    log: SearchLog,
    study: Study,
    preparation: Preparation,
    execution: Execution,
    sampler: ArmSampler,
    failures: FailureBudget,
    view: View,
) -> None:
    """Runs the trials that are left; returns early on Ctrl-C."""
    searcher = JournalSearcher(log, sampler, trial_resolver(study, preparation), study, failures)
    # No report is answered while Python collects.
    keep_what_there_is()
    context = shared(trial_context(study, preparation, execution), log.path.parent / CONTEXT_FILE)
    with context as file, LiveTable(view, log.history, study) as table:
        trainable = reading(run_trial, file) if study.resources.workers == 1 else by_workers(file, study.resources)
        tuner = make_tuner(trainable, log, study, searcher, failures)
        log.listen(table)
        try:
            tuner.fit()
        except TuneError:
            # It holds a callback's error as text only.
            if log.broken is not None:
                raise log.broken from None
            raise
        finally:
            # Of trials that were stopped, or of an earlier launch.
            shutil.rmtree(workers_folder(log.path.parent), ignore_errors=True)
    if failures.not_shared:
        view.say(f"Trials could not read their data ({failures.not_shared}).")
    if failures.no_room:
        raise OSError(errno.ENOSPC, failures.no_room)


def _conclude(
    log: SearchLog,
    study: Study,
    tracked: TrackedSearch,
    interrupted: bool,
    missing: int,
    preparation: Preparation,
    given_up: str,
) -> SearchResult:
    began, folder = log.history.began, log.path.parent
    assert began is not None
    # What the store has not taken cannot be read back from it.
    record = None if missing else read_search(tracked.client, began.name)
    hints: Path | None = None
    found: Importances | None = None
    if record is not None and not interrupted:
        found = search_importances(study, log.history)
        tracked.add_documents({IMPORTANCES_FILE: found.to_dict()})
        pareto = record.pareto()
        if pareto and pareto.members:
            for file in export_pareto(tracked.client, record, pareto, folder / PARETO):
                tracked.add_file(file, PARETO)
        if record.winner():
            hints = folder / HINTS_FILE
            export_hints(tracked.client, record, hints)
            tracked.add_file(hints, "")
        for picture in _hint_figures(log, record, preparation.layers):
            tracked.add_file(picture, FIGURES)
        tracked.close(tracked.parent_run_id, "FINISHED", {"outcome": "completed"})
    images = len(preparation.splits.validation)
    return SearchResult(
        began.name, folder, began.tracking_uri, record, hints, interrupted, images, missing, given_up, found
    )


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
    repeats = most_repeats(study)
    confirming = f", up to {repeats} of them to confirm," if repeats else ""
    compiling = "" if study.resources.compile == "off" else ", and what torch.compile takes in each trial"
    teacher = "is cached" if cost.teacher_cached else f"is trained first, {study.teacher.recipe.epochs} epochs"
    return (
        f"Search {name}: {cost.trials} trials{confirming} of at most {study.budget.rungs[-1]} epochs{warming}, "
        f"{cost.epoch_seconds:.2f} s an epoch ({device}): at most {_duration(cost.wall_seconds)} of training and "
        f"{gpu_hours:.1f} GPU-hours{compiling}. The teacher {teacher}."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
