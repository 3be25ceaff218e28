"""Pictures of a teacher's layers and of the hint points chosen among them.

Figures are built without pyplot: no window system, no global state. The layer of index i (1-based, by depth) lies at
coordinate i of every axis of layers.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from ..models.candidates import Candidate, stage_ends
from ..models.files import replacing
from .layer_distances import LayerDistances
from .layer_statistics import Matrix

Clusters = Sequence[Sequence[int]]

MAP_COLOURS = "viridis"
# Petroff 2021, arXiv 2107.02270: ten colours told apart with each common colour vision deficiency.
CLUSTER_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
DOTS_PER_INCH = 150

_DARK = "#333333"
_FAINT = "#888888"
_HINT = "#d55e00"
_CURVE = "#0072b2"
_MOST_LABELS = 60  # along one axis of a map; beyond, only some layers are named
_PITCH = 0.15  # inches from one label of a layer to the next
_STRIP = 0.17  # inches, the breadth of a strip of clusters
_GAP = 0.03  # inches, between a strip and what it belongs to
_BAR = 1.0  # inches, a colour bar with its labels
_TREE = 4.5  # inches, the width of a dendrogram
_FONT = 8  # points, the names of layers
_READABLE = 0.18  # relative luminance at which black and white text are equally readable


def distance_map(
    title: str,
    paths: Sequence[str],
    matrix: Matrix,
    clusters: Clusters = (),
    points: Sequence[int] = (),
    label: str = "distance",
) -> Figure:
    """Draws the distances between layers as a heat map, with the clusters framed and the hint points on the diagonal.

    Each run of neighbours of one cluster is framed, so a cluster that is not contiguous in depth shows as several
    frames; the numbered strips along the axes tell which belong together.

    Args:
        title: of the figure.
        paths: the L candidates in depth order.
        matrix: [L, L], at least 0.
        clusters: 1-based indices of the candidates of each cluster; a candidate may be in none.
        points: 1-based indices of the hint points.
        label: of the colour bar.

    Raises:
        ValueError: `matrix` is not [L, L].
    """
    _check_shape(paths, matrix)
    size = len(paths)
    side = max(3.2, _PITCH * min(size, _MOST_LABELS))
    reach = _label_reach(paths)
    upright = reach > side / size
    strip = _STRIP + _GAP if clusters else 0.0
    figure = _figure(title, side + strip + reach + _BAR, side + strip + (reach if upright else 0.3) + 0.15)
    axes = figure.subplots()
    image = _draw_map(axes, matrix)
    inch = size / side
    if clusters:
        _draw_clusters(axes, _owners(size, clusters), _STRIP * inch, _GAP * inch)
    _name_layers(axes.xaxis, paths, points, upright=upright)
    _name_layers(axes.yaxis, paths, points)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    _mark_points(axes, points, points, min(9.0, max(4.5, 36 / inch)))
    bar = _add_colour_bar(axes, image, bottom=strip / (side + strip), width=0.15 / side)
    bar.set_label(label, fontsize=9)
    _explain_marks(figure, clusters, points)
    return figure


def distance_maps(distances: LayerDistances) -> Figure:
    """Draws every metric's distances as small maps with a colour scale each, the layers by their 1-based index."""
    columns = math.ceil(math.sqrt(len(distances.distances)))
    rows = math.ceil(len(distances.distances) / columns)
    title = f"Distances between {len(distances.paths)} layers, measured on {distances.images} images"
    figure = _figure(title, 2.4 * columns + 0.2, 2.1 * rows + 0.3)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, (metric, matrix) in zip(panels, distances.distances.items(), strict=False):
        _check_shape(distances.paths, matrix)
        image = _draw_map(axes, matrix)
        _add_colour_bar(axes, image, bottom=0.0, width=0.05)
        axes.set_title(textwrap.fill(metric, 28), fontsize=9)
    panels[0].set_xticks(_index_ticks(len(distances.paths)))
    panels[0].set_yticks(_index_ticks(len(distances.paths)))
    for axes in panels[len(distances.distances) :]:
        axes.remove()
    for axes in panels[: len(distances.distances)][-columns:]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("layer index", fontsize=9)
    figure.supylabel("layer index", fontsize=9)
    return figure


