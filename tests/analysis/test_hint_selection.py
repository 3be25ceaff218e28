from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hintsearch.analysis.hint_selection import CONTROL_SELECTORS, SELECTORS, select_control, select_hints
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.models.candidates import Candidate
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)
LAYERS = 9


def random_layers(seed: int) -> LayerDistances:
    rng = np.random.default_rng(seed)
    upper = [np.triu(rng.random((LAYERS, LAYERS)), 1) for _ in range(2)]
    matrices = {name: half + half.T for name, half in zip(("r2_cca", "cka_linear"), upper, strict=True)}
    return LayerDistances(tuple(f"layer{i}" for i in range(LAYERS)), matrices, {}, 100)


def control(candidates: Sequence[Candidate], points: int, selector: str, seed: int = 0) -> tuple[int, ...]:
    return select_control(candidates, points, selector, np.random.default_rng(seed)).indices


@pytest.mark.parametrize("selector", SELECTORS.names())
@given(seed=SEEDS, clusters=st.integers(1, LAYERS))
@settings(deadline=None, max_examples=40)
def test_clusters_share_out_all_candidates(selector: str, seed: int, clusters: int) -> None:
    selection = select_hints(random_layers(seed), clusters, ["r2_cca", "cka_linear"], selector)
    members = [index for cluster in selection.clusters for index in cluster]
    assert sorted(members) == list(range(1, LAYERS + 1))


@pytest.mark.parametrize("selector", SELECTORS.names())
@given(seed=SEEDS, clusters=st.integers(1, LAYERS))
@settings(deadline=None, max_examples=40)
def test_cluster_holds_its_hint_point(selector: str, seed: int, clusters: int) -> None:
    selection = select_hints(random_layers(seed), clusters, ["r2_cca"], selector)
    assert len(selection.indices) == clusters
    assert all(point in cluster for point, cluster in zip(selection.indices, selection.clusters, strict=True))


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_points_are_the_paths_at_the_indices_in_depth_order(selector: str) -> None:
    selection = select_hints(random_layers(0), 4, ["r2_cca"], selector)
    assert list(selection.indices) == sorted(selection.indices)
    assert selection.points == tuple(f"layer{index - 1}" for index in selection.indices)


def test_selection_says_how_it_was_made() -> None:
    selection = select_hints(random_layers(0), 2, ["cka_linear", "r2_cca"], "kmedoids")
    assert (selection.selector, selection.metrics) == ("kmedoids", ("cka_linear", "r2_cca"))


def test_selection_follows_the_metric_that_is_asked_for() -> None:
    near_each_other = np.ones((4, 4)) - np.eye(4)
    first, second = near_each_other.copy(), near_each_other.copy()
    first[0, 1] = first[1, 0] = 0.1
    second[2, 3] = second[3, 2] = 0.1
    layers = LayerDistances(tuple("abcd"), {"r2_cca": first, "cka_linear": second}, {}, 100)
    assert (1, 2) in select_hints(layers, 3, ["r2_cca"], "kmedoids").clusters
    assert (3, 4) in select_hints(layers, 3, ["cka_linear"], "kmedoids").clusters


def test_paper_kmeans_of_two_groups_of_layers_by_hand() -> None:
    apart = np.repeat(np.arange(2), [3, 6])
    distances = np.where(apart[:, None] == apart[None, :], 0.0, 1.0)
    layers = LayerDistances(tuple("abcdefghi"), {"r2_cca": distances}, {}, 100)
    selection = select_hints(layers, 2, ["r2_cca"], "paper_kmeans")
    assert selection.indices == (2, 6)
    assert selection.clusters == ((1, 2, 3), (4, 5, 6, 7, 8, 9))


@pytest.mark.parametrize(("points", "expected"), [(1, (9,)), (2, (6, 9)), (3, (3, 6, 9))])
def test_stage_ends_of_resnet20(resnet20: tuple[Candidate, ...], points: int, expected: tuple[int, ...]) -> None:
    assert control(resnet20, points, "stage_ends") == expected


def test_stage_ends_of_resnet56(resnet56: tuple[Candidate, ...]) -> None:
    assert control(resnet56, 3, "stage_ends") == (9, 18, 27)


