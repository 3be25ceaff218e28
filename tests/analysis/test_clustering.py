import warnings
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hintsearch.analysis import partitioning
from hintsearch.analysis.clustering import (
    Clustering,
    Selector,
    assignment,
    cost,
    evenly_spaced,
    medoid,
    of_labels,
    paper_kmeans,
)
from hintsearch.analysis.hint_selection import SELECTORS
from hintsearch.analysis.kmedoids import MOST_SUBSETS, build_and_swap, kmedoids
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.partitioning import agglomerative, contiguous, spectral
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

SEEDS = st.integers(0, 2**32 - 1)


def random_distances(size: int, seed: int, levels: int = 0) -> Matrix:
    """Symmetric with a zero diagonal; of whole numbers 0..levels, hence with ties, if `levels` is given."""
    rng = np.random.default_rng(seed)
    upper = rng.integers(0, levels + 1, (size, size)) if levels else rng.random((size, size))
    matrix = np.triu(upper.astype(np.float64), 1)
    return matrix + matrix.T


def blocks(*sizes: int) -> Matrix:
    """Distance 0.1 a step within blocks, 1 between them."""
    block = np.repeat(np.arange(len(sizes)), sizes)
    steps = np.abs(np.subtract.outer(np.arange(len(block)), np.arange(len(block))))
    return np.where(block[:, None] == block[None, :], 0.1 * steps, 1.0)


def on_a_line(*positions: float) -> Matrix:
    """Distances between points on a line."""
    places = np.array(positions, dtype=np.float64)
    return np.asarray(np.abs(places[:, None] - places))


@st.composite
def distances_with_clusters(draw: st.DrawFn, low: int = 1, high: int = 12) -> tuple[Matrix, int]:
    size = draw(st.integers(low, high))
    levels = draw(st.sampled_from([0, 1, 3]))
    return random_distances(size, draw(SEEDS), levels), draw(st.integers(1, size))


def exhaustive(distances: Matrix, clusters: int) -> list[int]:
    """The cheapest set of centres; the shallower one on a tie."""
    costs = {
        centres: round(sum(min(row[list(centres)]) for row in distances), 9)
        for centres in combinations(range(len(distances)), clusters)
    }
    return list(min(costs, key=lambda centres: (costs[centres], centres)))


def index_kmeans(distances: Matrix, clusters: int) -> list[int]:
    return list(paper_kmeans(distances, clusters).centres)


def medoids(distances: Matrix, clusters: int) -> list[int]:
    return list(kmedoids(distances, clusters).centres)


# What every selector keeps

every_selector = pytest.mark.parametrize("selector", [entry.item for entry in SELECTORS], ids=SELECTORS.names())

