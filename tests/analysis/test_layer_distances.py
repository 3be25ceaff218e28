import numpy as np
import pytest
from hintsearch.analysis.layer_distances import LayerDistances, rank_normalised
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata


def symmetric(values: list[int], size: int) -> Matrix:
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size, 1)] = values
    return matrix + matrix.T


@st.composite
def tied_distances(draw: st.DrawFn) -> Matrix:
    size = draw(st.integers(2, 7))
    pairs = size * (size - 1) // 2
    return symmetric(draw(st.lists(st.integers(0, 5), min_size=pairs, max_size=pairs)), size)


def measured(bootstraps: dict[str, Matrix] | None = None, **distances: Matrix) -> LayerDistances:
    return LayerDistances(("a", "b", "c"), distances, {}, 60, bootstraps or {})


def test_rank_normalised_gives_ties_their_mean_rank() -> None:
    ranks = rank_normalised(symmetric([7, 2, 7], 3))  # ranks 2½, 1, 2½ of 3
    np.testing.assert_allclose(ranks, symmetric([5, 2, 5], 3) / 6)


@given(tied_distances())
@settings(deadline=None)
def test_rank_normalised_are_the_ranks_of_scipy_over_their_number(distances: Matrix) -> None:
    upper = np.triu_indices(len(distances), 1)
    expected = rankdata(distances[upper]) / len(upper[0])
    np.testing.assert_allclose(rank_normalised(distances)[upper], expected)


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


def test_rank_normalised_ranks_each_matrix_of_a_stack_by_itself() -> None:
    first, second = symmetric([1, 2, 3], 3), symmetric([90, 80, 70], 3)
    ranks = rank_normalised(np.stack([first, second]))
    np.testing.assert_array_equal(ranks, [rank_normalised(first), rank_normalised(second)])


def test_one_metric_combined_keeps_its_order() -> None:
    combined = measured(cka_linear=symmetric([3, 1, 2], 3) / 10).combined(["cka_linear"])
    np.testing.assert_allclose(combined, symmetric([3, 1, 2], 3) / 3)


def test_two_metrics_combined_are_the_mean_of_their_ranks() -> None:
    # In its own unit the second metric would outweigh the first.
    distances = measured(cka_linear=symmetric([1, 2, 3], 3) / 10, effective_rank=symmetric([900, 700, 800], 3))
    combined = distances.combined(["cka_linear", "effective_rank"])
    np.testing.assert_allclose(combined, symmetric([4, 3, 5], 3) / 6)


def test_a_metric_that_is_not_asked_for_does_not_count() -> None:
    distances = measured(cka_linear=symmetric([1, 2, 3], 3), effective_rank=symmetric([3, 2, 1], 3))
    np.testing.assert_allclose(distances.combined(["effective_rank"]), symmetric([3, 2, 1], 3) / 3)


def test_weights_make_a_weighted_mean() -> None:
    distances = measured(cka_linear=symmetric([1, 2, 3], 3), effective_rank=symmetric([3, 1, 2], 3))
    combined = distances.combined(["cka_linear", "effective_rank"], {"cka_linear": 3, "effective_rank": 1})
    np.testing.assert_allclose(combined, symmetric([6, 7, 11], 3) / 12)


def test_a_metric_without_a_weight_has_a_weight_of_1() -> None:
    distances = measured(cka_linear=symmetric([1, 2, 3], 3), effective_rank=symmetric([3, 1, 2], 3))
    both = ["cka_linear", "effective_rank"]
    given_both = distances.combined(both, {"cka_linear": 4, "effective_rank": 1})
    np.testing.assert_array_equal(distances.combined(both, {"cka_linear": 4, "r2_cca": 9}), given_both)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_only_the_ratio_of_weights_matters(first: float, second: float, factor: float) -> None:
    distances = measured(cka_linear=symmetric([1, 2, 3], 3), effective_rank=symmetric([3, 1, 2], 3))
    both = ["cka_linear", "effective_rank"]
    once = distances.combined(both, {"cka_linear": first, "effective_rank": second})
    scaled = distances.combined(both, {"cka_linear": factor * first, "effective_rank": factor * second})
    np.testing.assert_allclose(scaled, once, rtol=1e-12)


@pytest.mark.parametrize(
    ("weight", "shown"), [(0.0, "0"), (-2.5, "-2.5"), (float("nan"), "nan"), (float("inf"), "inf")]
)
def test_weight_that_is_not_above_0_is_refused(weight: float, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        measured(cka_linear=np.zeros((3, 3))).combined(["cka_linear"], {"cka_linear": weight})
    assert str(caught.value) == (
        f"the weight of the layer metric 'cka_linear' is {shown}, but must be above 0; leave it out"
    )


def test_empty_metric_subset_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        measured(cka_linear=np.zeros((3, 3))).combined([])
    assert str(caught.value) == "the metric subset is empty, but hint selection needs at least one layer metric"


def test_metric_that_was_not_measured_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        measured(svcca=np.zeros((3, 3)), cka_linear=np.zeros((3, 3))).combined(["r2_cca"])
    assert str(caught.value) == "the layer metric 'r2_cca' was not measured; layers.metrics has cka_linear, svcca"


def test_bootstraps_are_combined_one_by_one() -> None:
    first = np.stack([symmetric([1, 2, 3], 3), symmetric([3, 2, 1], 3)])
    second = np.stack([symmetric([5, 5, 6], 3), symmetric([9, 7, 8], 3)])
    distances = measured({"cka_linear": first, "effective_rank": second}, cka_linear=first[0], effective_rank=second[0])
    both, weights = ["cka_linear", "effective_rank"], {"cka_linear": 2.0}
    combined = distances.combined_bootstraps(both, weights)
    expected = [
        measured(cka_linear=x, effective_rank=y).combined(both, weights) for x, y in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(combined, expected)
    assert combined.shape == (2, 3, 3)


def test_without_bootstraps_there_are_none_to_combine() -> None:
    assert measured(cka_linear=np.zeros((3, 3))).combined_bootstraps(["cka_linear"]).shape == (0, 3, 3)


def test_metrics_that_find_all_layers_equally_far_apart_are_told() -> None:
    same = np.ones((3, 3)) - np.eye(3)
    ramp = np.abs(np.subtract.outer(np.arange(3.0), np.arange(3.0)))
    distances = LayerDistances(("a", "b", "c"), {"rsa": ramp, "sparsity": 0 * same, "svcca": same}, {}, 9)
    assert not distances.tell_apart(["sparsity", "svcca"])
    assert distances.tell_apart(["sparsity", "rsa"])
