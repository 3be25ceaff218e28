import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.warmup import Warmup
from hintsearch.search.events import Suggested
from hintsearch.search.sampler import ArmSampler
from hintsearch.search.study import Study
from hintsearch.search.suggestions import Parameters
from hintsearch.search.trial import HintResolver, tune_config

SEARCHED: Parameters = {
    "hints.clusters": 4,
    "hints.metrics": "r2_cca,class_separation",
    "hints.selector": "kmedoids",
    "loss.hint": "at",
    "weight.hint": 0.3,
    "weight.logit": 2.0,
    "temperature": 5.0,
    "weight.classification": 0.9,
    "lr": 0.1,
}


def control_parameters(digits: Study, control: str) -> Parameters:
    """Those of a control's first trial."""
    return ArmSampler(digits, "a search", 3).suggest(1, control)[0]


def layers(configuration: HintConfiguration) -> list[tuple[str, str]]:
    return [(pair.teacher_layer, pair.student_layer) for pair in configuration.pairs]


def test_weights_of_a_suggestion_are_those_of_the_configuration(resolver: HintResolver) -> None:
    configuration, _ = resolver.resolve(8, "", SEARCHED)
    assert configuration.classification_weight == 0.9
    assert (configuration.logit_loss, configuration.logit_weight, configuration.temperature) == ("kd", 2.0, 5.0)
    assert {(pair.loss, pair.weight) for pair in configuration.pairs} == {("at", 0.3)}


def test_logit_loss_of_a_suggestion_is_that_of_the_configuration(resolver: HintResolver) -> None:
    configuration, _ = resolver.resolve(8, "", {**SEARCHED, "loss.logit": "wsl"})
    assert configuration.logit_loss == "wsl"


@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 9])
def test_every_hint_point_is_in_one_pair(resolver: HintResolver, clusters: int) -> None:
    configuration, selection = resolver.resolve(8, "", {**SEARCHED, "hints.clusters": clusters})
    assert selection is not None
    assert len(selection.points) == clusters
    assert [pair.teacher_layer for pair in configuration.pairs] == list(selection.points)


def test_selection_has_the_suggested_metrics_and_selector(resolver: HintResolver) -> None:
    _, selection = resolver.resolve(8, "", SEARCHED)
    assert selection is not None
    assert (selection.selector, selection.metrics) == ("kmedoids", ("r2_cca", "class_separation"))


def test_selection_depends_on_the_metrics(resolver: HintResolver) -> None:
    found = [resolver.resolve(8, "", {**SEARCHED, "hints.metrics": metric})[1] for metric in ("r2_cca", "cka_linear")]
    assert found[0] != found[1]


def test_terms_of_weight_0_need_no_teacher(resolver: HintResolver) -> None:
    off = {key: value for key, value in SEARCHED.items() if key != "temperature"}
    configuration, _ = resolver.resolve(8, "", {**off, "weight.hint": 0.0, "weight.logit": 0.0})
    assert not configuration.needs_teacher


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("no_distillation", []),
        ("kd_only", []),
        ("stage_ends", [("layer1.2", "layer1.0"), ("layer2.2", "layer2.0"), ("layer3.2", "layer3.0")]),
        ("evenly_spaced", [("layer1.0", "layer1.0"), ("layer2.1", "layer2.0"), ("layer3.2", "layer3.0")]),
        ("reversed", [("layer1.2", "layer3.0"), ("layer2.2", "layer2.0"), ("layer3.2", "layer1.0")]),
        ("last", [("layer3.2", "layer3.0")]),
    ],
)
def test_pairs_of_a_control(
    resolver: HintResolver, digits: Study, control: str, expected: list[tuple[str, str]]
) -> None:
    configuration, _ = resolver.resolve(1, control, control_parameters(digits, control))
    assert layers(configuration) == expected


@pytest.mark.parametrize("control", ["no_distillation", "kd_only"])
def test_control_without_hints_has_no_selection(resolver: HintResolver, digits: Study, control: str) -> None:
    assert resolver.resolve(1, control, control_parameters(digits, control))[1] is None


@pytest.mark.parametrize(("control", "needed"), [("no_distillation", False), ("kd_only", True), ("last", True)])
def test_control_needs_the_teacher_for_its_terms_alone(
    resolver: HintResolver, digits: Study, control: str, needed: bool
) -> None:
    configuration, _ = resolver.resolve(1, control, control_parameters(digits, control))
    assert configuration.needs_teacher is needed


def random_points(resolver: HintResolver, digits: Study, number: int) -> list[tuple[str, str]]:
    return layers(resolver.resolve(number, "random", control_parameters(digits, "random"))[0])


