import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.plots import (
    CLUSTER_COLOURS,
    DOTS_PER_INCH,
    dendrogram,
    distance_map,
    distance_maps,
    scores_along_depth,
    silhouette_curve,
    write_figure,
)
from hintsearch.models.candidates import Candidate
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

MadeUp = Callable[..., tuple[Candidate, ...]]

SPLIT = ((1, 2, 5), (3, 4), (6,))  # the first cluster is not contiguous
# By average linkage 1 and 3 merge at 1, then 2 with them at (2 + 4) / 2 = 3, then 4 at (9 + 8 + 10) / 3 = 9.
TREE = np.array([[0, 2, 1, 9], [2, 0, 4, 8], [1, 4, 0, 10], [9, 8, 10, 0]], dtype=np.float64)


def layers(size: int) -> list[str]:
    return [f"layer1.{i}" for i in range(size)]


def growing(size: int) -> Matrix:
    """Distances that grow with the steps between layers."""
    return np.abs(np.subtract.outer(np.arange(size), np.arange(size))) / size


def texts(axis: Axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def bold(axis: Axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels() if label.get_fontweight() == "bold"]


def diamonds(axes: Axes) -> list[tuple[float, float]]:
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    return [(float(x), float(y)) for line in marks for x, y in zip(*line.get_data(), strict=True)]


def upright_lines(axes: Axes, style: str) -> list[float]:
    found = [line for line in axes.lines if line.get_linestyle() == style and len(set(line.get_xdata())) == 1]
    return [float(line.get_xdata()[0]) for line in found]


def frames(axes: Axes) -> list[tuple[float, float]]:
    """First and last edge of each frame on the diagonal."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    assert all(patch.get_x() == patch.get_y() and patch.get_width() == patch.get_height() for patch in found)
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in found]


def strip(axes: Axes, along_x: bool) -> list[tuple[float, float, str]]:
    """First and last edge and the colour of each run of the strip along an axis."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    if along_x:
        beside = [(p.get_x(), p.get_width(), p) for p in found if p.get_x() >= 0.5]
    else:
        beside = [(p.get_y(), p.get_height(), p) for p in found if p.get_x() < 0.5]
    return [(start, start + length, to_hex(patch.get_facecolor())) for start, length, patch in beside]


# Distance map


@pytest.mark.parametrize("size", [1, 3, 9, 54])
def test_map_names_every_layer_in_depth_order_on_both_axes(size: int) -> None:
    axes = distance_map("map", layers(size), growing(size)).axes[0]
    assert texts(axes.xaxis) == layers(size)
    assert texts(axes.yaxis) == layers(size)
    assert list(axes.get_xticks()) == list(range(1, size + 1))
    assert list(axes.get_yticks()) == list(range(1, size + 1))


def test_map_puts_the_shallowest_layer_above_and_left() -> None:
    axes = distance_map("map", layers(6), growing(6), SPLIT).axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 1 < 6 < right
    assert top < 1 < 6 < bottom


def test_map_shows_the_row_and_column_of_each_layer() -> None:
    matrix = np.arange(9, dtype=np.float64).reshape(3, 3)
    image = distance_map("map", layers(3), matrix).axes[0].images[0]
    assert np.array_equal(np.asarray(image.get_array()), matrix)
    assert tuple(image.get_extent()) == (0.5, 3.5, 3.5, 0.5)
    assert image.origin == "upper"


def test_map_turns_the_names_below_only_where_they_would_overlap() -> None:
    rotations = [
        {label.get_rotation() for label in distance_map("map", layers(n), growing(n)).axes[0].get_xticklabels()}
        for n in (3, 27)
    ]
    assert rotations == [{0.0}, {90.0}]


def test_map_of_many_layers_names_some_with_their_index_and_every_hint_point() -> None:
    axes = distance_map("map", layers(150), growing(150), points=(41, 77)).axes[0]
    named = texts(axes.xaxis)
    assert len(named) <= 62
    assert {"41 layer1.40", "77 layer1.76"} < set(named)
    indices = [int(text.split()[0]) for text in named]
    assert list(axes.get_xticks()) == indices
    assert all(after - before >= 3 for before, after in pairwise(indices))


def test_map_marks_hint_points_on_the_diagonal_and_bold() -> None:
    axes = distance_map("map", layers(6), growing(6), SPLIT, (2, 4, 6)).axes[0]
    assert diamonds(axes) == [(2, 2), (4, 4), (6, 6)]
    assert bold(axes.xaxis) == bold(axes.yaxis) == ["layer1.1", "layer1.3", "layer1.5"]


def test_map_without_hint_points_and_clusters_marks_nothing() -> None:
    figure = distance_map("map", layers(6), growing(6))
    axes = figure.axes[0]
    assert (diamonds(axes), frames(axes), bold(axes.xaxis), figure.legends) == ([], [], [], [])


@pytest.mark.parametrize(
    ("clusters", "edges"),
    [
        (((1, 2, 3), (4,), (5, 6)), [(0.5, 3.5), (3.5, 4.5), (4.5, 6.5)]),
        (SPLIT, [(0.5, 2.5), (2.5, 4.5), (4.5, 5.5), (5.5, 6.5)]),
        (((2,), (5,)), [(1.5, 2.5), (4.5, 5.5)]),
        (((1, 2, 3, 4, 5, 6),), [(0.5, 6.5)]),
    ],
    ids=["contiguous", "not contiguous", "candidates in no cluster", "one cluster"],
)
def test_map_frames_the_runs_of_each_cluster(
    clusters: Sequence[Sequence[int]], edges: list[tuple[float, float]]
) -> None:
    assert frames(distance_map("map", layers(6), growing(6), clusters).axes[0]) == edges


@pytest.mark.parametrize("along_x", [True, False])
def test_map_has_strips_in_which_a_split_cluster_keeps_its_colour_and_number(along_x: bool) -> None:
    axes = distance_map("map", layers(6), growing(6), SPLIT).axes[0]
    first, second, third = CLUSTER_COLOURS[:3]
    assert strip(axes, along_x) == [(0.5, 2.5, first), (2.5, 4.5, second), (4.5, 5.5, first), (5.5, 6.5, third)]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "1", "3"] * 2


