"""The command line: `hintsearch`, also `python -m hintsearch`."""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

# Nobody is called without being asked; set before Ray and MLflow are imported, which read them then.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# With a server MLflow prints a link for each run that ends, to standard output, where --json writes its document.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# What a dead server misses is buffered and sent again here; MLflow's own retries would hold each write for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
# The UI's job runners (for evaluating language models) are a dozen processes that nothing here uses.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
# Ray would start a worker a core, none of which a trial can use: Tune's actors have an environment of their own.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

import typer

from ..distill.allocation import keep_freed_memory
from ..models.errors import InputError
from ..models.files import FULL_DISK
from .collector import collect_rarely
from .command_options import AddressOption, JsonOption, SearchName, SetOption, StudyArgument, TrackingOption
from .interrupts import InterruptDeadline, ignore_interrupts, interrupt_after_imports
from .layer_commands import hints, layers

if TYPE_CHECKING:
    from .runner import SearchResult
    from .view import View

app = typer.Typer(
    help="Finds the teacher layers, losses and weights that make hint distillation work.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 3
DEFAULT_STUDY = "digits"
# From a signal to the end of a search, whatever hangs.
LONGEST_INTERRUPT_S = 20.0


def main() -> NoReturn:
    """Runs the command line; exit codes: 0 done, 1 failed, 2 bad input, 3 interrupted or partial."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt_after_imports)
    signal.signal(signal.SIGTERM, _interrupt)
    # Before there are threads.
    keep_freed_memory()
    collect_rarely()
    try:
        app(prog_name="hintsearch")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except SystemExit as ended:
        # Typer's code for a Ctrl-C.
        if ended.code != 130:
            sys.exit(ended.code)
        ignore_interrupts()
        _say_how_to_go_on()
        sys.exit(INTERRUPTED)
    sys.exit(DONE)


def _interrupt(_number: int, _frame: object) -> None:
    """Makes a job manager's SIGTERM a Ctrl-C: everything is saved and the resume command printed."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # The background of a shell script.
        signal.signal(signal.SIGINT, interrupt_after_imports)
    signal.raise_signal(signal.SIGINT)


def _say_how_to_go_on() -> None:
    from .resuming import program

    print(
        f"Interrupted; what was finished is cached. Go on with:\n  {program()} {shlex.join(sys.argv[1:])}",
        file=sys.stderr,
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hintsearch {installed_version('hintsearch')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def search(
    study: Annotated[str | None, typer.Argument(help=f"A study file or name. [default: {DEFAULT_STUDY}]")] = None,
    overrides: SetOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the search. [default: STUDY-YYYYmmdd-HHMMSS]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was interrupted.")] = False,
    extend: Annotated[int | None, typer.Option(min=1, help="Go on with a search and add so many trials.")] = None,
    points: Annotated[
        list[str] | None, typer.Option(metavar="HINTS", help="A hint file of an earlier search, to be tried first.")
    ] = None,
    address: AddressOption = None,
    tracking: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search for the best hint points, losses and weights."""
    from .export import load_hints
    from .places import new_search_name
    from .resuming import check_no_search, check_unchanged, existing_search, resume_command
    from .runner import resume_search, run_search
    from .study import load_study
    from .view import View

    view = View(as_json)
    goes_on = resume or extend is not None
    if goes_on and study is not None and name is None:
        check_no_search(study)
    loaded = load_study(study or DEFAULT_STUDY, overrides or ())
    if goes_on:
        name = existing_search(name or loaded.name, loaded.storage.path)
        if study is not None or overrides:
            check_unchanged(name, loaded)
    name = new_search_name(loaded.name) if name is None else name
    goes_on_by = resume_command(name, study, overrides or (), address, as_json)
    enqueued = [load_hints(file) for file in points or ()]
    deadline = InterruptDeadline(
        LONGEST_INTERRUPT_S,
        INTERRUPTED,
        lambda: view.say(f"Interrupted, and Ray did not end in time; everything is saved. Go on with:\n  {goes_on_by}"),
    )
    try:
        with deadline:
            if goes_on:
                result = resume_search(
                    name,
                    loaded.storage.path,
                    extend=extend or 0,
                    tracking=tracking,
                    address=address,
                    points=enqueued,
                    view=view,
                    deadline=deadline,
                )
            else:
                result = run_search(
                    loaded,
                    name=name,
                    tracking=tracking,
                    address=address,
                    points=enqueued,
                    view=view,
                    deadline=deadline,
                )
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        view.say(f"The disk is full ({error}); nothing journaled is lost. Free space, then go on with:\n  {goes_on_by}")
        raise typer.Exit(INTERRUPTED) from None
    except KeyboardInterrupt as interrupt:
        ignore_interrupts()
        if str(interrupt):
            view.say(f"{interrupt}.")
        if Path(loaded.storage.path, name).exists():
            view.say(f"Interrupted; everything so far is saved. Go on with:\n  {goes_on_by}")
        else:
            _say_how_to_go_on()
        raise typer.Exit(INTERRUPTED) from None
    if result.interrupted:
        ignore_interrupts()
    _conclude(result, view, goes_on_by)


@app.command()
def check(
    study: StudyArgument,
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Schema and model shapes only; needs no data.")] = False,
    address: AddressOption = None,
    tracking: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a study before anything is spent; starts and creates nothing."""
    from .estimate import estimate
    from .node_checks import check_nodes, joins_a_cluster, waiting_note
    from .own_code import say_own_code
    from .places import tracking_uri
    from .plan import most_repeats, plan_trials
    from .preflight import check_study, check_without_data, imbalance_note
    from .ray_session import ray_session
    from .study import load_study
    from .view import View

    view = View(as_json)
    loaded = load_study(study, overrides or ())
    say_own_code(loaded, view)
    if dry_run:
        shapes = check_without_data(loaded)
        cost = None
    else:
        checked = check_study(loaded, tracking_uri(tracking, loaded.tracking.uri), address)
        if joins_a_cluster(address):
            with ray_session(address):
                check_nodes(loaded, lambda: checked.splits)
                view.notes(waiting_note(loaded))
        shapes = checked.shapes
        cost = estimate(loaded, checked)
        view.notes(imbalance_note(loaded, checked.splits))
    view.say(
        f"{loaded.name} is good: {loaded.teacher.model} has {len(shapes.teacher)} candidates, {loaded.student.model} "
        f"has {shapes.stages} stages; {len(plan_trials(loaded))} trials of at most {loaded.budget.rungs[-1]} epochs, "
        f"then up to {most_repeats(loaded)} to confirm"
    )
    if cost is not None:
        view.say(f"At most {cost.wall_seconds:.0f} s of training here ({cost.epoch_seconds:.2f} s an epoch).")
    view.document(
        {
            "study": loaded.resolved(),
            "candidates": [asdict(candidate) for candidate in shapes.teacher],
            "estimate": asdict(cost) if cost else None,
        }
    )


@app.command()
def teacher(
    study: StudyArgument, overrides: SetOption = None, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """Train or load a study's teacher and print its accuracy."""
    from .own_code import say_own_code
    from .preparation import prepare_teacher, study_data
    from .study import load_study
    from .view import View

    view = View(as_json)
    loaded = load_study(study, overrides or ())
    say_own_code(loaded, view)
    ready = prepare_teacher(loaded, study_data(loaded), view, address)
    view.document(
        {
            "model": ready.spec.name,
            "sha256": ready.sha256,
            "path": str(ready.path),
            "val_accuracy": ready.val_accuracy,
        }
    )


app.command()(layers)
app.command()(hints)


@app.command()
def distill(
    hints_file: Annotated[str, typer.Argument(metavar="HINTS", help="An exported hint file.")],
    student: Annotated[str | None, typer.Option(help="Another student; its layers are paired anew.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="PATH", help="File of the teacher's weights.")] = None,
    seeds: Annotated[int, typer.Option(help="How many students, each with other initial weights.")] = 1,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where the weights go. [default: SEARCH-student.safetensors]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A published recipe instead of the exported one.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run code that the hint file names.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Retrain a student from an exported hint file, and test it."""
    from ..analysis.pairing import BY_SIMILARITY
    from ..distill.recipe import PRESETS
    from ..models.own_code import is_own_code
    from .export import load_hints
    from .own_code import say_code
    from .retrain import code_of_hints, distill_execution, distill_student
    from .view import View

    view = View(as_json)
    content = load_hints(hints_file)
    place = output or f"{content.search}-student.safetensors"
    if student is not None and content.selection and content.selection.pairing == BY_SIMILARITY:
        view.say(f"The similarities behind the exported pairs are of another student: {student} is paired by depth.")
    if student is not None and content.student.start:
        view.say(f"{student} starts from random weights: those of the exported student are another network's.")
    precision = distill_execution(content).precision
    missing = (
        "" if precision == content.training.precision else "; this machine has no fast bf16, in which the trial was"
    )
    view.say(f"Training in {precision}{missing}.")
    epochs = content.training.rungs[-1]
    if preset is not None:
        epochs = PRESETS.get(preset).epochs
        view.say(f"Recipe {preset}, {epochs} epochs, instead of the exported one of {content.training.rungs[-1]}.")
    if trust_code:
        for purpose, name, _ in code_of_hints(content, student):
            say_code(purpose, name, view)
    if student is not None and is_own_code(student):
        say_code("student", student, view)
    with view.retraining(seeds, epochs) as on_epoch:
        results = distill_student(
            content,
            student=student,
            teacher=teacher,
            seeds=seeds,
            output=place,
            trust_code=trust_code,
            preset=preset,
            on_epoch=on_epoch,
        )
    view.retrained(content, results, repeats=student is None and preset is None)
    view.document(
        {"search": content.search, "trial": content.trial, "students": [result.to_dict() for result in results]}
    )


@app.command()
def compare(name: SearchName, tracking: TrackingOption = None, as_json: JsonOption = False) -> None:
    """All trials of a search, read from the tracking store."""
    from ..analysis.trials import read_search
    from .places import tracking_uri
    from .tracking import connect
    from .view import View

    view = View(as_json)
    record = read_search(connect(tracking_uri(tracking, None), create=False), name)
    view.leaderboard(record, record.trials)
    view.document({"search": record.name, "trials": [trial.to_dict() for trial in record.trials]})


@app.command()
def export(
    name: SearchName,
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write.")] = "hints.yaml",
    trial: Annotated[int | None, typer.Option(help="Its number. [default: the winner of the search]")] = None,
    tracking: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a trial's hint configuration to a file, read from the tracking store."""
    from ..analysis.trials import read_search
    from .export import export_hints
    from .places import tracking_uri
    from .tracking import connect
    from .view import View

    view = View(as_json)
    client = connect(tracking_uri(tracking, None), create=False)
    content = export_hints(client, read_search(client, name), Path(output), trial)
    view.hint_points(Path(output))
    view.say(f"Exported: trial {content.trial} of {content.search} to {output}")
    view.document({"path": str(Path(output).resolve()), **content.model_dump(mode="json")})


@app.command()
def ui(
    tracking: TrackingOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open the MLflow UI on the tracking store, on 127.0.0.1 alone."""
    from .places import tracking_uri
    from .tracking import connect

    uri = tracking_uri(tracking, None)
    if "://" in uri and uri.startswith("http"):
        print(f"The tracking store is a server with a UI of its own: open {uri}")
        return
    connect(uri, create=False)
    print(f"MLflow UI on {uri}: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    os.execv(sys.executable, [*command, "--port", str(port)])


def _conclude(result: "SearchResult", view: "View", goes_on_by: str) -> None:
    """Shows how a search ended and what to type next; exits unless all is done."""
    from .findings_view import show_findings
    from .resuming import program

    record = result.record
    confirmation = record.confirmation() if record else None
    pareto = record.pareto() if record else None
    if record is not None:
        show_findings(view, record, result.importances, None if result.interrupted else result.validation_images)
    view.document(
        {
            "search": result.name,
            "tracking": result.tracking_uri,
            "hints": result.hints,
            "interrupted": result.interrupted,
            "given_up": result.given_up or None,
            "confirmation": confirmation.to_dict() if confirmation else None,
            "pareto": pareto.to_dict() if pareto else None,
            "importances": result.importances.to_dict() if result.importances else None,
            "trials": [trial.to_dict() for trial in record.trials] if record else [],
        }
    )
    if result.given_up:
        view.say(
            f"Given up: trial after trial failed, the last one because {result.given_up}. Everything is saved; mend "
            f"the cause, then go on with:\n  {goes_on_by}"
        )
        raise typer.Exit(FAILED)
    if result.interrupted or result.missing_writes:
        said = "Interrupted; everything so far is saved."
        if result.missing_writes:
            said = f"{result.missing_writes} records are not in the tracking store, which did not answer; none is lost."
        view.say(f"{said} Go on with:\n  {goes_on_by}")
        raise typer.Exit(INTERRUPTED)
    if result.hints is None:
        view.say("No trial was completed, so there is nothing to export; see the errors above.")
        raise typer.Exit(FAILED)
    shown = os.path.relpath(result.hints)
    view.hint_points(result.hints)
    view.say(f"Exported: {shown}\n\nNext:")
    for command, purpose in next_commands(result.name, shown, result.tracking_uri):
        view.say(f"  {program()} {command}\n      {purpose}")


def next_commands(name: str, hints: str, uri: str) -> list[tuple[str, str]]:
    """What to type after a search, and what for.

    Args:
        name: of the search.
        hints: file that it exported.
        uri: its tracking store.
    """
    from .export import load_hints
    from .places import tracking_uri
    from .retrain import code_of_hints

    trust = " --trust-code" if code_of_hints(load_hints(hints)) else ""
    # Only where the commands would not find the store by themselves.
    store = "" if uri == tracking_uri(None, None) else f" --tracking {uri}"
    return [
        (f"compare {name}{store}", "all trials as a table"),
        (f"distill {hints} --seeds 3{trust}", "retrain the student with it, and test it"),
        (f"ui{store}", "the trials in the MLflow UI"),
    ]


def _models() -> Iterable[Any]:
    from ..models.zoo import MODELS

    return MODELS


def _losses() -> Iterable[Any]:
    from ..distill.losses import HINT_LOSSES, LOGIT_LOSSES

    return (*LOGIT_LOSSES, *HINT_LOSSES)


def _metrics() -> Iterable[Any]:
    from ..analysis.layer_scores import SCORES
    from ..analysis.pairwise_metrics import PAIRWISE

    return (*PAIRWISE, *SCORES)


def _selectors() -> Iterable[Any]:
    from ..analysis.hint_selection import CONTROL_SELECTORS, SELECTORS

    return (*SELECTORS, *CONTROL_SELECTORS)


def _pairings() -> Iterable[Any]:
    from ..analysis.pairing import PAIRINGS

    return PAIRINGS


def _datasets() -> Iterable[Any]:
    from ..distill.data import DATASETS

    return DATASETS


def _presets() -> Iterable[Any]:
    from ..distill.loss_presets import LOSS_PRESETS
    from ..distill.recipe import PRESETS

    return (*PRESETS, *LOSS_PRESETS)


def _register_list(name: str, title: str, entries: Callable[[], Iterable[Any]], beside: str = "") -> None:
    """A command that lists a registry, and says what can be named beside it."""

    @app.command(name, help=f"{title} that a study can name.")
    def show(as_json: JsonOption = False) -> None:
        from .view import View

        rows = [{"name": entry.name, **entry.facts, "source": entry.source} for entry in entries()]
        view = View(as_json)
        view.entries(title, rows)
        if beside:
            view.say(beside)
        view.document(rows)


_register_list(
    "models",
    "Networks",
    _models,
    "Also: torchvision:NAME, timm:NAME (pip install 'hintsearch[timm]'), and your own path/to/file.py:function or "
    "package.module:function, called with num_classes and in_channels.",
)
_register_list(
    "losses",
    "Losses",
    _losses,
    "Also: several hint losses on each pair, such as at+crd, and your own path/to/file.py:function or "
    "package.module:function (see docs/methods.md).",
)
_register_list("metrics", "Layer metrics", _metrics)
_register_list("selectors", "Selectors", _selectors)
_register_list("pairings", "Pairings", _pairings)
_register_list(
    "datasets",
    "Data sets",
    _datasets,
    "Also: a folder with train.npz and test.npz, a folder of images (a folder a class, below train/ and test/ or not), "
    "and your own path/to/file.py:function, which returns map-style train, validation and test.",
)
_register_list(
    "presets",
    "Presets",
    _presets,
    "Recipes go under recipe.preset, combinations of losses with their raw weights under space.preset.",
)