def test_random_points_differ_with_the_trial_s_number(resolver: HintResolver, digits: Study) -> None:
    assert len({tuple(random_points(resolver, digits, number)) for number in range(10)}) > 5


def test_random_points_differ_with_the_study_s_seed(resolver: HintResolver, digits: Study) -> None:
    seeds = [replace(resolver, seed=seed) for seed in range(10)]
    assert len({tuple(random_points(seeded, digits, 1)) for seeded in seeds}) > 5


def test_random_points_of_a_number_and_seed_stay_the_same(resolver: HintResolver, digits: Study) -> None:
    assert random_points(resolver, digits, 4) == random_points(replace(resolver), digits, 4)


@pytest.mark.parametrize("checkpoint", [None, "/storage/checkpoint_000001"])
def test_tune_gets_all_that_a_trial_differs_in(resolver: HintResolver, checkpoint: str | None) -> None:
    hints: dict[str, Any] = resolver.resolve(8, "", SEARCHED)[0].to_dict()
    suggested = Suggested(8, "search", "", SEARCHED, {}, hints, {}, data_seed=3, init_seed=4)
    assert tune_config(suggested, checkpoint) == {
        "number": 8,
        "hints": hints,
        "lr": 0.1,
        "data_seed": 3,
        "init_seed": 4,
        "width": None,
        "checkpoint": checkpoint,
    }


def test_selection_comes_with_silhouette_and_stability(resolver: HintResolver) -> None:
    rng = np.random.default_rng(1)
    bootstraps = {name: matrix + 0.01 * symmetric(rng) for name, matrix in resolver.distances.distances.items()}
    stacked = {name: np.stack([matrix, matrix]) for name, matrix in bootstraps.items()}
    measured = replace(resolver, distances=replace(resolver.distances, bootstraps=stacked))
    _, selection = measured.resolve(8, "", SEARCHED)
    assert selection is not None
    assert selection.silhouette is not None
    assert selection.stability is not None
    assert -1 <= selection.silhouette <= 1
    assert 0 < selection.stability <= 1


def test_weights_of_metrics_count_in_a_combination(resolver: HintResolver) -> None:
    weighted = replace(resolver, metric_weights={"r2_cca": 1e6, "cka_linear": 5.0})
    alone = {**SEARCHED, "hints.metrics": "r2_cca"}
    _, ours = weighted.resolve(8, "", SEARCHED)
    _, theirs = resolver.resolve(8, "", alone)
    assert ours is not None
    assert theirs is not None
    assert ours.points == theirs.points
    # Those of the subset only, in its order.
    assert ours.weights == (1e6, 1.0)


def test_auto_takes_the_number_of_clusters_with_the_best_silhouette(resolver: HintResolver) -> None:
    found = {}
    for clusters in range(2, 9):
        _, selection = resolver.resolve(8, "", {**SEARCHED, "hints.clusters": clusters})
        assert selection is not None
        found[len(selection.points)] = selection.silhouette
    _, chosen = resolver.resolve(8, "", {**SEARCHED, "hints.clusters": "auto"})
    assert chosen is not None
    assert chosen.silhouette == max(value for value in found.values() if value is not None)


def test_pairing_of_a_suggestion_reads_the_similarities(resolver: HintResolver) -> None:
    similarity = np.zeros((9, 3))
    similarity[:, 1] = 1.0
    measured = replace(resolver, similarity=similarity)
    configuration, _ = measured.resolve(8, "", {**SEARCHED, "hints.pairing": "by_similarity"})
    assert {student for _, student in layers(configuration)} == {"layer2.0"}


def test_controls_are_paired_by_depth_whatever_the_search_may_do(resolver: HintResolver, digits: Study) -> None:
    similarity = np.zeros((9, 3))
    similarity[:, 1] = 1.0
    parameters = control_parameters(digits, "stage_ends")
    plain, _ = resolver.resolve(3, "stage_ends", parameters)
    measured, _ = replace(resolver, similarity=similarity).resolve(3, "stage_ends", parameters)
    assert layers(plain) == layers(measured)


COMBINED: Parameters = {**SEARCHED, "loss.hint": "crd+at+sp", "weight.hint.2": 7.0, "weight.hint.3": 0.0}


def test_pairs_of_a_combination_come_point_by_point_each_loss_with_its_weight(resolver: HintResolver) -> None:
    configuration, selection = resolver.resolve(8, "", COMBINED)
    alone, _ = resolver.resolve(8, "", SEARCHED)
    assert selection is not None
    losses = [("crd", 0.3), ("at", 7.0), ("sp", 0.0)]
    expected = [(*place, *loss) for place in layers(alone) for loss in losses]
    assert [(p.teacher_layer, p.student_layer, p.loss, p.weight) for p in configuration.pairs] == expected
    assert len(selection.points) == 4


