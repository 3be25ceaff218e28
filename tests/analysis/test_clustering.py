from itertools import combinations

import numpy as np
import pytest
from hintsearch.analysis.clustering import (
    MOST_SUBSETS,
    assignment,
    build_and_swap,
    cost,
    evenly_spaced,
    index_kmeans,
    medoids,
)
from hintsearch.analysis.layer_statistics import Matrix
from hypothesis import given, settings
from hypothesis import strategies as st

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
    starts = build_and_swap(distances, 4)
    assert len(starts) == 20
    assert cost(distances, medoids(distances, 4)) == min(cost(distances, start) for start in starts)


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


@pytest.mark.parametrize("selector", [index_kmeans, medoids])
@pytest.mark.parametrize("size", [1, 5, 13])
def test_as_many_clusters_as_layers_take_all(selector: type, size: int) -> None:
    assert selector(random_distances(size, 0), size) == list(range(size))


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
