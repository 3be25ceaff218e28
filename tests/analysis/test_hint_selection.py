from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hintsearch.analysis.clustering import Clustering
from hintsearch.analysis.hint_selection import (
    CONTROL_SELECTORS,
    HIGHEST_AUTOMATIC,
    SELECTORS,
    select_control,
    select_hints,
    silhouettes,
)
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.analysis.silhouette import choose_clusters, medoid_silhouette
from hintsearch.models.candidates import Candidate
from hintsearch.models.errors import InputError
from hintsearch.models.registry import Entry
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


def grouped(*sizes: int) -> LayerDistances:
    """Layers of one metric, near each other within groups of so many."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    distances = np.where(group[:, None] == group[None, :], 0.1, 1.0) - 0.1 * np.eye(len(group))
    return LayerDistances(tuple(f"layer{i}" for i in range(len(group))), {"r2_cca": distances}, {}, 100)


def test_five_selectors_are_registered() -> None:
    assert SELECTORS.names() == ("paper_kmeans", "kmedoids", "contiguous", "agglomerative", "spectral")


@pytest.mark.parametrize("entry", list(SELECTORS), ids=lambda entry: entry.name)
def test_selector_declares_its_kind_its_centre_and_its_source(entry: Entry[object]) -> None:
    assert entry.facts["kind"] == "clustering"
    assert entry.facts["centre"]
    assert any(character.isdigit() for character in entry.source)  # a year


@pytest.mark.parametrize("selector", SELECTORS.names())
@pytest.mark.parametrize("clusters", [1, 2, 5, 9])
def test_selection_is_the_selector_s_clustering_of_the_combined_distances(selector: str, clusters: int) -> None:
    layers, weights = random_layers(3), {"r2_cca": 3.0}
    metrics = ["cka_linear", "r2_cca"]
    found = SELECTORS.get(selector)(layers.combined(metrics, weights), clusters)
    selection = select_hints(layers, clusters, metrics, selector, weights)
    assert selection.indices == tuple(centre + 1 for centre in found.centres)
    assert selection.clusters == tuple(tuple(member + 1 for member in own) for own in found.members)


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_selection_has_the_silhouette_of_its_clusters(selector: str) -> None:
    layers = random_layers(5)
    selection = select_hints(layers, 3, ["r2_cca", "cka_linear"], selector)
    clustering = Clustering(
        tuple(index - 1 for index in selection.indices),
        tuple(tuple(index - 1 for index in own) for own in selection.clusters),
    )
    assert selection.silhouette == medoid_silhouette(layers.combined(["r2_cca", "cka_linear"]), clustering)


def test_selection_of_one_cluster_has_no_silhouette() -> None:
    assert select_hints(random_layers(0), 1, ["r2_cca"], "kmedoids").silhouette is None


def test_selection_does_not_compute_its_stability() -> None:
    assert select_hints(random_layers(0), 3, ["r2_cca"], "kmedoids").stability is None


def test_weights_are_kept_in_the_order_of_the_metrics() -> None:
    selection = select_hints(random_layers(0), 3, ["cka_linear", "r2_cca"], "kmedoids", {"r2_cca": 2.5})
    assert selection.weights == (1.0, 2.5)


@pytest.mark.parametrize("weights", [None, {}])
def test_selection_without_weights_keeps_none(weights: dict[str, float] | None) -> None:
    assert select_hints(random_layers(0), 3, ["r2_cca"], "kmedoids", weights).weights == ()


def test_heavier_metric_decides() -> None:
    far = np.ones((4, 4)) - np.eye(4)
    first, second = far.copy(), far.copy()
    first[0, 1] = first[1, 0] = 0.1
    second[2, 3] = second[3, 2] = 0.1
    layers = LayerDistances(tuple("abcd"), {"r2_cca": first, "cka_linear": second}, {}, 100)
    metrics = ["r2_cca", "cka_linear"]
    assert (1, 2) in select_hints(layers, 3, metrics, "kmedoids", {"r2_cca": 9.0}).clusters
    assert (3, 4) in select_hints(layers, 3, metrics, "kmedoids", {"cka_linear": 9.0}).clusters


@pytest.mark.parametrize("selector", SELECTORS.names())
@pytest.mark.parametrize("sizes", [(6, 7), (5, 6, 5), (4, 5, 4, 5)])
def test_automatic_number_of_clusters_is_that_of_the_groups(selector: str, sizes: tuple[int, ...]) -> None:
    assert len(select_hints(grouped(*sizes), "auto", ["r2_cca"], selector).indices) == len(sizes)


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_automatic_choice_is_the_same_as_asking_for_its_number(selector: str) -> None:
    layers = random_layers(8)
    automatic = select_hints(layers, "auto", ["r2_cca"], selector)
    assert automatic == select_hints(layers, len(automatic.indices), ["r2_cca"], selector)


def test_automatic_number_is_never_above_the_highest() -> None:
    assert len(select_hints(grouped(*[3] * 12), "auto", ["r2_cca"], "kmedoids").indices) == HIGHEST_AUTOMATIC


@pytest.mark.parametrize("layers", [1, 2])
def test_automatic_number_of_one_or_two_candidates_is_one(layers: int) -> None:
    assert len(select_hints(grouped(layers), "auto", ["r2_cca"], "contiguous").indices) == 1


@pytest.mark.parametrize("selector", SELECTORS.names())
def test_silhouettes_are_those_of_each_selection(selector: str) -> None:
    layers, metrics, weights = random_layers(1), ["r2_cca", "cka_linear"], {"r2_cca": 2.0}
    values = silhouettes(layers, metrics, selector, weights)
    assert values == {k: select_hints(layers, k, metrics, selector, weights).silhouette for k in range(2, LAYERS)}


def test_silhouettes_stop_at_the_highest_asked_for() -> None:
    assert list(silhouettes(random_layers(0), ["r2_cca"], "kmedoids", highest=4)) == [2, 3, 4]


def test_silhouettes_of_two_candidates_are_none() -> None:
    assert silhouettes(grouped(2), ["r2_cca"], "kmedoids") == {}


def test_automatic_number_is_where_the_silhouettes_are_largest() -> None:
    layers = random_layers(2)
    values = silhouettes(layers, ["r2_cca"], "kmedoids")
    chosen = len(select_hints(layers, "auto", ["r2_cca"], "kmedoids").indices)
    assert values[chosen] == max(values.values())
    assert chosen == choose_clusters(layers.combined(["r2_cca"]), SELECTORS.get("kmedoids"), 2, HIGHEST_AUTOMATIC)[0]


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


@pytest.mark.parametrize("name", CONTROL_SELECTORS.names())
def test_control_selection_has_neither_weights_nor_silhouette_nor_stability(
    resnet20: tuple[Candidate, ...], name: str
) -> None:
    selection = select_control(resnet20, 3, name, np.random.default_rng(0))
    assert (selection.weights, selection.silhouette, selection.stability) == ((), None, None)


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


def test_selector_refuses_a_word_for_a_number_of_clusters() -> None:
    with pytest.raises(InputError) as caught:
        select_hints(random_layers(0), "many", ["r2_cca"], "kmedoids")  # type: ignore[arg-type]
    assert str(caught.value) == "hints.clusters is 'many', but must be 'auto' or a number; choose 1..9"


@pytest.mark.parametrize("choose", [lambda *given: select_hints(given[0], 2, *given[1:]), silhouettes])
def test_weight_of_a_metric_that_was_not_measured_is_refused(choose: Callable[..., object]) -> None:
    with pytest.raises(InputError) as caught:
        choose(random_layers(0), ["r2_cca"], "kmedoids", {"cka_liner": 2.0})
    assert str(caught.value) == (
        "there is a weight for 'cka_liner', but no such layer metric was measured; "
        "did you mean 'cka_linear'? (cka_linear, r2_cca)"
    )


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