def test_map_strips_lie_beside_the_map_not_on_it() -> None:
    axes = distance_map("map", layers(6), growing(6), SPLIT).axes[0]
    for patch in axes.patches:
        if isinstance(patch, Rectangle) and patch.get_fill():
            assert patch.get_x() + patch.get_width() < 0.5 or patch.get_y() > 6.5


@pytest.mark.parametrize(("scale", "largest"), [(4.0, 4 * 5 / 6), (1e-6, 1e-6 * 5 / 6), (0.0, 1.0)])
def test_map_colours_run_from_0_to_the_largest_distance(scale: float, largest: float) -> None:
    image = distance_map("map", layers(6), growing(6) * scale).axes[0].images[0]
    assert image.get_clim() == pytest.approx((0.0, largest))


def test_map_colours_start_at_0_even_if_all_distances_are_large() -> None:
    assert distance_map("map", layers(6), growing(6) + 7).axes[0].images[0].get_clim()[0] == 0


def test_map_has_its_title_and_a_labelled_colour_bar() -> None:
    figure = distance_map("cka of resnet20", layers(6), growing(6), label="1 − CKA")
    assert figure.get_suptitle() == "cka of resnet20"
    assert figure.axes[0].child_axes[0].get_ylabel() == "1 − CKA"


@pytest.mark.parametrize("draw", [distance_map, dendrogram])
def test_a_matrix_of_other_layers_is_an_error(draw: Callable[..., Figure]) -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 5\), but must be \[L, L\] of the 6 layers"):
        draw("map", layers(6), growing(5))


# Small maps


def test_maps_have_one_panel_a_metric_with_its_own_colours_and_title() -> None:
    matrices = {f"metric{i}": growing(9) * (i + 1) for i in range(5)}
    figure = distance_maps(LayerDistances(tuple(layers(9)), matrices, {}, 100))
    assert [axes.get_title() for axes in figure.axes] == list(matrices)
    assert [axes.images[0].get_clim()[1] for axes in figure.axes] == pytest.approx([8 / 9 * i for i in range(1, 6)])
    assert all(len(axes.child_axes) == 1 for axes in figure.axes)


def test_maps_name_the_layers_by_index_from_1() -> None:
    figure = distance_maps(LayerDistances(tuple(layers(27)), {"a": growing(27), "b": growing(27)}, {}, 100))
    assert texts(figure.axes[0].xaxis) == ["1", "5", "10", "15", "20", "25"]
    assert figure.get_supxlabel() == figure.get_supylabel() == "layer index"


def test_maps_above_an_empty_place_keep_their_index_labels() -> None:
    matrices = {f"metric{i}": growing(9) for i in range(5)}
    figure = distance_maps(LayerDistances(tuple(layers(9)), matrices, {}, 100))
    labelled = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes]
    assert labelled == [False, False, True, True, True]


# Dendrogram