def test_more_points_than_stages_fill_up_farthest_from_the_stage_ends(resnet56: tuple[Candidate, ...]) -> None:
    # Candidate 1 is 8 away from 9; after it 5, 13, 14, 22 and 23 are 4 away, and the deepest comes first.
    assert control(resnet56, 4, "stage_ends") == (1, 9, 18, 27)
    assert control(resnet56, 5, "stage_ends") == (1, 9, 18, 23, 27)


@pytest.mark.parametrize(("points", "expected"), [(1, (5,)), (2, (1, 9)), (3, (1, 5, 9)), (4, (1, 3, 6, 9))])
def test_evenly_spaced_of_resnet20_takes_both_ends(
    resnet20: tuple[Candidate, ...], points: int, expected: tuple[int, ...]
) -> None:
    assert control(resnet20, points, "evenly_spaced") == expected


def test_random_depends_on_the_generator_alone(resnet56: tuple[Candidate, ...]) -> None:
    assert control(resnet56, 3, "random", seed=7) == control(resnet56, 3, "random", seed=7)
    assert len({control(resnet56, 3, "random", seed) for seed in range(10)}) > 5


def test_random_reaches_every_candidate(resnet20: tuple[Candidate, ...]) -> None:
    assert {control(resnet20, 1, "random", seed)[0] for seed in range(100)} == set(range(1, 10))


@pytest.mark.parametrize("points", [1, 3])
def test_last_is_one_point_whatever_is_asked_for(resnet20: tuple[Candidate, ...], points: int) -> None:
    selection = select_control(resnet20, points, "last", np.random.default_rng(0))
    assert selection.points == ("layer3.2",)


@pytest.mark.parametrize("points", [1, 2, 3, 5])
def test_reversed_takes_the_points_of_stage_ends(resnet20: tuple[Candidate, ...], points: int) -> None:
    assert control(resnet20, points, "reversed") == control(resnet20, points, "stage_ends")


@pytest.mark.parametrize("name", CONTROL_SELECTORS.names())
@given(points=st.integers(1, 27), seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_control_points_are_distinct_and_in_depth_order(
    resnet56: tuple[Candidate, ...], name: str, points: int, seed: int
) -> None:
    chosen = control(resnet56, points, name, seed)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == (1 if name == "last" else points)


@pytest.mark.parametrize("name", CONTROL_SELECTORS.names())
def test_control_points_stand_for_themselves(resnet20: tuple[Candidate, ...], name: str) -> None:
    selection = select_control(resnet20, 3, name, np.random.default_rng(0))
    assert selection.clusters == tuple((index,) for index in selection.indices)
    assert selection.metrics == ()


@pytest.mark.parametrize("points", [0, -1, 28, 40])
@pytest.mark.parametrize("name", CONTROL_SELECTORS.names())
def test_control_refuses_more_points_than_candidates(resnet56: tuple[Candidate, ...], name: str, points: int) -> None:
    with pytest.raises(InputError) as caught:
        control(resnet56, points, name)
    assert str(caught.value) == f"hints.clusters is {points}, but the teacher has 27 candidates; choose 1..27"


@pytest.mark.parametrize("clusters", [0, 10])
def test_selector_refuses_more_clusters_than_candidates(clusters: int) -> None:
    with pytest.raises(InputError) as caught:
        select_hints(random_layers(0), clusters, ["r2_cca"], "kmedoids")
    assert str(caught.value) == f"hints.clusters is {clusters}, but the teacher has 9 candidates; choose 1..9"


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda: select_hints(random_layers(0), 2, ["r2_cca"], "kmedoid"), "unknown selector 'kmedoid'; did you mean"),
        (lambda: select_hints(random_layers(0), 2, ["cka"], "kmedoids"), "the layer metric 'cka' was not measured"),
        (lambda: select_hints(random_layers(0), 2, [], "kmedoids"), "the metric subset is empty"),
    ],
)
def test_wrong_name_is_refused(select: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select()


def test_unknown_control_names_the_nearest(resnet20: tuple[Candidate, ...]) -> None:
    with pytest.raises(InputError, match="unknown control selector 'stageends'; did you mean 'stage_ends'"):
        control(resnet20, 3, "stageends")