def dendrogram(
    title: str, paths: Sequence[str], matrix: Matrix, clusters: Clusters = (), points: Sequence[int] = ()
) -> Figure:
    """Draws the average linkage of the layers as a tree, the shallower branch above.

    A branch within one cluster has the cluster's colour, as have the labels of its leaves. Clusters come from another
    method than the linkage, so they need not be branches.

    Args:
        title: of the figure.
        paths: the L candidates in depth order.
        matrix: [L, L], symmetric, zero on the diagonal.
        clusters: 1-based indices of the candidates of each cluster; a candidate may be in none.
        points: 1-based indices of the hint points.

    Raises:
        ValueError: `matrix` is not [L, L].
    """
    _check_shape(paths, matrix)
    height = max(1.5, _PITCH * len(paths))
    figure = _figure(title, _TREE + _label_reach(paths) + 0.3, height + 0.6)
    axes = figure.subplots()
    owners = _owners(len(paths), clusters)
    leaves, top = _draw_tree(axes, matrix, owners)
    inch = top / _TREE
    left = -(_STRIP + 3 * _GAP) * inch if clusters else 0.0
    _draw_strip(axes, [owners[leaf - 1] for leaf in leaves], left, _STRIP * inch, along_x=False)
    rows = [leaves.index(point) + 1 for point in points]
    _mark_points(axes, [0.0] * len(rows), rows, 5.0)
    axes.set_xlim(left, top * 1.03)
    axes.set_xticks([tick for tick in _round_ticks(6).tick_values(0, top) if 0 <= tick <= top * 1.03])
    axes.set_xlabel("distance of merging (average linkage)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(paths) + 0.7, 0.3)
    _name_leaves(axes, paths, leaves, owners, points)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, top * 1.03)
    _explain_marks(figure, clusters, points)
    return figure