def test_dendrogram_merges_at_the_average_distances() -> None:
    collections = dendrogram("tree", layers(4), TREE).axes[0].collections
    links = next(found for found in collections if isinstance(found, LineCollection))
    corners = [
        sorted(map(tuple, segment), key=lambda corner: (corner[1], corner[0])) for segment in links.get_segments()
    ]
    # The leaves are 1, 3, 2, 4 from above to below.
    assert corners == [
        [(0, 1), (1, 1), (0, 2), (1, 2)],
        [(1, 1.5), (3, 1.5), (0, 3), (3, 3)],
        [(3, 2.25), (9, 2.25), (0, 4), (9, 4)],
    ]


def test_dendrogram_names_and_marks_its_leaves_where_they_are() -> None:
    axes = dendrogram("tree", layers(4), TREE, points=(2, 3)).axes[0]
    assert texts(axes.yaxis) == ["layer1.0", "layer1.2", "layer1.1", "layer1.3"]
    assert bold(axes.yaxis) == ["layer1.2", "layer1.1"]
    assert diamonds(axes) == [(0, 3), (0, 2)]
    bottom, top = axes.get_ylim()
    assert top < 1 < 4 < bottom


def test_dendrogram_keeps_depth_order_where_the_tree_allows_it() -> None:
    assert texts(dendrogram("tree", layers(54), growing(54)).axes[0].yaxis) == layers(54)


def test_dendrogram_colours_the_branches_within_a_cluster() -> None:
    axes = dendrogram("tree", layers(4), TREE, ((1, 3), (2, 4))).axes[0]
    links = next(c for c in axes.collections if isinstance(c, LineCollection))
    colours = [to_hex(colour) for colour in links.get_colors()]
    assert colours[0] == CLUSTER_COLOURS[0]
    assert not {colours[1], colours[2]} & set(CLUSTER_COLOURS)
    assert [text.get_text() for text in axes.texts] == ["1", "2"]


def test_dendrogram_leaf_labels_have_the_colours_of_their_clusters() -> None:
    axes = dendrogram("tree", layers(6), growing(6), ((1, 2, 5), (3, 4))).axes[0]
    inks = [to_hex(label.get_color()) for label in axes.get_yticklabels()]
    assert inks[0] == inks[1] == inks[4]
    assert inks[2] == inks[3] != inks[0]
    assert inks[5] == "#000000"


def test_dendrogram_draws_no_negative_distance() -> None:
    assert min(dendrogram("tree", layers(4), TREE, ((1, 3), (2, 4))).axes[0].get_xticks()) == 0


@pytest.mark.parametrize("matrix", [np.zeros((1, 1)), np.zeros((3, 3))], ids=["one layer", "all alike"])
def test_dendrogram_of_no_distances_is_drawn(matrix: Matrix, tmp_path: Path) -> None:
    figure = dendrogram("tree", layers(len(matrix)), matrix, ((1,),), (1,))
    write_figure(tmp_path / "tree.png", figure)
    assert texts(figure.axes[0].yaxis) == layers(len(matrix))


# Silhouette


def test_silhouette_is_drawn_by_k_with_the_chosen_k_marked() -> None:
    axes = silhouette_curve("silhouette", {4: 0.3, 2: 0.5, 3: 0.6}, 3).axes[0]
    curve = next(line for line in axes.lines if line.get_marker() == "o")
    assert [list(values) for values in curve.get_data()] == [[2, 3, 4], [0.5, 0.6, 0.3]]
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert [list(values) for values in star.get_data()] == [[3], [0.6]]
    assert upright_lines(axes, "--") == [3]
    assert axes.get_xlabel() == "number of clusters K"
    assert axes.get_ylabel() == "mean silhouette"


def test_silhouette_marks_a_chosen_k_that_has_no_value() -> None:
    figure = silhouette_curve("silhouette", {2: 0.5, 3: 0.6}, 1)
    assert upright_lines(figure.axes[0], "--") == [1]
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert figure.axes[0].get_xlim()[0] < 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chosen K = 1"]


@pytest.mark.parametrize("largest", [2, 3, 9, 27, 54])
def test_silhouette_ticks_are_whole_numbers_of_clusters(largest: int) -> None:
    ticks = silhouette_curve("silhouette", {k: 1 / k for k in range(2, largest + 1)}, 2).axes[0].get_xticks()
    assert [tick for tick in ticks if tick != round(tick)] == []
    assert len(ticks) >= min(3, largest - 1)


# Scores


