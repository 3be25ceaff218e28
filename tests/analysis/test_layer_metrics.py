"""What holds of every registered layer metric, pairwise or score, and how they become distances."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hintsearch.analysis.layer_metrics import (
    ALL_METRICS,
    check_enough_images,
    check_metric,
    layer_distances,
    metric_names,
    what_they_read,
)
from hintsearch.analysis.layer_reading import Wanted
from hintsearch.analysis.layer_scores import SCORES
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.measurement import LayerEvidence
from hintsearch.analysis.pairwise_metrics import PAIRWISE
from hintsearch.analysis.reading_plan import Columns, plan_reading
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from made_layers import Labels, MadeLayers, measurement_of, plan_of, related_layers

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.lists(st.integers(1, 8), min_size=3, max_size=3)
KINDS = st.sampled_from(["plain", "rectified"])

# Changes the feature maps [N, C, H, W] of a layer.
Transformation = Callable[[Matrix, np.random.Generator], Matrix]


def mixed(maps: Matrix, matrix: Matrix) -> Matrix:
    """The channels of each point times the matrix."""
    return np.asarray(np.einsum("nchw,cd->ndhw", maps, matrix))


def orthogonal(size: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def invertible(size: int, rng: np.random.Generator) -> Matrix:
    return orthogonal(size, rng) @ np.diag(np.geomspace(0.1, 10, size)) @ orthogonal(size, rng)


def signs(size: int, rng: np.random.Generator) -> Matrix:
    return np.diag(rng.choice([-1.0, 1.0], size))


def permutation(size: int, rng: np.random.Generator) -> Matrix:
    return np.eye(size)[rng.permutation(size)]


# Whatever a metric declares under `invariances` has to be here, and is tried on it.
TRANSFORMATIONS: dict[str, Transformation] = {
    "all": lambda maps, rng: np.exp(rng.standard_normal(maps.shape)),
    "invertible linear maps": lambda maps, rng: mixed(maps, invertible(maps.shape[1], rng)),
    "orthogonal maps": lambda maps, rng: mixed(maps, orthogonal(maps.shape[1], rng)),
    "isotropic scaling": lambda maps, rng: maps * 10 ** rng.uniform(-2, 2),
    "translation": lambda maps, rng: maps + 100 * rng.standard_normal((maps.shape[1], 1, 1)),
    "permutations and sign flips of channels": lambda maps, rng: mixed(
        maps, signs(maps.shape[1], rng) @ permutation(maps.shape[1], rng)
    ),
    "permutations": lambda maps, rng: mixed(maps, permutation(maps.shape[1], rng)),
    "sign flips and scaling of channels": lambda maps, rng: mixed(
        maps, signs(maps.shape[1], rng) * 10 ** rng.uniform(-2, 2, maps.shape[1])
    ),
}
# What else holds where an invariance does.
_FLIPS = {"permutations and sign flips of channels", "permutations"}
IMPLIED: dict[str, set[str]] = {
    "all": set(TRANSFORMATIONS),
    "invertible linear maps": {
        "orthogonal maps",
        "isotropic scaling",
        "sign flips and scaling of channels",
        *_FLIPS,
    },
    "orthogonal maps": _FLIPS,
    "permutations and sign flips of channels": {"permutations"},
    "sign flips and scaling of channels": {"isotropic scaling"},
}


def declared(name: str) -> set[str]:
    entry = PAIRWISE.entry(name) if name in PAIRWISE else SCORES.entry(name)
    return set(entry.facts["invariances"].split(", "))


def holding(name: str) -> set[str]:
    """The declared invariances and those that follow from them."""
    stated = declared(name)
    implied = stated.union(*(IMPLIED.get(phrase, set()) for phrase in stated))
    if {"permutations", "sign flips and scaling of channels"} <= implied:
        implied.add("permutations and sign flips of channels")
    return implied


DECLARED = [(name, phrase) for name in metric_names() for phrase in sorted(declared(name))]
NOT_DECLARED = [(name, phrase) for name in metric_names() for phrase in TRANSFORMATIONS if phrase not in holding(name)]


def values(name: str, layers: MadeLayers) -> Matrix:
    """All that the metric says of the layers: distances, and scores if it is one."""
    found = layer_distances(layers.measured(), [name])
    return np.concatenate([found.distances[name].ravel(), found.scores.get(name, np.zeros(0))])


def transformed(layers: MadeLayers, phrase: str, rng: np.random.Generator) -> MadeLayers:
    return layers.having([TRANSFORMATIONS[phrase](maps, rng) for maps in layers.maps])


@pytest.mark.parametrize(("name", "phrase"), DECLARED)
@given(widths=WIDTHS, kind=KINDS, seed=SEEDS)
@settings(deadline=None, max_examples=15)
def test_declared_invariance_holds(name: str, phrase: str, widths: list[int], kind: str, seed: int) -> None:
    layers = related_layers(widths, seed, kind)
    moved = transformed(layers, phrase, np.random.default_rng(seed))
    np.testing.assert_allclose(values(name, moved), values(name, layers), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "phrase"), NOT_DECLARED)
def test_what_is_not_declared_does_not_hold(name: str, phrase: str) -> None:
    layers = related_layers([5, 8, 3], 1, "rectified", classes=7)
    with_dead = np.concatenate([layers.maps[0], np.zeros_like(layers.maps[0][:, :1])], axis=1)
    layers = layers.having([with_dead, *layers.maps[1:]])
    moved = transformed(layers, phrase, np.random.default_rng(0))
    assert np.abs(values(name, moved) - values(name, layers)).max() > 1e-3


# What a declared `range` says, for a layer of so many channels.
RANGES: dict[str, Callable[[int], tuple[float, float]]] = {
    "0..1": lambda channels: (0, 1),
    "0..2": lambda channels: (0, 2),
    "0..π/2": lambda channels: (0, np.pi / 2),
    "0..∞": lambda channels: (0, np.inf),
    "1..channels (0 for a constant layer)": lambda channels: (0, channels),
}


def assert_in_range(name: str, layers: MadeLayers) -> None:
    """Of pairwise distances and of scores; NaN fails too."""
    found = layer_distances(layers.measured(), [name])
    if name in PAIRWISE:
        low, high = RANGES[PAIRWISE.entry(name).facts["range"]](0)
        assert ((found.distances[name] >= low) & (found.distances[name] <= high)).all()
        return
    for maps, score in zip(layers.maps, found.scores[name], strict=True):
        low, high = RANGES[SCORES.entry(name).facts["range"]](maps.shape[1])
        # Rounding may go beyond the end.
        assert low - 1e-9 <= score <= high * (1 + 1e-9)


@pytest.mark.parametrize("name", metric_names())
@given(widths=WIDTHS, kind=KINDS, seed=SEEDS)
@settings(deadline=None, max_examples=8)
def test_values_lie_in_their_declared_range(name: str, widths: list[int], kind: str, seed: int) -> None:
    assert_in_range(name, related_layers(widths, seed, kind))


@pytest.mark.parametrize("name", metric_names())
@given(widths=WIDTHS, kind=KINDS, seed=SEEDS)
@settings(deadline=None, max_examples=8)
def test_distances_are_symmetric_and_0_on_the_diagonal(name: str, widths: list[int], kind: str, seed: int) -> None:
    matrix = layer_distances(related_layers(widths, seed, kind).measured(), [name]).distances[name]
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 0)


# Of the place in the network, whatever the layer.
BY_PLACE = {"relative_depth", "multiply_adds"}


@pytest.mark.parametrize("name", [name for name in metric_names() if name not in BY_PLACE])
@given(widths=WIDTHS, kind=KINDS, seed=SEEDS)
@settings(deadline=None, max_examples=8)
def test_equal_layers_are_at_distance_0(name: str, widths: list[int], kind: str, seed: int) -> None:
    layers = related_layers(widths, seed, kind)
    again = layers.having([*layers.maps, layers.maps[0]])
    matrix = layer_distances(again.measured(), [name]).distances[name]
    # An angle has but half the digits of its cosine near 0.
    assert matrix[0, 3] == pytest.approx(0, abs=1e-6 if name == "procrustes" else 1e-9)
    np.testing.assert_allclose(matrix[0, 1:3], matrix[3, 1:3], rtol=1e-6, atol=1e-9)


def degenerate(kind: str, maps: Matrix) -> Matrix:
    """A layer in which something is missing, made from one in which nothing is."""
    images = np.arange(len(maps))[:, None, None, None]
    made: dict[str, Matrix] = {
        "constant": np.full_like(maps, 0.1),
        "constant and large": np.full_like(maps, -1e6 / 3),
        "zero": np.zeros_like(maps),
        "single channel": maps[:, :1],
        "single constant channel": np.full_like(maps[:, :1], 0.1),
        "duplicate channels": np.concatenate([maps, maps], axis=1),
        "collinear channels": maps[:, :1] * np.arange(1.0, 5)[:, None, None],
        "dead channel": np.concatenate([maps, np.zeros_like(maps[:, :1])], axis=1),
        "constant channel": np.concatenate([maps, np.full_like(maps[:, :1], 7)], axis=1),
        "only one image differs": np.where(images == 0, maps, 0.1),
        "only one image differs, but in no first chunk": np.where(images == 60, maps, 0.1),
        "constant in the first group": np.where(images < 31, 0.1, maps),
        "two values": np.where(maps[:, :1] > 0, 1.0, 0.0).mean(axis=(2, 3), keepdims=True).round(),
        "tiny": 1e-12 * maps,
        "large": 1e12 * maps,
        "more channels than images": np.concatenate([maps + maps[::-1] ** power for power in range(2, 50)], axis=1),
        "equal": maps,
    }
    return made[kind]


DEGENERATE = (
    "constant",
    "constant and large",
    "zero",
    "single channel",
    "single constant channel",
    "duplicate channels",
    "collinear channels",
    "dead channel",
    "constant channel",
    "only one image differs",
    "only one image differs, but in no first chunk",
    "constant in the first group",
    "two values",
    "tiny",
    "large",
    "more channels than images",
    "equal",
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", metric_names())
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_layer_has_a_value_in_range(name: str, kind: str) -> None:
    layers = related_layers([4, 3], 5)
    missing = degenerate(kind, layers.maps[0])
    together = layers.having([layers.maps[0], missing, layers.maps[1], missing])
    assert_in_range(name, together)
    found = layer_distances(together.measured(), [name], bootstraps=3)
    assert np.isfinite(found.bootstraps[name]).all()
    if name not in BY_PLACE:
        assert found.distances[name][1, 3] == pytest.approx(0, abs=1e-6)


def some_labels(kind: str, labels: Labels) -> Labels:
    plan = related_layers([1], 0).plan
    held_out = np.concatenate(
        [np.full(chunk.stop - chunk.start, plan.is_held_out(chunk.group)) for chunk in plan.chunks]
    )
    made: dict[str, Labels] = {
        "one class": np.full_like(labels, 2),
        "a missing class": labels * 2 % 3 // 2 * 2,
        "a class of one image": np.where(np.arange(len(labels)) == 3, 1, labels // 2 * 2),
        "a class that is never fitted": np.where(held_out, labels, labels // 2 * 2),
        "a class that is never tested": np.where(held_out, labels // 2 * 2, labels),
        "other classes fitted than tested": np.where(held_out, 2, labels // 2),
    }
    return made[kind]


LABELS = (
    "one class",
    "a missing class",
    "a class of one image",
    "a class that is never fitted",
    "a class that is never tested",
    "other classes fitted than tested",
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", metric_names())
@pytest.mark.parametrize("kind", LABELS)
def test_missing_classes_leave_a_value_in_range(name: str, kind: str) -> None:
    layers = related_layers([4, 3], 5)
    assert_in_range(name, replace(layers, labels=some_labels(kind, layers.labels)))


@pytest.mark.parametrize(("kind", "present"), [("one class", 1), ("a missing class", 2), ("a class of one image", 3)])
def test_labels_lack_what_they_are_said_to_lack(kind: str, present: int) -> None:
    assert len(np.unique(some_labels(kind, related_layers([1], 5).labels))) == present


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("name", PAIRWISE.names())
def test_constant_layer_is_as_far_as_an_unrelated_one_and_at_0_from_another(name: str, value: float) -> None:
    layers = related_layers([4], 0)
    constant = np.full((len(layers.labels), 3, 2, 2), value)
    matrix = layer_distances(layers.having([constant, layers.maps[0], constant[:, :2] + 1]).measured(), [name])
    far = np.pi / 2 if name == "procrustes" else 1
    np.testing.assert_allclose(matrix.distances[name], far * np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), atol=1e-15)


@pytest.mark.parametrize("name", ["sparsity", "effective_rank", "spectral_entropy", "class_separation"])
@pytest.mark.parametrize("value", [0.1, -3.0])
def test_constant_layer_scores_0(name: str, value: float) -> None:
    layers = related_layers([4], 0)
    found = layer_distances(layers.having([np.full_like(layers.maps[0], value)]).measured(), [name])
    assert found.scores[name] == [0]


@pytest.mark.parametrize(
    "name", [name for name in metric_names() if name not in {"sparsity", "dead_channels", "spectral_entropy"}]
)
def test_dead_channels_change_nothing(name: str) -> None:
    layers = related_layers([4, 6], 0)
    dead = [np.concatenate([maps, np.zeros_like(maps[:, :2])], axis=1) for maps in layers.maps]
    np.testing.assert_allclose(values(name, layers.having(dead)), values(name, layers), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", metric_names())
def test_the_order_of_arrival_changes_no_bit(name: str) -> None:
    layers = related_layers([4, 6, 3], 0)
    chunks = len(layers.plan.chunks)
    # One, two and five actors that take every n-th chunk, one after the other; then backwards.
    arrivals = [[p for actor in range(actors) for p in range(actor, chunks, actors)] for actors in (1, 2, 5)]
    found = [
        layer_distances(measurement_of(layers, arrival), [name], bootstraps=2)
        for arrival in (*arrivals, range(chunks)[::-1])
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(other.distances[name], found[0].distances[name])
        np.testing.assert_array_equal(other.bootstraps[name], found[0].bootstraps[name])


def test_unknown_metric_names_the_nearest_of_both_kinds() -> None:
    with pytest.raises(InputError, match=r"^unknown layer metric 'r2_ca'; did you mean 'r2_cca'\? \(.*effective_rank"):
        check_metric("r2_ca")
    with pytest.raises(InputError, match=r"^unknown layer metric 'sparsty'; did you mean 'sparsity'\? \(.*cka_rbf"):
        check_metric("sparsty")


@pytest.mark.parametrize("name", metric_names())
def test_every_metric_is_known(name: str) -> None:
    check_metric(name)
    assert name != ALL_METRICS


def test_layer_distances_refuse_an_unknown_metric() -> None:
    with pytest.raises(InputError, match=r"^unknown layer metric 'cka_liner'; did you mean 'cka_linear'"):
        layer_distances(related_layers([3], 0).measured(), ["cka_liner"])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cka_rbf", Wanted(grams=True)),
        ("rsa", Wanted(anchors=True)),
        ("sparsity", Wanted(zeros=True)),
        ("linear_probe", Wanted(held_out=True)),
    ],
)
def test_what_is_no_sum_is_gathered_only_for_the_metric_that_reads_it(name: str, wanted: Wanted) -> None:
    assert what_they_read([name, "cka_linear"]) == wanted
    assert what_they_read([other for other in metric_names() if other != name]) == replace(
        Wanted(True, True, True, True), **{field: False for field, used in vars(wanted).items() if used}
    )


def test_nothing_beside_the_sums_is_gathered_for_the_other_metrics() -> None:
    others = set(metric_names()) - {"cka_rbf", "rsa", "sparsity", "linear_probe"}
    assert what_they_read(others) == Wanted()


def without(layers: MadeLayers, wanted: Wanted) -> LayerEvidence:
    """The evidence that lacks all that is not wanted."""
    measured = layers.measured()
    groups = tuple(
        replace(
            group,
            zeros=group.zeros if wanted.zeros else None,
            alignment=group.alignment if wanted.grams else None,
        )
        for group in measured.groups
    )
    nothing = np.zeros((0, measured.anchors[0].shape[1]))
    return replace(
        measured,
        groups=groups,
        anchors=measured.anchors if wanted.anchors else (nothing,) * len(groups),
        held_out=measured.held_out if wanted.held_out else (nothing,) * measured.held_out_groups,
    ).evidence()


@pytest.mark.parametrize("name", metric_names())
def test_a_metric_needs_no_more_than_it_says_it_reads(name: str) -> None:
    layers = related_layers([4, 6], 0)
    evidence = without(layers, what_they_read([name]))
    if name in PAIRWISE:
        found = PAIRWISE.get(name)(evidence).ravel()
    else:
        found = np.array([SCORES.get(name)(evidence, layer) for layer in range(2)])
    np.testing.assert_array_equal(
        found, values(name, layers)[: len(found)] if name in PAIRWISE else values(name, layers)[4:]
    )


def columns(*widths: int) -> Columns:
    return Columns(widths, widths, 3, 0)


def test_enough_images_are_counted_against_the_widest_projected_layer() -> None:
    plan = plan_reading(32, 16)
    check_enough_images(["r2_cca"], plan, Columns((16, 400), (16, 16), 3, 0))
    with pytest.raises(
        InputError, match=r"^r2_cca needs at least 34 images for layers of 17 channels, but there are 32;"
    ):
        check_enough_images(["cka_linear", "r2_cca"], plan, columns(16, 17))


def test_enough_images_are_counted_in_the_smallest_chunk() -> None:
    check_enough_images(["cka_rbf"], plan_of(((20, 4), (9,))), columns(2))
    with pytest.raises(InputError, match=r"^cka_rbf needs at least 4 images a chunk, but there are 3;"):
        check_enough_images(["cka_rbf"], plan_of(((20, 3), (9,))), columns(2))


def test_the_probe_needs_a_held_out_group() -> None:
    check_enough_images(["linear_probe"], plan_reading(8, 256), columns(2))
    with pytest.raises(InputError) as caught:
        check_enough_images(["linear_probe"], plan_reading(7, 256), columns(2))
    assert str(caught.value) == "linear_probe needs at least 8 images, but there are 7; raise layers.images"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", metric_names())
@given(images=st.integers(1, 20), chunk=st.integers(1, 20), width=st.integers(1, 6), seed=SEEDS)
@settings(deadline=None, max_examples=20)
def test_few_images_give_a_value_in_range_or_a_clear_error(
    name: str, images: int, chunk: int, width: int, seed: int
) -> None:
    plan = plan_reading(images, chunk)
    layers = related_layers([width, 2], seed, plan=plan)
    try:
        check_enough_images([name], plan, columns(width, 2))
    except InputError as refused:
        message = str(refused)
    else:
        assert_in_range(name, layers)
        return
    assert message.startswith(f"{name} needs at least ")


def test_distance_by_a_score_is_the_difference() -> None:
    found = layer_distances(related_layers([3, 4, 5], 0).measured(), ["effective_rank"])
    scores = found.scores["effective_rank"]
    for first in range(3):
        for second in range(3):
            assert found.distances["effective_rank"][first, second] == abs(scores[first] - scores[second])


def test_layer_distances_say_what_was_measured() -> None:
    layers = related_layers([3, 4], 0)
    found = layer_distances(layers.measured(), ["r2_cca", "sparsity"])
    assert found.paths == ("layer1", "layer2")
    assert found.images == len(layers.labels)
    assert found.widths == (3, 4)
    assert set(found.distances) == {"r2_cca", "sparsity"}
    assert set(found.scores) == {"sparsity"}
    assert found.bootstraps == {}


def test_bootstraps_hold_one_matrix_each_for_every_metric() -> None:
    found = layer_distances(related_layers([3, 4, 2], 0).measured(), metric_names(), bootstraps=5)
    assert {name: matrices.shape for name, matrices in found.bootstraps.items()} == dict.fromkeys(
        metric_names(), (5, 3, 3)
    )


def test_bootstraps_are_fixed_by_their_seed() -> None:
    measured = related_layers([3, 4], 0).measured()
    first, again, other = (layer_distances(measured, ["r2_cca"], 4, seed).bootstraps["r2_cca"] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first[:, 0, 1], other[:, 0, 1]).all()


def test_more_bootstraps_begin_with_the_same_ones() -> None:
    measured = related_layers([3, 4], 0).measured()
    few, many = (layer_distances(measured, ["r2_cca"], count).bootstraps["r2_cca"] for count in (2, 5))
    np.testing.assert_array_equal(many[:2], few)


def test_bootstraps_differ_from_one_another_and_lie_about_the_whole() -> None:
    found = layer_distances(related_layers([3, 4], 0).measured(), ["cka_linear"], 40)
    drawn = found.bootstraps["cka_linear"][:, 0, 1]
    assert len(np.unique(drawn)) > 20
    assert drawn.min() < found.distances["cka_linear"][0, 1] < drawn.max()


def test_a_single_group_gives_no_bootstraps() -> None:
    layers = related_layers([3, 4], 0, plan=plan_of(((30, 29),)))
    assert layer_distances(layers.measured(), ["r2_cca"], 5).bootstraps == {}


def test_progress_counts_the_bootstraps_done() -> None:
    done: list[int] = []
    layer_distances(related_layers([3], 0).measured(), ["r2_cca"], 3, on_bootstrap=done.append)
    assert done == [1, 2, 3]


def test_distances_of_projected_features_are_close_to_those_of_the_features() -> None:
    rng = np.random.default_rng(0)
    shape = Columns((900, 700, 500), (256, 256, 256), 3, 0)
    # Each layer sees some of the signal and spreads over about 10 axes. (Projected, self-alignments gain the share of
    # these axes in the width, so that the distances grow a little.)
    signal = rng.standard_normal((300, 12))
    maps = [
        np.maximum(signal[:, 3 * layer : 3 * layer + 6] @ rng.standard_normal((6, channels)), 0)[:, :, None, None]
        for layer, channels in enumerate(shape.channels)
    ]
    projections = [shape.projection(layer) for layer in range(3)]
    projected = [
        mixed(x, projection) for x, projection in zip(maps, projections, strict=True) if projection is not None
    ]
    layers = related_layers([1], 0, plan=plan_of(((80, 70), (75, 75))))
    whole, narrow = (values("cka_linear", layers.having(made)).reshape(3, 3) for made in (maps, projected))
    assert whole[np.triu_indices(3, 1)].min() > 0.3
    np.testing.assert_allclose(narrow, whole, atol=0.05)
    assert (narrow != whole)[np.triu_indices(3, 1)].all()