def silhouette_curve(title: str, values: dict[int, float], chosen: int) -> Figure:
    """Draws the mean silhouette against the number of clusters K, with the chosen K marked.

    Args:
        title: of the figure.
        values: mean silhouette, −1..1, by K.
        chosen: K; only a line marks it if it is not in `values`.
    """
    figure = _figure(title, 4.8, 3.0)
    axes = figure.subplots()
    numbers = sorted(values)
    axes.axvline(chosen, color=_HINT, linewidth=1, linestyle="--", zorder=1)
    axes.plot(numbers, [values[number] for number in numbers], color=_CURVE, marker="o", markersize=4, linewidth=1.2)
    handle = Line2D([], [], color=_HINT, linewidth=1, linestyle="--", label=f"chosen K = {chosen}")
    if chosen in values:
        star: dict[str, Any] = {"color": _HINT, "marker": "*", "markersize": 13, "markeredgecolor": "white"}
        axes.plot([chosen], [values[chosen]], linestyle="none", zorder=5, **star)
        handle.set(**star)
    axes.set_xlim(min([chosen, *numbers]) - 0.5, max([chosen, *numbers]) + 0.5)
    axes.xaxis.set_major_locator(_round_ticks(14, integer=True))
    axes.set_xlabel("number of clusters K", fontsize=9)
    axes.set_ylabel("mean silhouette", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(figure, [handle])
    return figure


def scores_along_depth(
    layers: Sequence[Candidate] | Sequence[str], scores: Mapping[str, Matrix], points: Sequence[int] = ()
) -> Figure:
    """Draws each score of the layers against depth, one above the other.

    Args:
        layers: the L candidates in depth order, or their paths; stage changes are drawn for candidates only.
        scores: by name, the value of each candidate [L].
        points: 1-based indices of the hint points.
    """
    paths = [layer.path if isinstance(layer, Candidate) else layer for layer in layers]
    candidates = [layer for layer in layers if isinstance(layer, Candidate)]
    changes = [end.index + 0.5 for end in stage_ends(candidates)[:-1]] if candidates else []
    panel = max(1.1, 0.08 * max(len(name) for name in scores))
    width = max(3.5, _PITCH * min(len(paths), _MOST_LABELS))
    upright = _label_reach(paths) > width / len(paths)
    height = panel * len(scores) + (_label_reach(paths) if upright else 0.3) + 0.15
    figure = _figure("", width + 0.9, height)
    panels = list(figure.subplots(len(scores), sharex=True, squeeze=False).flat)
    for axes, (name, values) in zip(panels, scores.items(), strict=True):
        _mark_depths(axes, changes, points)
        axes.plot(range(1, len(paths) + 1), values, color=_CURVE, marker="o", markersize=3, linewidth=1.2)
        axes.set_ylabel(name, fontsize=9, labelpad=7)
        axes.yaxis.set_major_locator(_round_ticks(4))
        axes.tick_params(axis="y", labelsize=8)
        axes.tick_params(axis="x", length=2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlim(0.4, len(paths) + 0.6)
    _name_layers(panels[-1].xaxis, paths, points, upright=upright)
    panels[-1].set_xlabel("layer", fontsize=9)
    figure.align_ylabels(panels)
    hint = Line2D([], [], color=_HINT, linewidth=1.2, linestyle="--", label="hint point")
    stage = Line2D([], [], color=_FAINT, linewidth=0.8, linestyle=":", label="stage change")
    _add_legend(figure, ([hint] if points else []) + ([stage] if changes else []))
    return figure


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, whole or not at all; folders are made where they are missing."""
    with replacing(path) as temporary:
        # The temporary name does not end in .png, from which matplotlib would tell the format.
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def _check_shape(paths: Sequence[str], matrix: Matrix) -> None:
    if matrix.shape != (len(paths), len(paths)):
        raise ValueError(f"the matrix has shape {matrix.shape}, but must be [L, L] of the {len(paths)} layers")


def _figure(title: str, width: float, height: float) -> Figure:
    """An empty figure with its title wrapped to its width; room for the title is added to `height` (inches)."""
    lines = textwrap.wrap(title, max(20, int(width * 10.5)))
    # Without compression the labels of a square map can be cut off where its room is not square.
    layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07, compress=True)
    figure = Figure(figsize=(width, height + 0.22 * len(lines)), layout=layout)
    if lines:
        figure.suptitle("\n".join(lines), fontsize=11)
    return figure


def _explain_marks(figure: Figure, clusters: Clusters, points: Sequence[int]) -> None:
    square: dict[str, Any] = {"marker": "s", "markersize": 7, "linestyle": "none", "color": CLUSTER_COLOURS[0]}
    hint = Line2D([], [], label="hint point", **_marker(5.0))
    cluster = Line2D([], [], label="cluster (numbered)", **square)
    _add_legend(figure, ([hint] if points else []) + ([cluster] if clusters else []))


def _add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    if handles:
        figure.set_figheight(figure.get_figheight() + 0.25)
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)


def _mark_points(axes: Axes, x: Sequence[float], y: Sequence[float], size: float) -> None:
    # An empty line without clipping would count as a point in the figure's corner when the layout is made.
    if x:
        axes.plot(x, y, zorder=5, clip_on=False, **_marker(size))


def _marker(size: float) -> dict[str, Any]:
    colours = {"markerfacecolor": "white", "markeredgecolor": "black"}
    return {"marker": "D", "markersize": size, "linestyle": "none", **colours}


def _round_ticks(most: int, integer: bool = False) -> MaxNLocator:
    """At most `most` steps of 1, 2, 2.5 or 5 times a power of ten; by default there would be steps of 1.5 and 3 too."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer, min_n_ticks=1 if integer else 3)


# Heat maps


def _draw_map(axes: Axes, matrix: Matrix) -> AxesImage:
    """The heat map, with the colours from 0 up: how dark a block is tells how alike its layers are."""
    size = len(matrix)
    largest = float(matrix.max())
    axes.tick_params(labelsize=8, length=2)
    axes.spines[:].set_visible(False)
    return axes.imshow(
        matrix,
        cmap=MAP_COLOURS,
        vmin=0.0,
        vmax=largest if largest > 0 else 1.0,
        extent=(0.5, size + 0.5, size + 0.5, 0.5),
        interpolation="nearest",
    )


def _add_colour_bar(axes: Axes, image: AxesImage, bottom: float, width: float) -> Colorbar:
    """A colour bar as high as the map; an inset follows the square map, a bar of the figure's own would not."""
    inset = axes.inset_axes((1 + 0.6 * width, bottom, width, 1 - bottom))
    bar = axes.figure.colorbar(image, cax=inset, ticks=_round_ticks(5), format="%.4g")
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    return bar


def _index_ticks(size: int) -> list[int]:
    step = next(step for power in range(9) for step in (10**power, 5 * 10**power) if size <= 10 * step)
    return [1, *range(max(step, 2), size + 1, step)]


def _draw_clusters(axes: Axes, owners: Sequence[int], breadth: float, gap: float) -> None:
    """Frames the runs of each cluster on the diagonal, and widens the axes by strips beside them."""
    for run in _runs(owners):
        corner = (run.first - 0.5, run.first - 0.5)
        frame = Rectangle(corner, run.length, run.length, fill=False, edgecolor="white", linewidth=1.2, clip_on=False)
        # White alone is lost on the bright end of the colours.
        frame.set_path_effects([withStroke(linewidth=2.4, foreground=_DARK)])
        axes.add_patch(frame)
    size = len(owners)
    _draw_strip(axes, owners, 0.5 - gap - breadth, breadth, along_x=False)
    _draw_strip(axes, owners, size + 0.5 + gap, breadth, along_x=True)
    axes.set_xlim(0.5 - gap - breadth, size + 0.5)
    axes.set_ylim(size + 0.5 + gap + breadth, 0.5)


def _draw_strip(axes: Axes, owners: Sequence[int], start: float, breadth: float, along_x: bool) -> None:
    """A strip beside an axis of layers with each run of one cluster in its colour, under its number."""
    for run in _runs(owners):
        along, across = (run.first - 0.5, run.length), (start, breadth)
        (x, width), (y, height) = (along, across) if along_x else (across, along)
        colour = _colour(run.cluster)
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=0.6))
        if len(owners) <= _MOST_LABELS:
            ink = "black" if _luminance(colour) > _READABLE else "white"
            centre = x + width / 2, y + height / 2
            axes.text(*centre, str(run.cluster), ha="center", va="center_baseline", fontsize=6.5, color=ink)


