import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hintsearch.analysis.hint_selection import CONTROL_SELECTORS, SELECTORS, select_control, select_hints
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.stability import stability, with_stability
from hintsearch.models.candidates import Candidate
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

MadeUp = Callable[..., tuple[Candidate, ...]]
SEEDS = st.integers(0, 2**32 - 1)


def grouped(*sizes: int) -> Matrix:
    """Near within groups of consecutive layers, far between them."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(group[:, None] == group[None, :], 0.1, 1.0) - 0.1 * np.eye(len(group))


def layers_of(distances: Matrix, bootstraps: Sequence[Matrix], metric: str = "r2_cca") -> LayerDistances:
    paths = tuple(f"layer{i}" for i in range(len(distances)))
    return LayerDistances(paths, {metric: distances}, {}, 100, {metric: np.stack(bootstraps)} if bootstraps else {})


def random_distances(size: int, rng: np.random.Generator) -> Matrix:
    upper = np.triu(rng.random((size, size)), 1)
    return upper + upper.T


def pair_counting_index(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], size: int) -> float:
    """The adjusted Rand index of two partitions, by counting pairs of items that lie together."""
    together = [{pair for own in clusters for pair in combinations(sorted(own), 2)} for clusters in (first, second)]
    both, pairs = len(together[0] & together[1]), size * (size - 1) / 2
    expected = len(together[0]) * len(together[1]) / pairs
    largest = (len(together[0]) + len(together[1])) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_selection_that_every_bootstrap_repeats_is_fully_stable(selector: str) -> None:
    layers = layers_of(grouped(4, 5, 3), [grouped(4, 5, 3)] * 3)
    assert stability(layers, select_hints(layers, 3, ["r2_cca"], selector)) == 1.0


def test_stability_by_hand() -> None:
    # Groups of 2 and 2; the bootstrap has 1 and 3. Of 6 pairs 2 and 3 lie together, 1 in both: (1 − 1)/(2.5 − 1).
    layers = layers_of(grouped(2, 2), [grouped(1, 3), grouped(2, 2)])
    assert stability(layers, select_hints(layers, 2, ["r2_cca"], "kmedoids")) == pytest.approx((0 + 1) / 2)


@pytest.mark.parametrize("selector", SELECTORS.names())
@given(seed=SEEDS, clusters=st.integers(1, 8))
@settings(deadline=None, max_examples=10)
def test_stability_is_the_mean_index_over_the_bootstraps(selector: str, seed: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    layers = layers_of(random_distances(8, rng), [random_distances(8, rng) for _ in range(3)])
    selection = select_hints(layers, clusters, ["r2_cca"], selector)
    again = [
        select_hints(layers_of(bootstrap, []), clusters, ["r2_cca"], selector)
        for bootstrap in layers.bootstraps["r2_cca"]
    ]
    expected = np.mean([pair_counting_index(selection.clusters, other.clusters, 8) for other in again])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stability(layers, selection) == pytest.approx(expected, abs=1e-12)


def test_bootstraps_are_combined_with_the_weights_of_the_selection() -> None:
    steady, shaken = grouped(3, 3), grouped(1, 5)
    layers = LayerDistances(
        tuple("abcdef"),
        {"r2_cca": steady, "cka_linear": steady},
        {},
        100,
        {"r2_cca": steady[None], "cka_linear": shaken[None]},
    )
    metrics = ["r2_cca", "cka_linear"]
    assert stability(layers, select_hints(layers, 2, metrics, "kmedoids", {"r2_cca": 50.0})) == 1.0
    assert stability(layers, select_hints(layers, 2, metrics, "kmedoids", {"cka_linear": 50.0})) != 1.0


def test_bootstraps_are_clustered_with_the_number_that_was_chosen_automatically() -> None:
    # Left to itself the bootstrap would make two clusters.
    layers = layers_of(grouped(3, 3, 3), [grouped(3, 6)])
    selection = select_hints(layers, "auto", ["r2_cca"], "contiguous")
    again = select_hints(layers_of(grouped(3, 6), []), 3, ["r2_cca"], "contiguous")
    assert len(selection.indices) == 3
    assert stability(layers, selection) == pytest.approx(pair_counting_index(selection.clusters, again.clusters, 9))


def test_selection_without_bootstraps_has_no_stability() -> None:
    layers = layers_of(grouped(3, 3), [])
    assert stability(layers, select_hints(layers, 2, ["r2_cca"], "kmedoids")) is None


@pytest.mark.parametrize("selector", CONTROL_SELECTORS.names())
def test_control_selection_has_no_stability(made_up: MadeUp, selector: str) -> None:
    layers = layers_of(grouped(3, 3), [grouped(3, 3)])
    assert stability(layers, select_control(made_up(3, 3), 2, selector, np.random.default_rng(0))) is None


def test_selection_with_stability_is_otherwise_the_same() -> None:
    layers = layers_of(grouped(3, 3), [grouped(3, 3), grouped(2, 4)])
    selection = select_hints(layers, 2, ["r2_cca"], "kmedoids")
    filled = with_stability(layers, selection)
    assert filled.stability == stability(layers, selection)
    assert replace(filled, stability=None) == selection


def test_metric_without_bootstraps_is_refused() -> None:
    layers = LayerDistances(
        tuple("abcd"), {"r2_cca": grouped(2, 2), "rsa": grouped(2, 2)}, {}, 100, {"rsa": grouped(2, 2)[None]}
    )
    with pytest.raises(InputError, match="the layer metric 'r2_cca' was not measured"):
        stability(layers, select_hints(layers, 2, ["r2_cca"], "kmedoids"))
