"""`hintsearch layers` and `hintsearch hints`: what is known of the teacher before any student is trained."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..models.errors import InputError
from .command_options import AddressOption, FiguresOption, JsonOption, SetOption, StudyArgument

if TYPE_CHECKING:
    from .study import Study


def layers(
    study: StudyArgument,
    overrides: SetOption = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Measure again, even if it is cached.")] = False,
    output: FiguresOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the teacher's layers, show the layer metrics, and draw them."""
    from .figures import check_folder, layer_figures, write_figures
    from .own_code import say_own_code
    from .preparation import prepare
    from .study import load_study
    from .view import View

    view = View(as_json)
    loaded = load_study(study, overrides or ())
    say_own_code(loaded, view)
    folder = _figures_folder(output, loaded)
    check_folder(folder)
    prepared = prepare(loaded, view, address, recompute)
    view.layers(prepared.layers)
    pictures = write_figures(folder, layer_figures(prepared.layers))
    view.figures(pictures)
    distances = prepared.layers.distances
    view.document(
        {
            "candidates": [asdict(candidate) for candidate in prepared.layers.candidates],
            "images": distances.images,
            "widths": distances.widths,
            "scores": {name: values.tolist() for name, values in distances.scores.items()},
            "distances": {name: matrix.tolist() for name, matrix in distances.distances.items()},
            "figures": [str(path) for path in pictures],
        }
    )


def hints(
    study: StudyArgument,
    clusters: Annotated[str, typer.Option(metavar="K", help="Number of hint points, or auto: by the silhouette.")],
    metrics: Annotated[
        str | None,
        typer.Option(metavar="A,B=2", help="Layer metrics to combine, with weights. [default: the study's]"),
    ] = None,
    selector: Annotated[str, typer.Option(help="A selector or a control selector.")] = "paper_kmeans",
    pairing: Annotated[str, typer.Option(help="How hint points find student layers.")] = "by_depth",
    output: FiguresOption = None,
    overrides: SetOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose hint points without training a student, and draw them."""
    from ..analysis.hint_selection import AUTO, CONTROL_SELECTORS, SELECTORS
    from ..analysis.pairing import BY_SIMILARITY, PAIRINGS, used_pairing
    from .figures import check_folder, hint_figures, write_figures
    from .own_code import say_own_code
    from .preflight import check_clusters, check_without_data
    from .preparation import HintChoice, choose_hints, prepare, with_similarity
    from .study import load_study
    from .view import View

    view = View(as_json)
    loaded = load_study(study, overrides or ())
    say_own_code(loaded, view)
    names, weights = _metrics(metrics, loaded)
    if selector not in CONTROL_SELECTORS:
        SELECTORS.entry(selector)
    PAIRINGS.entry(pairing)
    points = _clusters(clusters)
    if points != AUTO:
        check_clusters("--clusters", points, loaded.teacher.model, len(check_without_data(loaded).teacher))
    folder = _figures_folder(output, loaded)
    check_folder(folder)
    prepared = prepare(loaded, view, address)
    used = used_pairing(selector, pairing)
    if used == BY_SIMILARITY and prepared.similarity is None:
        prepared = with_similarity(prepared, loaded, view, address)
    selection, pairs = choose_hints(prepared, HintChoice(points, names, weights, selector, pairing, loaded.seed))
    view.selection(selection, pairs, used)
    if selection.metrics and not prepared.layers.distances.tell_apart(selection.metrics):
        view.say(f"{', '.join(selection.metrics)} finds all layers equally far apart: these clusters mean nothing.")
    pictures = write_figures(folder, hint_figures(prepared.layers, selection))
    view.figures(pictures)
    view.document(
        {
            **asdict(selection),
            "pairing": used,
            "pairs": [{"teacher_layer": ours, "student_layer": theirs} for ours, theirs in pairs],
            "figures": [str(path) for path in pictures],
        }
    )


def _figures_folder(output: str | None, study: "Study") -> Path:
    return Path(output) if output else Path("figures") / study.name


def _clusters(given: str) -> int | Literal["auto"]:
    if given == "auto":
        return "auto"
    try:
        return int(given)
    except ValueError:
        raise InputError(f"--clusters is {given!r}, but must be a number or auto") from None


def _metrics(given: str | None, study: "Study") -> tuple[tuple[str, ...], dict[str, float]]:
    """Names and weights of `a,b=2`; the study's if none are given."""
    from ..analysis.layer_metrics import check_metric

    if given is None:
        return study.space.hints.metrics, study.space.hints.metric_weights
    weights: dict[str, float] = {}
    names: Sequence[str] = [_weighted(part, weights) for part in given.split(",")]
    for metric in names:
        check_metric(metric)
        if names.count(metric) > 1:
            raise InputError(f"--metrics names {metric!r} twice, but each may stand once; remove one")
        if metric not in study.layers.metrics:
            raise InputError(f"--metrics has {metric!r}, which layers.metrics does not measure; add it there by --set")
    return tuple(names), weights


def _weighted(part: str, weights: dict[str, float]) -> str:
    from ..analysis.layer_distances import check_weight

    name, separator, weight = (piece.strip() for piece in part.partition("="))
    if not name:
        raise InputError("--metrics has an empty name between its commas; write a,b or a,b=2")
    if separator:
        try:
            number = float(weight)
        except ValueError:
            raise InputError(f"--metrics has {part.strip()!r}, but a weight must be a number; write {name}=2") from None
        weights[name] = check_weight(name, number)
    return name