def test_scores_have_one_panel_each_over_the_same_layers(made_up: MadeUp) -> None:
    network = made_up(3, 3, 3)
    scores = {"effective_rank": np.arange(9.0), "class_separation": np.arange(9.0) ** 2}
    panels = scores_along_depth(network, scores).axes
    assert [axes.get_ylabel() for axes in panels] == list(scores)
    for axes, values in zip(panels, scores.values(), strict=True):
        curve = next(line for line in axes.lines if line.get_marker() == "o")
        assert [list(data) for data in curve.get_data()] == [list(range(1, 10)), list(values)]
    assert texts(panels[-1].xaxis) == [candidate.path for candidate in network]
    assert [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels] == [False, True]


def test_scores_mark_hint_points_and_stage_changes_in_every_panel(made_up: MadeUp) -> None:
    network = made_up(3, 3, 3)
    figure = scores_along_depth(network, {"a": np.arange(9.0), "b": np.ones(9)}, (2, 9))
    for axes in figure.axes:
        assert upright_lines(axes, "--") == [2, 9]
        assert upright_lines(axes, ":") == [3.5, 6.5]
    assert bold(figure.axes[-1].xaxis) == [network[1].path, network[8].path]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hint point", "stage change"]


def test_scores_of_paths_show_no_stage_changes() -> None:
    figure = scores_along_depth(layers(9), {"a": np.arange(9.0)}, (2,))
    assert upright_lines(figure.axes[0], ":") == []
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hint point"]


# Layout


def drawn(name: str, size: int, clusters: int) -> Figure:
    """A figure with clusters that interleave; without clusters the names and the title are short."""
    paths = [f"{'encoder.' if clusters else ''}layer{i // 9 + 1}.{i}" for i in range(size)]
    members = tuple(tuple(range(k + 1, size + 1, clusters)) for k in range(clusters))
    points = tuple(cluster[0] for cluster in members)
    title = "Average of the distances by r2_cca and cka_linear, clustered by kmedoids" if clusters else "cka"
    if name == "scores":
        scores = {"score": np.arange(size, dtype=np.float64), "linear_probe_accuracy": np.arange(size) * 1e-6}
        return scores_along_depth(paths, scores, points)
    return {"map": distance_map, "dendrogram": dendrogram}[name](title, paths, growing(size) * 1e-5, members, points)


def margin(figure: Figure) -> float:
    """Draws the figure; the least distance, in inches, of its contents from its edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    inches, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    return float(min(inches.x0, inches.y0, width - inches.x1, height - inches.y1))


@pytest.mark.parametrize("name", ["map", "dendrogram", "scores"])
@pytest.mark.parametrize(("size", "clusters"), [(3, 0), (9, 0), (9, 1), (27, 5), (54, 10)])
def test_nothing_is_cut_off_or_overlaps(name: str, size: int, clusters: int) -> None:
    figure = drawn(name, size, clusters)
    assert margin(figure) >= 0
    axes = figure.axes[-1]
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


@pytest.mark.parametrize(("wider", "higher"), [(0.0, 0.5), (1.0, 0.0), (-0.8, -0.2)])
def test_a_map_in_a_room_that_is_not_square_is_not_cut_off(wider: float, higher: float) -> None:
    figure = distance_map("map", layers(3), growing(3))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + wider, height + higher)
    assert margin(figure) >= 0


# Files


def test_written_figure_is_a_png_of_the_figures_size(tmp_path: Path) -> None:
    figure = drawn("map", 54, 10)
    write_figure(tmp_path / "new" / "map.png", figure)
    width, height = figure.get_size_inches()
    rows, columns, _ = imread(tmp_path / "new" / "map.png").shape
    assert (columns, rows) == (int(width * DOTS_PER_INCH), int(height * DOTS_PER_INCH))
    assert (tmp_path / "new" / "map.png").stat().st_size < 500_000


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(b"old")
    figure = drawn("map", 3, 0)

    def fill_the_disk(target: Path, **_options: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_figure(path, figure)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


WITHOUT_PYPLOT = """
import sys
from pathlib import Path
import numpy as np
from hintsearch.analysis import plots
from hintsearch.analysis.layer_distances import LayerDistances
paths, matrix = ("a", "b", "c"), 1 - np.eye(3)
figures = [
    plots.distance_map("map", paths, matrix, ((1, 2), (3,)), (1, 3)),
    plots.distance_maps(LayerDistances(paths, {"cka": matrix}, {}, 10)),
    plots.dendrogram("tree", paths, matrix, ((1, 2), (3,)), (1, 3)),
    plots.silhouette_curve("silhouette", {2: 0.5}, 2),
    plots.scores_along_depth(paths, {"rank": matrix[0]}, (1,)),
]
for figure in figures:
    plots.write_figure(Path(sys.argv[1]), figure)
print("matplotlib.pyplot" in sys.modules)
"""


def test_plotting_needs_no_pyplot(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PYPLOT, str(tmp_path / "figure.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
