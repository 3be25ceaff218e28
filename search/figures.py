"""The pictures of a teacher's layers and of hint points, as files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis.hint_selection import SELECTORS, HintSelection, silhouettes
from ..models.errors import InputError
from .layers import Layers

LAYER_DISTANCES, LAYER_SCORES = "layer-distances.png", "layer-scores.png"
HINT_PICTURES = frozenset({"hint-distances.png", "hint-dendrogram.png", "hint-silhouette.png", "hint-scores.png"})

# By file name; typed Any, for matplotlib is imported in analysis/plots.py only.
Figures = dict[str, Any]


def layer_pictures(folder: Path, layers: Layers) -> list[Path]:
    """The files of `layer_figures` in the folder of a search, drawn if they are not there: its layers stay the same."""
    names = [LAYER_DISTANCES, *([LAYER_SCORES] if layers.distances.scores else [])]
    drawn = [folder / name for name in names]
    return drawn if all(picture.is_file() for picture in drawn) else write_figures(folder, layer_figures(layers))


def layer_figures(layers: Layers) -> Figures:
    """The distances of every metric, and the scores along depth if there are any."""
    # matplotlib takes half a second to import, which every other command would pay.
    from ..analysis.plots import distance_maps, scores_along_depth

    figures: Figures = {LAYER_DISTANCES: distance_maps(layers.distances)}
    if layers.distances.scores:
        figures[LAYER_SCORES] = scores_along_depth(layers.candidates, layers.distances.scores)
    return figures


def hint_figures(layers: Layers, selection: HintSelection) -> Figures:
    """The combined distances with clusters and hint points, dendrogram, silhouettes, scores.

    A control selection looked at no metrics: only the scores are drawn, with its points.
    """
    from ..analysis.plots import dendrogram, distance_map, scores_along_depth, silhouette_curve

    distances = layers.distances
    figures: Figures = {}
    if selection.selector in SELECTORS:
        weights = dict(zip(selection.metrics, selection.weights, strict=True)) if selection.weights else None
        combined = distances.combined(selection.metrics, weights)
        metrics = ", ".join(f"{name} ×{weights[name]:g}" if weights else name for name in selection.metrics)
        title = f"{len(selection.points)} hint points by {selection.selector} on {metrics}"
        parts = distances.paths, combined, selection.clusters, selection.indices
        figures["hint-distances.png"] = distance_map(title, *parts, label="combined distance")
        figures["hint-dendrogram.png"] = dendrogram(title, *parts)
        curve = silhouettes(distances, selection.metrics, selection.selector, weights)
        if curve:
            figures["hint-silhouette.png"] = silhouette_curve(
                f"Medoid silhouette of {selection.selector} on {metrics}", curve, len(selection.points)
            )
    if distances.scores:
        figures["hint-scores.png"] = scores_along_depth(layers.candidates, distances.scores, selection.indices)
    return figures


def write_figures(folder: Path, figures: Mapping[str, Any]) -> list[Path]:
    """Writes each figure as a PNG into the folder, which is made if it is not there; returns the files.

    Pictures of hint points that were written there before and are not drawn now would tell of other points: they go.
    """
    from ..analysis.plots import write_figure

    for name, figure in figures.items():
        write_figure(folder / name, figure)
    if not HINT_PICTURES.isdisjoint(figures):
        for name in HINT_PICTURES.difference(figures):
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in figures]


def check_folder(folder: Path) -> None:
    """Raises `InputError` before any work is done if pictures cannot be written there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"--output is {folder}, but {place} is a file; name a folder")
    if not os.access(place, os.W_OK):
        raise InputError(f"--output is {folder}, but {place} cannot be written; name another folder")