# Clusters


@dataclass(frozen=True)
class _Run:
    """Neighbouring layers of one cluster: the 1-based position of the first, and how many there are."""

    cluster: int
    first: int
    length: int


def _owners(size: int, clusters: Clusters) -> list[int]:
    """Of each candidate, the 1-based number of its cluster, or 0."""
    owners = [0] * size
    for number, members in enumerate(clusters, start=1):
        for index in members:
            owners[index - 1] = number
    return owners


def _runs(owners: Sequence[int]) -> list[_Run]:
    runs: list[_Run] = []
    first = 1
    for cluster, members in groupby(owners):
        length = len(list(members))
        if cluster:
            runs.append(_Run(cluster, first, length))
        first += length
    return runs


def _colour(cluster: int) -> str:
    return CLUSTER_COLOURS[(cluster - 1) % len(CLUSTER_COLOURS)]


def _luminance(colour: str) -> float:
    """Relative luminance, 0..1, with the display's curve taken as a power of 2.2."""
    return float(np.dot((0.2126, 0.7152, 0.0722), np.power(to_rgb(colour), 2.2)))


def _ink(colour: str) -> tuple[float, float, float]:
    """The colour, darkened until text of it is readable on white."""
    shade = min(1.0, (_READABLE / _luminance(colour)) ** (1 / 2.2))
    red, green, blue = to_rgb(colour)
    return red * shade, green * shade, blue * shade