def test_control_has_the_losses_of_a_combination(resolver: HintResolver) -> None:
    parameters = {**COMBINED, "hints.clusters": 3, "hints.metrics": "", "hints.selector": "reversed"}
    configuration, _ = resolver.resolve(1, "reversed", parameters)
    assert [(p.teacher_layer, p.student_layer, p.loss) for p in configuration.pairs[:4]] == [
        ("layer1.2", "layer3.0", "crd"),
        ("layer1.2", "layer3.0", "at"),
        ("layer1.2", "layer3.0", "sp"),
        ("layer2.2", "layer2.0", "crd"),
    ]


def test_penultimate_features_of_a_suggestion_are_those_of_the_configuration(resolver: HintResolver) -> None:
    taught, _ = resolver.resolve(8, "", {**SEARCHED, "weight.embedding": 0.4, "loss.embedding": "cosine"})
    untaught, _ = resolver.resolve(8, "", SEARCHED)
    off, _ = resolver.resolve(8, "", {**SEARCHED, "weight.embedding": 0.0})
    assert (taught.embedding_weight, taught.embedding_loss) == (0.4, "cosine")
    assert untaught == off
    assert untaught.embedding_weight == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_terms_are_normalised_as_the_study_says(resolver: HintResolver, normalise: bool) -> None:
    assert replace(resolver, normalise=normalise).resolve(8, "", SEARCHED)[0].normalise is normalise


@pytest.mark.parametrize(("control", "warmed"), [("no_distillation", False), ("kd_only", False), ("last", True)])
def test_controls_warm_up_where_they_have_hint_points(
    resolver: HintResolver, digits: Study, control: str, warmed: bool
) -> None:
    warmup = Warmup(base_epochs=1)
    configuration, _ = replace(resolver, warmup=warmup).resolve(1, control, control_parameters(digits, control))
    assert configuration.warmup == (warmup if warmed else None)
    assert len(configuration.curriculum) == warmed


def test_points_are_warmed_up_even_if_their_hint_losses_are_off(resolver: HintResolver) -> None:
    configuration, _ = replace(resolver, warmup=Warmup()).resolve(8, "", {**SEARCHED, "weight.hint": 0.0})
    assert [lesson.pair.loss for lesson in configuration.curriculum] == ["strongest_channels"] * 4


@pytest.mark.parametrize(
    ("changes", "weighed"),
    [
        ({}, True),
        ({"hints.clusters": 1}, True),
        ({"hints.clusters": 1, "weight.logit": 0.0}, False),
        ({"hints.clusters": 2, "weight.logit": 0.0}, True),
        ({"hints.clusters": 1, "weight.logit": 0.0, "loss.hint": "at+sp", "weight.hint.2": 1.0}, True),
        ({"hints.clusters": 1, "weight.logit": 0.0, "loss.hint": "at+sp", "weight.hint.2": 0.0}, False),
        ({"hints.clusters": 1, "weight.logit": 0.0, "weight.embedding": 0.4}, True),
        ({"hints.clusters": 3, "weight.logit": 0.0, "loss.hint": "fsp"}, False),
        ({"hints.clusters": 3, "loss.hint": "fsp"}, True),
        ({"weight.hint": 0.0}, False),
        ({"weight.hint": 0.0, "weight.embedding": 0.4}, True),
    ],
)
def test_weights_are_dynamic_where_two_terms_read_the_teacher(
    resolver: HintResolver, changes: Parameters, weighed: bool
) -> None:
    dynamic = replace(resolver, dynamic_weights=DynamicWeights(hidden=7))
    configuration, _ = dynamic.resolve(8, "", {**SEARCHED, **changes})
    assert configuration.dynamic_weights == (DynamicWeights(hidden=7) if weighed else None)
    assert replace(configuration, dynamic_weights=None) == resolver.resolve(8, "", {**SEARCHED, **changes})[0]


def test_configuration_with_everything_survives_the_way_to_a_worker(resolver: HintResolver) -> None:
    everything = replace(resolver, warmup=Warmup(epochs=(2, 1)), dynamic_weights=DynamicWeights(), normalise=False)
    configuration, _ = everything.resolve(8, "", {**COMBINED, "weight.embedding": 0.4})
    assert HintConfiguration.from_dict(json.loads(json.dumps(configuration.to_dict()))) == configuration


def symmetric(rng: np.random.Generator) -> Matrix:
    half = np.triu(rng.random((9, 9)), 1)
    return half + half.T