DEGENERATE: dict[str, Callable[[int], Matrix]] = {
    "all zero": lambda size: np.zeros((size, size)),
    "all equal": lambda size: 1.0 - np.eye(size),
    "two blocks of zeros": lambda size: on_a_line(*(i >= size // 2 for i in range(size))),
    "two blocks of zeros far apart": lambda size: on_a_line(*(1e6 * (i >= size // 2) for i in range(size))),
    "one layer far from all": lambda size: on_a_line(1e3, *[0.0] * (size - 1)),
}


def assert_shared_out(found: Clustering, size: int, clusters: int) -> None:
    assert len(found.centres) == len(found.members) == clusters
    assert list(found.centres) == sorted(found.centres)
    assert sorted(item for own in found.members for item in own) == list(range(size))
    assert all(centre in own for centre, own in zip(found.centres, found.members, strict=True))
    assert all(list(own) == sorted(own) for own in found.members)


@every_selector
@given(case=distances_with_clusters(high=30))
@settings(deadline=None, max_examples=50)
def test_selector_shares_out_all_layers_among_as_many_centres_as_asked_for(
    selector: Selector, case: tuple[Matrix, int]
) -> None:
    distances, clusters = case
    assert_shared_out(selector(distances, clusters), len(distances), clusters)


@every_selector
@pytest.mark.parametrize("size", [*range(1, 13), 27, 60])
def test_selector_of_a_random_matrix_gives_every_number_of_clusters(selector: Selector, size: int) -> None:
    distances = random_distances(size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clusters in range(1, size + 1) if size < 60 else (1, 2, 5, 10, 30, 58, 59, 60):
            assert_shared_out(selector(distances, clusters), size, clusters)


@every_selector
@pytest.mark.parametrize("shape", DEGENERATE)
def test_selector_of_a_degenerate_matrix_gives_every_number_of_clusters(selector: Selector, shape: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (1, 2, 3, 5, 12, 30):
            distances = DEGENERATE[shape](size)
            for clusters in {1, 2, 3, size // 2, size - 1, size} & set(range(1, size + 1)):
                assert_shared_out(selector(distances, clusters), size, clusters)


@every_selector
@given(case=distances_with_clusters(high=20))
@settings(deadline=None, max_examples=20)
def test_selector_gives_the_same_each_time(selector: Selector, case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    first = selector(distances, clusters)
    np.random.seed(1)  # a selector that drew from the global state would differ after this
    assert selector(distances.copy(), clusters) == first


@every_selector
@pytest.mark.parametrize("shape", DEGENERATE)
def test_selector_of_a_degenerate_matrix_gives_the_same_each_time(selector: Selector, shape: str) -> None:
    distances = DEGENERATE[shape](12)
    for clusters in range(1, 13):
        assert len({selector(distances, clusters) for _ in range(3)}) == 1


@every_selector
def test_selector_leaves_the_distances_and_the_global_random_state_alone(selector: Selector) -> None:
    distances = random_distances(20, 0)
    before, state = distances.copy(), np.random.get_state()[1].copy()
    selector(distances, 4)
    np.testing.assert_array_equal(distances, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@every_selector
def test_selector_finds_the_blocks_and_their_middles(selector: Selector) -> None:
    found = selector(blocks(5, 5, 5), 3)
    assert found.members == (tuple(range(5)), tuple(range(5, 10)), tuple(range(10, 15)))
    assert found.centres == (2, 7, 12)


@every_selector
@given(case=distances_with_clusters())
@settings(deadline=None, max_examples=20)
def test_labels_are_the_positions_of_the_centres(selector: Selector, case: tuple[Matrix, int]) -> None:
    found = selector(*case)
    for item, label in enumerate(found.labels()):
        assert item in found.members[label]


@pytest.mark.parametrize("selector", [contiguous, agglomerative, spectral])
@given(case=distances_with_clusters())
@settings(deadline=None, max_examples=30)
def test_centre_of_a_cluster_is_its_medoid(selector: Selector, case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    found = selector(distances, clusters)
    for centre, own in zip(found.centres, found.members, strict=True):
        sums = {member: round(sum(distances[member, other] for other in own), 9) for member in own}
        assert centre == min(own, key=lambda member, sums=sums: (sums[member], member))


@pytest.mark.parametrize("selector", [paper_kmeans, kmedoids])
@given(case=distances_with_clusters())
@settings(deadline=None, max_examples=30)
def test_members_lie_nearest_to_their_own_centre(selector: Selector, case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    found = selector(distances, clusters)
    for centre, own in zip(found.centres, found.members, strict=True):
        for member in own:
            assert distances[member, centre] == distances[member, list(found.centres)].min() or member == centre


def test_medoid_of_two_is_the_shallower() -> None:
    assert medoid(random_distances(5, 0), [1, 3]) == 1


def test_centres_of_labels_come_in_depth_order() -> None:
    # The clusters 0, 3, 4 (medoid 3 or 4 by the far 0) and 1, 2: the first label has the deeper centre.
    distances = on_a_line(0.0, 5.0, 5.1, 9.0, 9.1)
    assert of_labels(distances, [0, 1, 1, 0, 0]) == Clustering((1, 3), ((1, 2), (0, 3, 4)))


# Contiguous runs


def run_cost(distances: Matrix, starts: tuple[int, ...]) -> float:
    runs = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(distances)], strict=True)]
    return sum(min(sum(distances[member, item] for item in run) for member in run) for run in runs)


@given(distances_with_clusters(high=8))
@settings(deadline=None, max_examples=150)
def test_contiguous_runs_are_the_cheapest_of_all_segmentations(case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    every = [(0, *cuts) for cuts in combinations(range(1, len(distances)), clusters - 1)]
    # The shallowest of the cheapest, as `combinations` comes in that order.
    best = min(every, key=lambda starts: (round(run_cost(distances, starts), 9), starts))
    assert tuple(own[0] for own in contiguous(distances, clusters).members) == best


@given(distances_with_clusters(high=30))
@settings(deadline=None, max_examples=50)
def test_contiguous_clusters_are_runs(case: tuple[Matrix, int]) -> None:
    for own in contiguous(*case).members:
        assert own == tuple(range(own[0], own[-1] + 1))


def test_contiguous_runs_of_layers_all_alike_are_as_short_as_can_be_from_the_start() -> None:
    assert contiguous(np.zeros((5, 5)), 3).members == ((0,), (1,), (2, 3, 4))


def test_slightly_cheaper_runs_come_before_a_shorter_first_run() -> None:
    assert contiguous(on_a_line(0, 1, 2.0001), 2).members == ((0, 1), (2,))


def test_runs_that_rounding_alone_makes_dearer_are_a_tie() -> None:
    # 0.7 − 0.6 < 0.8 − 0.7 in float64.
    assert contiguous(on_a_line(0.6, 0.7, 0.8), 2).members == ((0,), (1, 2))


def test_contiguous_keeps_a_run_together_that_the_others_split() -> None:
    # Layer 2 is like 4 and 5, and its neighbours like each other.
    distances = on_a_line(0.0, 0.1, 5.0, 0.2, 5.1, 5.2)
    assert kmedoids(distances, 2).members == ((0, 1, 3), (2, 4, 5))
    assert contiguous(distances, 2).members == ((0, 1), (2, 3, 4, 5))


# Agglomerative and spectral


def average_linkage(distances: Matrix, clusters: int) -> set[tuple[int, ...]]:
    """The two clusters of smallest mean distance are merged until K are left, written down plainly."""
    groups = [(item,) for item in range(len(distances))]
    while len(groups) > clusters:
        first, second = min(
            combinations(groups, 2), key=lambda pair: float(distances[np.ix_(list(pair[0]), list(pair[1]))].mean())
        )
        groups = [group for group in groups if group not in (first, second)] + [tuple(sorted(first + second))]
    return set(groups)


@given(SEEDS, st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=30)
def test_agglomerative_merges_by_average_linkage(seed: int, size: int, data: st.DataObject) -> None:
    distances, clusters = random_distances(size, seed), data.draw(st.integers(1, size))
    assert set(agglomerative(distances, clusters).members) == average_linkage(distances, clusters)


def wandering(size: int, seed: int) -> Matrix:
    """Distances between the points of a random walk: layers near in depth are near."""
    steps = np.cumsum(np.random.default_rng(seed).normal(size=(size, 4)), axis=0)
    return np.asarray(np.linalg.norm(steps[:, None] - steps[None], axis=-1))


@pytest.mark.parametrize(("size", "clusters"), [(9, 2), (12, 5), (27, 3), (54, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_spectral_is_that_of_scikit_learn(size: int, clusters: int, seed: int) -> None:
    distances = wandering(size, seed)
    bandwidth = np.median(distances[~np.eye(size, dtype=bool)])
    reference = SpectralClustering(clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    labels = reference.fit_predict(np.exp(-(distances**2) / (2 * bandwidth**2)))
    assert adjusted_rand_score(labels, spectral(distances, clusters).labels()) == 1.0


def test_cluster_that_spectral_labels_miss_is_opened_by_the_layer_farthest_from_its_medoid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distances = on_a_line(0.0, 1.0, 2.0, 2.5, 9.0)
    monkeypatch.setattr(partitioning, "_labels_by_pivoted_qr", lambda _embedding: [0, 0, 0, 0, 0])
    # 9 is farthest from the medoid 2 of all; of the rest 2.5 is, from the medoid 1 (the shallower one on a tie).
    assert spectral(distances, 3) == Clustering((1, 3, 4), ((0, 1, 2), (3,), (4,)))


def test_missed_cluster_of_layers_all_alike_is_opened_by_the_shallowest_that_is_no_centre(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partitioning, "_labels_by_pivoted_qr", lambda _embedding: [0, 0, 0, 0])
    assert spectral(np.zeros((4, 4)), 3) == Clustering((0, 1, 2), ((0, 3), (1,), (2,)))


@pytest.mark.parametrize("seed", [84969, 109782, 126246])
def test_spectral_of_scattered_layers_has_no_empty_cluster(seed: int) -> None:
    # Found by trial: one in 25,000 such matrices leaves a label without a layer.
    rng = np.random.default_rng(seed)
    size = int(rng.integers(4, 20))
    clusters = int(rng.integers(2, size))
    positions = np.exp(rng.normal(size=(size, 1)) * 3)
    assert_shared_out(spectral(np.abs(positions - positions.T), clusters), size, clusters)


# K-medoids


@given(distances_with_clusters(high=9))
@settings(deadline=None)
def test_medoids_are_the_cheapest_of_all_subsets(case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    assert medoids(distances, clusters) == exhaustive(distances, clusters)


@given(SEEDS, st.sampled_from([0, 1, 3]), st.integers(1, 12))
@settings(deadline=None, max_examples=12)
def test_medoids_of_12_layers_are_the_cheapest_for_every_number(seed: int, levels: int, clusters: int) -> None:
    distances = random_distances(12, seed, levels)
    assert medoids(distances, clusters) == exhaustive(distances, clusters)


@given(SEEDS, st.sampled_from([0, 2]), st.sampled_from([(15, 5), (20, 4), (27, 3), (54, 4)]))
@settings(deadline=None, max_examples=25)
def test_no_swap_improves_the_medoids_of_many_layers(seed: int, levels: int, shape: tuple[int, int]) -> None:
    size, clusters = shape
    distances = random_distances(size, seed, levels)
    centres = medoids(distances, clusters)
    best = cost(distances, centres)
    for leaving in centres:
        for coming in set(range(size)) - set(centres):
            assert cost(distances, [coming if c == leaving else c for c in centres]) >= best - 1e-9


@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_medoids_of_many_layers_are_the_best_start(seed: int) -> None:
    distances = random_distances(20, seed)
    optima = [start.tolist() for start in build_and_swap(distances, 4)]
    assert cost(distances, medoids(distances, 4)) == pytest.approx(min(cost(distances, start) for start in optima))


def plain_build(distances: Matrix, clusters: int, first: int) -> list[int]:
    """Medoids added one by one, each the one that leaves the smallest cost."""
    centres = [first]
    while len(centres) < clusters:
        others = [item for item in range(len(distances)) if item not in centres]
        centres.append(min(others, key=lambda item: cost(distances, [*centres, item])))
    return centres


def plain_swaps(distances: Matrix, centres: list[int]) -> tuple[int, ...]:
    """The best of all swaps as long as it makes the medoids cheaper."""
    while True:
        others = [item for item in range(len(distances)) if item not in centres]
        swaps = [sorted({*centres, coming} - {leaving}) for leaving in centres for coming in others]
        best = min(swaps, key=lambda swap: cost(distances, swap))
        if cost(distances, best) >= cost(distances, centres) - 1e-12:
            return tuple(sorted(centres))
        centres = best


@pytest.mark.parametrize(("size", "clusters", "seed"), [(15, 5, 0), (20, 4, 1), (16, 6, 2), (27, 3, 3)])
def test_local_optima_are_those_of_each_start_taken_by_itself(size: int, clusters: int, seed: int) -> None:
    distances = random_distances(size, seed)
    expected = {plain_swaps(distances, plain_build(distances, clusters, first)) for first in range(size)}
    assert {tuple(optimum) for optimum in build_and_swap(distances, clusters).tolist()} == expected


def test_medoids_find_the_middle_of_each_block() -> None:
    assert medoids(blocks(3, 5, 3), 3) == [1, 5, 9]


def test_medoids_of_many_layers_find_the_middle_of_each_block() -> None:
    assert medoids(blocks(9, 9, 9), 3) == [4, 13, 22]


def test_medoids_of_layers_all_alike_are_the_shallowest() -> None:
    assert medoids(np.zeros((5, 5)), 2) == [0, 1]


def test_equally_cheap_medoids_are_the_shallowest() -> None:
    # About one of ten such cases has several cheapest subsets of which the first by depth is not the first by another.
    for seed in range(60):
        distances = random_distances(9, seed, levels=1)
        assert medoids(distances, 3) == exhaustive(distances, 3)


# Assignment and the paper's rule


@given(distances_with_clusters())
@settings(deadline=None)
def test_centre_belongs_to_itself(case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    centres = evenly_spaced(len(distances), clusters)
    nearest = assignment(distances, centres)
    assert [nearest[centre] for centre in centres] == list(range(clusters))


@given(distances_with_clusters())
@settings(deadline=None)
def test_layers_go_to_a_nearest_centre(case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    centres = evenly_spaced(len(distances), clusters)
    chosen = [centres[position] for position in assignment(distances, centres)]
    own = distances[np.arange(len(distances)), chosen]
    np.testing.assert_array_equal(own, distances[:, centres].min(axis=1))


def test_layer_between_two_centres_goes_to_the_earlier() -> None:
    assert assignment(np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0.0]]), [0, 2]) == [0, 0, 1]


@pytest.mark.parametrize(
    ("size", "points", "expected"),
    [(9, 3, [0, 4, 8]), (27, 4, [0, 8, 17, 26]), (10, 3, [0, 4, 9]), (9, 1, [4]), (1, 1, [0]), (4, 4, [0, 1, 2, 3])],
)
def test_evenly_spaced_are_the_floors_of_equal_steps(size: int, points: int, expected: list[int]) -> None:
    assert evenly_spaced(size, points) == expected


@given(distances_with_clusters(high=30))
@settings(deadline=None)
def test_index_kmeans_gives_distinct_centres_in_depth_order(case: tuple[Matrix, int]) -> None:
    distances, clusters = case
    centres = index_kmeans(distances, clusters)
    assert centres == sorted(set(centres))
    assert len(centres) == clusters
    assert set(centres) <= set(range(len(distances)))


def test_index_kmeans_by_hand() -> None:
    # Seeds 0, 4, 9. The middle one draws 3..6 (mean 4.5, floored 4), the others 0..2 (1) and 7..9 (8); no change after.
    assert index_kmeans(blocks(3, 4, 3), 3) == [1, 4, 8]


def test_index_kmeans_moves_from_its_seeds_to_the_middle_of_unequal_blocks() -> None:
    # Seeds 0, 4, 8 of blocks 0..1, 2..6, 7..8: means 0.5 → 0, 4 and 7.5 → 7.
    assert index_kmeans(blocks(2, 5, 2), 3) == [0, 4, 7]


def test_index_kmeans_takes_the_member_nearest_to_the_mean_index() -> None:
    # Layer 2 goes with 5; of the other cluster 0, 1, 3, 4 (mean 2) the members 1 and 3 are nearest: the shallower.
    distances = np.ones((6, 6)) - np.eye(6)
    distances[:, 0] = distances[0, :] = [0, 0.5, 0.9, 0.5, 0.5, 0.9]
    distances[:, 1] = distances[1, :] = [0.5, 0, 0.9, 0.5, 0.5, 0.9]
    distances[2, 5] = distances[5, 2] = 0.1
    distances[2, 3] = distances[3, 2] = 0.8
    assert index_kmeans(distances, 2) == [1, 2]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_index_kmeans_of_one_cluster_is_the_middle(size: int) -> None:
    assert index_kmeans(random_distances(size, 0), 1) == [(size - 1) // 2]


@every_selector
@pytest.mark.parametrize("size", [1, 5, 13])
def test_as_many_clusters_as_layers_take_all(selector: Selector, size: int) -> None:
    assert selector(random_distances(size, 0), size).centres == tuple(range(size))


def paper_rounds(distances: Matrix, clusters: int, rounds: int) -> list[tuple[int, ...]]:
    """The states of PURSUhInT's rule, written down plainly; the first is the seeds."""
    size = len(distances)
    states = [tuple(t * (size - 1) // (clusters - 1) for t in range(clusters))]
    for _ in range(rounds):
        centres = states[-1]
        members: list[list[int]] = [[centre] for centre in centres]
        for layer in set(range(size)) - set(centres):
            members[int(np.argmin([distances[layer, centre] for centre in centres]))].append(layer)
        means = [sum(own) // len(own) for own in members]
        updated = [min(sorted(m), key=lambda i, at=at: abs(i - at)) for m, at in zip(members, means, strict=True)]
        states.append(tuple(sorted(updated)))
    return states


def cycling_cases() -> list[tuple[Matrix, list[tuple[int, ...]]]]:
    """Distances for which the paper's rule never settles, with the states that it goes through for ever."""
    found = []
    for seed in range(400):
        distances = random_distances(14, seed)
        states = paper_rounds(distances, 4, 60)
        if states[-1] != states[-2]:
            start = states.index(states[-1])
            found.append((distances, states[start : states.index(states[-1], start + 1)]))
        if len(found) == 3:
            break
    return found


def test_index_kmeans_of_a_cycle_is_its_cheapest_state() -> None:
    cases = cycling_cases()
    assert len(cases) == 3
    for distances, cycle in cases:
        costs = [float(distances[:, list(state)].min(axis=1).sum()) for state in cycle]
        assert len(cycle) > 1
        assert tuple(index_kmeans(distances, 4)) == cycle[int(np.argmin(costs))]


def test_index_kmeans_of_a_cycle_is_the_same_each_time() -> None:
    for distances, _ in cycling_cases():
        assert index_kmeans(distances, 4) == index_kmeans(distances.copy(), 4)


def test_index_kmeans_that_settles_is_where_the_paper_s_rule_settles() -> None:
    settled = 0
    for seed in range(30):
        distances = random_distances(14, seed)
        states = paper_rounds(distances, 4, 60)
        if states[-1] == states[-2]:
            settled += 1
            assert tuple(index_kmeans(distances, 4)) == states[-1]
    assert settled > 10


def test_more_subsets_than_are_tried_one_by_one() -> None:
    # The shapes of the local-optimum test have to take the other branch.
    assert all(len(list(combinations(range(size), k))) > MOST_SUBSETS for size, k in [(15, 5), (20, 4), (27, 3)])