# Names of layers


def _label_reach(paths: Sequence[str]) -> float:
    """Inches that the longest path takes, estimated from the mean breadth of a bold letter."""
    return 0.15 + 0.66 * _FONT / 72 * max(len(path) for path in paths)


def _name_layers(axis: Axis, paths: Sequence[str], points: Sequence[int], upright: bool = False) -> None:
    """Labels an axis with the layers, hint points bold; where only some have room, their index is named too."""
    shown = _shown(len(paths), points)
    labels = [paths[i - 1] if len(shown) == len(paths) else f"{i} {paths[i - 1]}" for i in shown]
    axis.set_ticks(shown, labels=labels, fontsize=_FONT, rotation=90 if upright else 0)
    _embolden(axis, shown, points)


def _shown(size: int, points: Sequence[int]) -> list[int]:
    """Indices that have room for a label: all if they are few, else evenly spaced ones; hint points before others."""
    step = math.ceil(size / _MOST_LABELS)
    kept = [i for i in range(1, size + 1, step) if all(abs(i - point) >= step for point in points)]
    return sorted({*kept, *points})


def _embolden(axis: Axis, order: Sequence[int], points: Sequence[int]) -> None:
    for label, index in zip(axis.get_ticklabels(), order, strict=True):
        label.set_fontweight("bold" if index in points else "normal")


def _mark_depths(axes: Axes, changes: Sequence[float], points: Sequence[int]) -> None:
    for change in changes:
        axes.axvline(change, color=_FAINT, linewidth=0.8, linestyle=":", zorder=1)
    for point in points:
        axes.axvline(point, color=_HINT, linewidth=1.2, linestyle="--", zorder=1)


# The tree


def _draw_tree(axes: Axes, matrix: Matrix, owners: Sequence[int]) -> tuple[tuple[int, ...], float]:
    """Draws the links; returns the 1-based leaves from above to below and the largest distance of a merge."""
    size = len(matrix)
    # Linkage knows no tree of a single layer.
    merges = hierarchy.linkage(squareform(matrix, checks=False), "average") if size > 1 else np.zeros((0, 4))
    members: list[tuple[int, ...]] = [(leaf,) for leaf in range(1, size + 1)]
    for first, second in merges[:, :2].astype(int):
        above, below = sorted((members[first], members[second]))
        members.append(above + below)
    leaves = members[-1]
    ends = [(0.0, float(leaves.index(leaf) + 1)) for leaf in range(1, size + 1)]
    links, colours = [], []
    for (first, second, distance, _), beneath in zip(merges, members[size:], strict=True):
        (start, above_at), (stop, below_at) = ends[int(first)], ends[int(second)]
        links.append([(start, above_at), (distance, above_at), (distance, below_at), (stop, below_at)])
        found = {owners[leaf - 1] for leaf in beneath}
        colours.append(_colour(found.pop()) if len(found) == 1 and 0 not in found else _DARK)
        ends.append((float(distance), (above_at + below_at) / 2))
    axes.add_collection(LineCollection(links, colors=colours, linewidths=1.4))
    return leaves, max((float(distance) for distance in merges[:, 2]), default=0.0) or 1.0


def _name_leaves(
    axes: Axes, paths: Sequence[str], leaves: Sequence[int], owners: Sequence[int], points: Sequence[int]
) -> None:
    labels = [paths[leaf - 1] for leaf in leaves]
    axes.yaxis.set_ticks(range(1, len(leaves) + 1), labels=labels, fontsize=_FONT)
    axes.tick_params(axis="y", length=0)
    _embolden(axes.yaxis, leaves, points)
    for label, leaf in zip(axes.get_yticklabels(), leaves, strict=True):
        if owners[leaf - 1]:
            label.set_color(_ink(_colour(owners[leaf - 1])))
