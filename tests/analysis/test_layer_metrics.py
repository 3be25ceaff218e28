from collections.abc import Callable

import numpy as np
import pytest
from hintsearch.analysis.layer_metrics import (
    PAIRWISE,
    SCORES,
    check_metric,
    cka_linear,
    class_separation,
    effective_rank,
    layer_distances,
    metric_names,
    r2_cca,
)
from hintsearch.analysis.layer_distances import LayerDistances, rank_normalised
from hintsearch.analysis.layer_statistics import LayerSums, Matrix
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

SumsOf = Callable[..., LayerSums]

IMAGES, CLASSES = 60, 3
LABELS = np.arange(IMAGES) % CLASSES
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.lists(st.integers(1, 8), min_size=3, max_size=3)


def related_layers(widths: list[int], seed: int) -> list[Matrix]:
    """Features of layers that share some signal, classes among it, as a network's layers do."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((IMAGES, 4)) + rng.standard_normal((CLASSES, 4))[LABELS]
    return [
        signal @ rng.standard_normal((4, width)) + rng.uniform(0.1, 2) * rng.standard_normal((IMAGES, width))
        for width in widths
    ]


def centred(features: Matrix) -> Matrix:
    return features - features.mean(axis=0)


def orthonormal_basis(features: Matrix) -> Matrix:
    left, singular, _ = np.linalg.svd(centred(features), full_matrices=False)
    return left[:, np.square(singular) > 1e-8 * np.square(singular).max()]


def expected_r2_cca(first: Matrix, second: Matrix) -> float:
    ours, theirs = orthonormal_basis(first), orthonormal_basis(second)
    return 1 - float(np.square(ours.T @ theirs).sum()) / min(ours.shape[1], theirs.shape[1])


def expected_cka(first: Matrix, second: Matrix) -> float:
    ours, theirs = centred(first), centred(second)
    norms = np.linalg.norm(ours.T @ ours) * np.linalg.norm(theirs.T @ theirs)
    return 1 - float(np.linalg.norm(ours.T @ theirs) ** 2 / norms)


def expected_effective_rank(features: Matrix) -> float:
    singular = np.linalg.svd(centred(features), compute_uv=False)
    shares = singular[np.square(singular) > 1e-8 * np.square(singular).max()]
    shares = shares / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def expected_class_separation(features: Matrix, labels: NDArray[np.int64]) -> float:
    between = within = 0.0
    for label in np.unique(labels):
        members = features[labels == label]
        between += len(members) * float(np.square(members.mean(axis=0) - features.mean(axis=0)).sum())
        within += float(np.square(members - members.mean(axis=0)).sum())
    return between / within


def orthogonal(size: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def invertible(size: int, rng: np.random.Generator) -> Matrix:
    return orthogonal(size, rng) @ np.diag(rng.uniform(0.2, 5, size)) @ orthogonal(size, rng)


# Whatever a metric declares under `invariances` has to be here, and is tried on it.
TRANSFORMATIONS: dict[str, Callable[[Matrix, np.random.Generator], Matrix]] = {
    "invertible linear maps": lambda layer, rng: layer @ invertible(layer.shape[1], rng),
    "orthogonal maps": lambda layer, rng: layer @ orthogonal(layer.shape[1], rng),
    "isotropic scaling": lambda layer, rng: layer * rng.uniform(0.01, 100),
    "translation": lambda layer, rng: layer + 100 * rng.standard_normal(layer.shape[1]),
}
DECLARED = [
    (entry.name, invariance) for entry in (*PAIRWISE, *SCORES) for invariance in entry.facts["invariances"].split(", ")
]


@given(WIDTHS, SEEDS)
@settings(deadline=None)
def test_r2_cca_is_what_svd_of_the_features_gives(sums_of: SumsOf, widths: list[int], seed: int) -> None:
    layers = related_layers(widths, seed)
    matrix = r2_cca(sums_of(layers))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert matrix[i, j] == pytest.approx(expected_r2_cca(layers[i], layers[j]), rel=1e-6)


@given(WIDTHS, SEEDS)
@settings(deadline=None)
def test_cka_linear_is_its_formula_on_the_features(sums_of: SumsOf, widths: list[int], seed: int) -> None:
    layers = related_layers(widths, seed)
    matrix = cka_linear(sums_of(layers))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert matrix[i, j] == pytest.approx(expected_cka(layers[i], layers[j]), rel=1e-6)


@given(WIDTHS, SEEDS)
@settings(deadline=None)
def test_effective_rank_is_what_svd_of_the_features_gives(sums_of: SumsOf, widths: list[int], seed: int) -> None:
    layers = related_layers(widths, seed)
    sums = sums_of(layers)
    for index, layer in enumerate(layers):
        assert effective_rank(sums, index) == pytest.approx(expected_effective_rank(layer), rel=1e-6)


@given(WIDTHS, SEEDS)
@settings(deadline=None)
def test_class_separation_is_what_class_means_give(sums_of: SumsOf, widths: list[int], seed: int) -> None:
    layers = related_layers(widths, seed)
    labels = np.random.default_rng(seed).permutation(LABELS**2 % CLASSES)
    sums = sums_of(layers, labels, CLASSES)
    for index, layer in enumerate(layers):
        assert class_separation(sums, index) == pytest.approx(expected_class_separation(layer, labels), rel=1e-6)


def test_class_separation_of_one_channel_by_hand(sums_of: SumsOf) -> None:
    # Means −1 and 3 around 1: between 4·4 = 16; each image is 1 from its mean: within 4.
    sums = sums_of([np.array([[-2.0], [0.0], [2.0], [4.0]])], np.array([0, 0, 1, 1]))
    assert class_separation(sums, 0) == pytest.approx(4)


def test_effective_rank_of_equal_orthogonal_channels_is_their_number(sums_of: SumsOf) -> None:
    assert effective_rank(sums_of([np.eye(6)]), 0) == pytest.approx(5)  # centring takes one direction


@pytest.mark.parametrize(("name", "invariance"), DECLARED)
@given(widths=WIDTHS, seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_declared_invariance_holds(sums_of: SumsOf, name: str, invariance: str, widths: list[int], seed: int) -> None:
    layers = related_layers(widths, seed)
    rng = np.random.default_rng(seed)
    moved = [TRANSFORMATIONS[invariance](layer, rng) for layer in layers]
    paths = ("a", "b", "c")
    before = layer_distances(sums_of(layers, LABELS, CLASSES), paths, [name])
    after = layer_distances(sums_of(moved, LABELS, CLASSES), paths, [name])
    np.testing.assert_allclose(after.distances[name], before.distances[name], rtol=1e-6, atol=1e-8)
    if name in before.scores:
        np.testing.assert_allclose(after.scores[name], before.scores[name], rtol=1e-6)


def test_cka_linear_tells_layers_apart_that_an_invertible_map_joins(sums_of: SumsOf) -> None:
    (layer,) = related_layers([4], 0)
    stretched = layer * [1, 1, 1, 20]
    assert cka_linear(sums_of([layer, stretched]))[0, 1] > 0.05


@pytest.mark.parametrize("name", metric_names())
@given(widths=WIDTHS, seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_distances_are_symmetric_and_zero_between_equal_layers(
    sums_of: SumsOf, name: str, widths: list[int], seed: int
) -> None:
    layers = related_layers(widths, seed)
    sums = sums_of([*layers, layers[0]], LABELS, CLASSES)
    matrix = layer_distances(sums, ("a", "b", "c", "a again"), [name]).distances[name]
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 0)
    assert matrix[0, 3] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", PAIRWISE.names())
@given(widths=WIDTHS, seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_pairwise_distances_lie_in_their_declared_range(
    sums_of: SumsOf, name: str, widths: list[int], seed: int
) -> None:
    matrix = PAIRWISE.get(name)(sums_of(related_layers(widths, seed)))
    assert PAIRWISE.entry(name).facts["range"] == "0..1"
    assert ((matrix >= 0) & (matrix <= 1)).all()


def test_r2_cca_is_1_between_layers_without_correlation(sums_of: SumsOf) -> None:
    columns = orthonormal_basis(np.random.default_rng(0).standard_normal((IMAGES, 5)))
    assert r2_cca(sums_of([columns[:, :2], columns[:, 2:]]))[0, 1] == pytest.approx(1)


def test_r2_cca_is_0_between_a_layer_and_a_wider_one_that_holds_it(sums_of: SumsOf) -> None:
    wide = np.random.default_rng(0).standard_normal((IMAGES, 5))
    assert r2_cca(sums_of([wide[:, :2], wide]))[0, 1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", metric_names())
def test_dead_channels_change_nothing(sums_of: SumsOf, name: str) -> None:
    layers = related_layers([4, 6], 0)
    dead = [np.concatenate([layer, np.zeros((IMAGES, 2))], axis=1) for layer in layers]
    alive = layer_distances(sums_of(layers, LABELS, CLASSES), ("a", "b"), [name])
    found = layer_distances(sums_of(dead, LABELS, CLASSES), ("a", "b"), [name])
    np.testing.assert_allclose(found.distances[name], alive.distances[name], atol=1e-9)


def test_duplicated_channels_change_no_r2_cca(sums_of: SumsOf) -> None:
    first, second = related_layers([4, 6], 0)
    doubled = np.concatenate([first, first], axis=1)
    assert r2_cca(sums_of([doubled, second]))[0, 1] == pytest.approx(r2_cca(sums_of([first, second]))[0, 1])


def test_duplicated_channels_change_no_effective_rank(sums_of: SumsOf) -> None:
    (layer,) = related_layers([4], 0)
    doubled = sums_of([np.concatenate([layer, layer], axis=1)])
    assert effective_rank(doubled, 0) == pytest.approx(effective_rank(sums_of([layer]), 0))


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("name", PAIRWISE.names())
def test_constant_layer_is_at_1_from_others_and_at_0_from_another(sums_of: SumsOf, name: str, value: float) -> None:
    constant = np.full((IMAGES, 3), value)
    matrix = PAIRWISE.get(name)(sums_of([constant, related_layers([4], 0)[0], constant[:, :2] + 1]))
    np.testing.assert_array_equal(matrix, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("name", SCORES.names())
def test_constant_layer_scores_0(sums_of: SumsOf, name: str, value: float) -> None:
    assert SCORES.get(name)(sums_of([np.full((IMAGES, 3), value)]), 0) == 0


def test_class_without_images_is_left_out_of_class_separation(sums_of: SumsOf) -> None:
    (layer,) = related_layers([4], 0)
    without = sums_of([layer], 2 * (LABELS % 2), 4)
    assert class_separation(without, 0) == pytest.approx(class_separation(sums_of([layer], LABELS % 2, 2), 0))


def test_class_separation_of_a_single_class_is_0(sums_of: SumsOf) -> None:
    sums = sums_of(related_layers([4], 0), np.zeros(IMAGES, dtype=np.int64), 2)
    assert class_separation(sums, 0) == pytest.approx(0, abs=1e-12)


def test_class_separation_is_capped_where_classes_have_no_inner_spread(sums_of: SumsOf) -> None:
    assert class_separation(sums_of([np.eye(2)[LABELS % 2]], LABELS % 2, 2), 0) == pytest.approx(1e8)


def test_r2_cca_refuses_too_few_images_and_says_how_many_it_needs(sums_of: SumsOf) -> None:
    layers = [np.random.default_rng(0).standard_normal((15, width)) for width in (3, 8)]
    with pytest.raises(InputError) as caught:
        r2_cca(sums_of(layers))
    assert str(caught.value) == (
        "r2_cca needs at least 16 images for layers of 8 channels, but there are 15; "
        "raise layers.images or data.train_fraction, or leave r2_cca out"
    )


def test_r2_cca_takes_twice_as_many_images_as_channels(sums_of: SumsOf) -> None:
    layers = [np.random.default_rng(0).standard_normal((16, width)) for width in (3, 8)]
    assert 0 < r2_cca(sums_of(layers))[0, 1] < 1


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^unknown layer metric 'r2_ca'; did you mean 'r2_cca'\? \(.*effective_rank"):
        check_metric("r2_ca")


def test_layer_distances_refuse_an_unknown_metric(sums_of: SumsOf) -> None:
    with pytest.raises(InputError, match="did you mean 'cka_linear'"):
        layer_distances(sums_of(related_layers([3], 0)), ("a",), ["cka_liner"])


def test_distance_by_a_score_is_the_difference(sums_of: SumsOf) -> None:
    measured = layer_distances(sums_of(related_layers([3, 4, 5], 0)), ("a", "b", "c"), ["effective_rank"])
    scores = measured.scores["effective_rank"]
    assert measured.distances["effective_rank"][0, 2] == abs(scores[0] - scores[2])
    assert measured.images == IMAGES


def symmetric(values: list[int], size: int) -> Matrix:
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size, 1)] = values
    return matrix + matrix.T


@st.composite
def tied_distances(draw: st.DrawFn) -> Matrix:
    size = draw(st.integers(2, 7))
    pairs = size * (size - 1) // 2
    return symmetric(draw(st.lists(st.integers(0, 5), min_size=pairs, max_size=pairs)), size)


def test_rank_normalised_gives_ties_their_mean_rank() -> None:
    ranks = rank_normalised(symmetric([7, 2, 7], 3))  # ranks 2½, 1, 2½ of 3
    np.testing.assert_allclose(ranks, symmetric([5, 2, 5], 3) / 6)


@given(tied_distances())
@settings(deadline=None)
def test_rank_normalised_keeps_the_order(distances: Matrix) -> None:
    ranks, upper = rank_normalised(distances), np.triu_indices(len(distances), 1)
    before, after = distances[upper], ranks[upper]
    np.testing.assert_array_equal(np.sign(before[:, None] - before[None, :]), np.sign(after[:, None] - after[None, :]))


@given(tied_distances())
@settings(deadline=None)
def test_rank_normalised_lies_in_0_to_1_with_a_zero_diagonal(distances: Matrix) -> None:
    ranks = rank_normalised(distances)
    np.testing.assert_array_equal(ranks, ranks.T)
    np.testing.assert_array_equal(np.diag(ranks), 0)
    off_diagonal = ranks[np.triu_indices(len(ranks), 1)]
    assert ((off_diagonal > 0) & (off_diagonal <= 1)).all()


def test_rank_normalised_takes_a_single_layer() -> None:
    np.testing.assert_array_equal(rank_normalised(np.zeros((1, 1))), [[0.0]])


def measured(**distances: Matrix) -> LayerDistances:
    return LayerDistances(("a", "b", "c"), distances, {}, IMAGES)


def test_one_metric_combined_keeps_its_order() -> None:
    combined = measured(cka_linear=symmetric([3, 1, 2], 3) / 10).combined(["cka_linear"])
    np.testing.assert_allclose(combined, symmetric([3, 1, 2], 3) / 3)


def test_two_metrics_combined_are_the_mean_of_their_ranks() -> None:
    # In its own unit the second metric would outweigh the first.
    distances = measured(cka_linear=symmetric([1, 2, 3], 3) / 10, effective_rank=symmetric([900, 700, 800], 3))
    combined = distances.combined(["cka_linear", "effective_rank"])
    np.testing.assert_allclose(combined, symmetric([4, 3, 5], 3) / 6)


def test_empty_metric_subset_is_refused() -> None:
    with pytest.raises(InputError, match="metric subset is empty"):
        measured(cka_linear=np.zeros((3, 3))).combined([])


def test_metric_that_was_not_measured_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        measured(cka_linear=np.zeros((3, 3))).combined(["r2_cca"])
    assert str(caught.value) == "the layer metric 'r2_cca' was not measured; layers.metrics has cka_linear"
