import numpy as np
import pytest
import torch
from hintsearch.analysis.kernel_alignment import (
    gaussian_gram,
    linear_grams,
    median_distance,
    squared_distances,
    stacked_hsic,
)
from hintsearch.analysis.layer_statistics import Matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

SEEDS = st.integers(0, 2**32 - 1)


def u_statistic(first: Matrix, second: Matrix) -> float:
    """Song et al. 2012, eq. 4, as a sum over all ordered quadruples of different images."""
    n = len(first)
    total = 0.0
    for i in range(n):
        for j in set(range(n)) - {i}:
            for q in set(range(n)) - {i, j}:
                for r in set(range(n)) - {i, j, q}:
                    total += first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def hsic_of_torch_cka(first: Tensor, second: Tensor) -> float:
    """One pair as the package torch_cka writes it, from Grams with zeroed diagonals."""
    n = first.shape[0]
    ones = torch.ones(n, 1, dtype=first.dtype)
    result = torch.trace(first @ second).item()
    result += (ones.t() @ first @ ones @ ones.t() @ second @ ones / ((n - 1) * (n - 2))).item()
    result -= (ones.t() @ first @ second @ ones * 2 / (n - 2)).item()
    return result / (n * (n - 3))


def cka_of_torch_cka(layers: list[Tensor]) -> Matrix:
    """The package's loop over pairs of layers, one minibatch."""
    grams = [layer.flatten(1) @ layer.flatten(1).t() for layer in layers]
    for gram in grams:
        gram.fill_diagonal_(0.0)
    hsic = np.array([[hsic_of_torch_cka(first, second) for second in grams] for first in grams])
    return np.asarray(hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic))))


def random_grams(layers: int, images: int, seed: int) -> Tensor:
    features = torch.from_numpy(np.random.default_rng(seed).standard_normal((layers, images, 3)))
    return torch.stack([gaussian_gram(layer, 1.5) for layer in features])


@given(st.integers(4, 7), SEEDS)
@settings(deadline=None, max_examples=20)
def test_stacked_hsic_is_the_u_statistic_of_each_pair(images: int, seed: int) -> None:
    grams = random_grams(3, images, seed)
    expected = [[u_statistic(first, second) for second in grams.numpy()] for first in grams.numpy()]
    np.testing.assert_allclose(stacked_hsic(grams.clone()).numpy(), expected, rtol=1e-9, atol=1e-14)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_adding_to_all_entries_of_a_gram_changes_no_hsic(seed: int) -> None:
    grams = random_grams(3, 12, seed)
    before = stacked_hsic(grams.clone())
    np.testing.assert_allclose(stacked_hsic(grams + 5), before, rtol=1e-9, atol=1e-13)


def test_the_diagonal_of_a_gram_is_of_no_account() -> None:
    grams = random_grams(3, 12, 0)
    before = stacked_hsic(grams.clone())
    grams.diagonal(dim1=1, dim2=2).mul_(7)
    np.testing.assert_array_equal(stacked_hsic(grams), before)


def test_hsic_of_independent_layers_is_0_on_average() -> None:
    # The biased estimator gives 0.04 here.
    found = [float(stacked_hsic(random_grams(2, 10, seed))[0, 1]) for seed in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))
    assert np.std(found) < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_linear_grams_of_many_layers_give_what_the_loop_of_torch_cka_gives(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 20, generator=generator, dtype=dtype)
    # Feature maps after a rectifier, of the widths and sizes of a small network.
    shapes = [(16, 8, 8), (16, 8, 8), (32, 4, 4), (32, 4, 4), (64, 2, 2), (64, 2, 2), (10, 1, 1)]
    layers = [
        (images @ torch.randn(20, int(np.prod(shape)), generator=generator, dtype=dtype)).relu().reshape(64, *shape)
        for shape in shapes
    ]
    hsic = stacked_hsic(linear_grams(layers)).double()
    cka = hsic / hsic.diagonal().outer(hsic.diagonal()).sqrt()
    np.testing.assert_allclose(cka.numpy(), cka_of_torch_cka(layers), rtol=tolerance)


def test_linear_hsic_in_single_precision_loses_nothing_by_a_large_mean() -> None:
    layers = np.random.default_rng(0).standard_normal((2, 40, 6)).round(2)
    near, far = (torch.from_numpy((layers + mean).astype(np.float32)) for mean in (0, 1000))
    hsic = [stacked_hsic(linear_grams(moved)) for moved in (near, far)]
    # The features themselves have but four digits left of their spread.
    np.testing.assert_allclose(hsic[1], hsic[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_fewer_than_four_images_are_refused(images: int) -> None:
    with pytest.raises(ValueError, match=f"at least 4 images, but there are {images}$"):
        stacked_hsic(torch.ones(2, images, images))


def test_hsic_of_constant_layers_is_0() -> None:
    grams = torch.stack([gaussian_gram(torch.full((9, 2), 0.3, dtype=torch.float64), 1.0)] * 2)
    np.testing.assert_allclose(stacked_hsic(grams), 0, atol=1e-30)


@given(st.integers(2, 9), st.integers(1, 5), st.sampled_from([0.0, 1e6]), SEEDS)
@settings(deadline=None)
def test_squared_distances_are_those_of_scipy(images: int, channels: int, offset: float, seed: int) -> None:
    features = offset + np.random.default_rng(seed).standard_normal((images, channels))
    expected = squareform(pdist(features, "sqeuclidean"))
    np.testing.assert_allclose(squared_distances(torch.from_numpy(features)), expected, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 200), st.booleans(), SEEDS)
@settings(deadline=None)
def test_equal_rows_are_at_distance_0(channels: int, single: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers, no two equal: rows that differ do so by more than single precision rounds away.
    features = rng.permutation(3 * channels).reshape(3, channels)[[0, 1, 1, 2, 1]].astype(np.float64)
    given_type = features.astype(np.float32 if single else np.float64)
    found = squared_distances(torch.from_numpy(given_type))
    np.testing.assert_array_equal(found == 0, squareform(pdist(features)) == 0)


def test_gaussian_gram_is_its_formula() -> None:
    features = np.random.default_rng(0).standard_normal((6, 3))
    expected = np.exp(-squareform(pdist(features, "sqeuclidean")) / (2 * 0.7**2))
    np.testing.assert_allclose(gaussian_gram(torch.from_numpy(features), 0.7), expected, rtol=1e-12)


@pytest.mark.parametrize("images", [2, 3, 4, 5, 9])
def test_median_distance_is_the_median_over_all_pairs(images: int) -> None:
    features = np.random.default_rng(images).standard_normal((images, 3))
    assert median_distance(torch.from_numpy(features)) == pytest.approx(np.median(pdist(features)), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_median_distance_of_constant_features_is_1(value: float) -> None:
    assert median_distance(torch.full((7, 3), value, dtype=torch.float64)) == 1


@given(st.integers(1, 200), SEEDS)
@settings(deadline=None)
def test_median_distance_leaves_out_equal_rows(channels: int, seed: int) -> None:
    first, others = np.random.default_rng(seed).standard_normal((2, channels))
    features = np.stack([first, *[others] * 9])
    assert median_distance(torch.from_numpy(features)) == pytest.approx(np.linalg.norm(first - others), rel=1e-6)
