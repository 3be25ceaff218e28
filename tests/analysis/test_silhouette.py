import warnings

import numpy as np
import pytest
from hintsearch.analysis.clustering import Clustering, around, evenly_spaced, of_labels
from hintsearch.analysis.kmedoids import kmedoids
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.silhouette import choose_clusters, medoid_silhouette
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def on_a_line(*positions: float) -> Matrix:
    """Distances between points on a line."""
    places = np.array(positions, dtype=np.float64)
    return np.asarray(np.abs(places[:, None] - places))


def random_distances(size: int, seed: int, levels: int) -> Matrix:
    upper = np.triu(np.random.default_rng(seed).integers(0, levels + 1, (size, size)).astype(np.float64), 1)
    return upper + upper.T


@st.composite
def cases(draw: st.DrawFn) -> tuple[Matrix, Clustering]:
    """Distances with ties and zeros, and any clustering of them into two or more."""
    size = draw(st.integers(2, 12))
    distances = random_distances(size, draw(SEEDS), draw(st.sampled_from([1, 3, 1000])))
    clusters = draw(st.integers(2, size))
    labels = [*range(clusters), *(draw(st.integers(0, clusters - 1)) for _ in range(size - clusters))]
    return distances, of_labels(distances, draw(st.permutations(labels)))


def plain_silhouette(distances: Matrix, clustering: Clustering) -> float:
    """The definition with our conventions, item by item."""
    values = []
    for centre, own in zip(clustering.centres, clustering.members, strict=True):
        for item in own:
            a = distances[item, centre]
            b = min(distances[item, other] for other in clustering.centres if other != centre)
            values.append(0.0 if len(own) == 1 or a == b else (b - a) / max(a, b))
    return sum(values) / len(values)


@given(cases())
@settings(deadline=None)
def test_silhouette_is_the_definition_item_by_item(case: tuple[Matrix, Clustering]) -> None:
    assert medoid_silhouette(*case) == pytest.approx(plain_silhouette(*case), abs=1e-12)


@given(cases())
@settings(deadline=None)
def test_silhouette_lies_between_minus_one_and_one(case: tuple[Matrix, Clustering]) -> None:
    value = medoid_silhouette(*case)
    assert value is not None
    assert -1 <= value <= 1


@given(cases(), st.sampled_from([0.5, 4.0, 1024.0]))
@settings(deadline=None)
def test_silhouette_does_not_depend_on_the_unit_of_distance(case: tuple[Matrix, Clustering], unit: float) -> None:
    distances, clustering = case
    assert medoid_silhouette(unit * distances, clustering) == medoid_silhouette(distances, clustering)


def test_silhouette_by_hand() -> None:
    # Centres at 1 and 8. Items 0, 1, 3: 1 − 1/8, 1, 1 − 2/5; items 7, 8, 9: 1 − 1/6, 1, 1 − 1/8.
    distances = on_a_line(0, 1, 3, 7, 8, 9)
    clustering = Clustering((1, 4), ((0, 1, 2), (3, 4, 5)))
    expected = (7 / 8 + 1 + 3 / 5 + 5 / 6 + 1 + 7 / 8) / 6
    assert medoid_silhouette(distances, clustering) == pytest.approx(expected, rel=1e-12)


def test_silhouette_is_that_of_the_papers_where_no_cluster_is_of_one() -> None:
    distances = on_a_line(0, 1, 2.5, 6, 7, 7.25, 11, 12, 14)
    clustering = around(distances, [1, 4, 7])
    nearest = np.sort(distances[:, [1, 4, 7]], axis=1)
    assert medoid_silhouette(distances, clustering) == pytest.approx(np.mean(1 - nearest[:, 0] / nearest[:, 1]))


def test_item_nearer_to_another_centre_counts_negative() -> None:
    # 4 goes with the centre 1 at distance 3, but 5 is at distance 1: 1/3 − 1; the others 1, 1 − 1/5, 1, 1 − 1/5.
    distances = on_a_line(0, 1, 4, 5, 6)
    clustering = Clustering((1, 3), ((0, 1, 2), (3, 4)))
    assert medoid_silhouette(distances, clustering) == pytest.approx((4 / 5 + 1 - 2 / 3 + 1 + 4 / 5) / 5)


def test_item_alone_counts_nothing() -> None:
    # Items 0 and 1 around 0: 1 and 1 − 1/8; the item at 9 is alone.
    assert medoid_silhouette(on_a_line(0, 1, 9), Clustering((0, 2), ((0, 1), (2,)))) == pytest.approx((1 + 7 / 8) / 3)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_as_many_clusters_as_items_are_apart_by_nothing(size: int) -> None:
    assert medoid_silhouette(on_a_line(*range(size)), around(on_a_line(*range(size)), range(size))) == 0.0


def test_items_all_in_one_place_are_apart_by_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert medoid_silhouette(np.zeros((6, 6)), around(np.zeros((6, 6)), evenly_spaced(6, 2))) == 0.0


def test_blocks_of_zeros_are_apart_in_full() -> None:
    assert medoid_silhouette(on_a_line(0, 0, 0, 5, 5), Clustering((0, 3), ((0, 1, 2), (3, 4)))) == 1.0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_one_cluster_has_no_silhouette(size: int) -> None:
    distances = on_a_line(*range(size))
    assert medoid_silhouette(distances, around(distances, [0])) is None


def test_silhouette_leaves_the_distances_alone() -> None:
    distances = on_a_line(0, 1, 5, 6)
    medoid_silhouette(distances, around(distances, [0, 2]))
    np.testing.assert_array_equal(distances, on_a_line(0, 1, 5, 6))


def test_chosen_number_is_that_of_the_groups() -> None:
    chosen, values = choose_clusters(on_a_line(0, 1, 2, 20, 21, 22, 40, 41, 42), kmedoids, 2, 6)
    assert chosen == 3
    assert list(values) == [2, 3, 4, 5, 6]


@given(SEEDS, st.integers(3, 9))
@settings(deadline=None, max_examples=40)
def test_chosen_number_is_the_smallest_of_the_largest_silhouettes(seed: int, size: int) -> None:
    distances = random_distances(size, seed, 1)
    chosen, values = choose_clusters(distances, kmedoids, 2, size)
    assert values == {k: medoid_silhouette(distances, kmedoids(distances, k)) for k in range(2, size)}
    assert chosen == min(k for k in values if values[k] > max(values.values()) - 1e-9)


def test_number_of_clusters_of_items_all_alike_is_the_smallest() -> None:
    assert choose_clusters(np.zeros((6, 6)), kmedoids, 2, 4) == (2, {2: 0.0, 3: 0.0, 4: 0.0})


def test_chosen_number_starts_at_the_lowest_asked_for() -> None:
    assert list(choose_clusters(on_a_line(*range(8)), kmedoids, 4, 6)[1]) == [4, 5, 6]


def test_fewer_clusters_than_items_are_tried() -> None:
    assert list(choose_clusters(on_a_line(0, 1, 5, 6), kmedoids, 2, 10)[1]) == [2, 3]


@pytest.mark.parametrize("size", [1, 2])
def test_one_or_two_items_are_one_cluster(size: int) -> None:
    assert choose_clusters(on_a_line(*range(size)), kmedoids, 2, 10) == (1, {})


@pytest.mark.parametrize(("low", "high"), [(1, 3), (0, 3), (4, 3), (8, 9)])
def test_numbers_of_clusters_that_cannot_be_told_apart_are_refused(low: int, high: int) -> None:
    with pytest.raises(InputError) as caught:
        choose_clusters(on_a_line(*range(8)), kmedoids, low, high)
    assert str(caught.value) == (
        f"the numbers of clusters to try are {low}..{high}, but must lie in 2..7 for 8 layers; choose others"
    )
