"""Scores of a layer against references from the raw feature maps, written from their definitions."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hintsearch.analysis.layer_scores import SCORES
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.measurement import LayerEvidence
from hypothesis import given, settings
from hypothesis import strategies as st
from made_layers import PLAN, Labels, MadeLayers, plan_of, related_layers

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.lists(st.integers(1, 9), min_size=2, max_size=2)
KINDS = st.sampled_from(["plain", "rectified", "offset"])

# Score of the layer at a place.
Reference = Callable[[MadeLayers, int], float]


def expected_activation_norm(layers: MadeLayers, layer: int) -> float:
    return float(np.mean([np.sqrt((row * row).sum()) for row in layers.pooled[layer]]))


def expected_sparsity(layers: MadeLayers, layer: int) -> float:
    return float((layers.maps[layer] == 0).mean())


def expected_dead_channels(layers: MadeLayers, layer: int) -> float:
    return float(np.mean([not channel.any() for channel in layers.pooled[layer].T]))


def singular_values(features: Matrix) -> Matrix:
    """Of the centred features, by the rank rule that covariance eigenvalues count above 1e-8 of the largest."""
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    return np.asarray(singular[np.square(singular) > 1e-8 * np.square(singular).max()])


def entropy(values: Matrix) -> float:
    shares = values / values.sum()
    return -float(sum(share * np.log(share) for share in shares))


def expected_effective_rank(layers: MadeLayers, layer: int) -> float:
    return float(np.exp(entropy(singular_values(layers.pooled[layer]))))


def expected_spectral_entropy(layers: MadeLayers, layer: int) -> float:
    features = layers.pooled[layer]
    largest = float(np.log(features.shape[1])) if features.shape[1] > 1 else 1.0
    return entropy(np.square(singular_values(features))) / largest


def expected_class_separation(layers: MadeLayers, layer: int) -> float:
    features = layers.pooled[layer]
    between = within = 0.0
    for label in np.unique(layers.labels):
        members = features[layers.labels == label]
        between += len(members) * float(np.square(members.mean(axis=0) - features.mean(axis=0)).sum())
        within += float(np.square(members - members.mean(axis=0)).sum())
    return between / within


def images_of_groups(layers: MadeLayers, held_out: bool) -> list[int]:
    chunks = [chunk for chunk in layers.plan.chunks if layers.plan.is_held_out(chunk.group) == held_out]
    return [image for chunk in chunks for image in range(chunk.start, chunk.stop)]


def ridge_accuracy(features: Matrix, labels: Labels, classes: int, fitted: list[int], tested: list[int]) -> float:
    """Of least squares on the raw rows, to which rows for the penalty were added."""
    centre = features[fitted].mean(axis=0)
    centred = features[fitted] - centre
    penalty = 1e-3 * float(np.square(centred).sum()) / features.shape[1]
    targets = np.eye(classes)[labels[fitted]]
    rows = np.concatenate([centred, np.sqrt(penalty) * np.eye(features.shape[1])])
    right = np.concatenate([targets - targets.mean(axis=0), np.zeros((features.shape[1], classes))])
    weights = np.linalg.lstsq(rows, right, rcond=None)[0]
    outputs = (features[tested] - centre) @ weights + targets.mean(axis=0)
    return float(np.mean([int(np.argmax(row)) == label for row, label in zip(outputs, labels[tested], strict=True)]))


def expected_linear_probe(layers: MadeLayers, layer: int) -> float:
    fitted, tested = (images_of_groups(layers, held_out) for held_out in (False, True))
    return ridge_accuracy(layers.pooled[layer], layers.labels, layers.classes, fitted, tested)


def expected_relative_depth(layers: MadeLayers, layer: int) -> float:
    return (layer + 1) / len(layers.maps)


def expected_multiply_adds(layers: MadeLayers, layer: int) -> float:
    return 100 * (layer + 1) / (100 * len(layers.maps))


# Whatever is registered has to be here.
REFERENCES: dict[str, Reference] = {
    "activation_norm": expected_activation_norm,
    "sparsity": expected_sparsity,
    "dead_channels": expected_dead_channels,
    "effective_rank": expected_effective_rank,
    "spectral_entropy": expected_spectral_entropy,
    "class_separation": expected_class_separation,
    "linear_probe": expected_linear_probe,
    "relative_depth": expected_relative_depth,
    "multiply_adds": expected_multiply_adds,
}


def score(name: str, layers: MadeLayers, layer: int = 0) -> float:
    return SCORES.get(name)(layers.measured().evidence(), layer)


def assert_as_in_reference(name: str, layers: MadeLayers) -> None:
    evidence = layers.measured().evidence()
    for layer in range(len(layers.maps)):
        expected = REFERENCES[name](layers, layer)
        assert SCORES.get(name)(evidence, layer) == pytest.approx(expected, rel=1e-6), layer


def of_pooled(*pooled: Matrix, labels: Labels, classes: int = 2) -> MadeLayers:
    """Layers whose maps are single points; all images are one chunk but for a held-out one."""
    images = len(labels)
    plan = plan_of(((images - 1,), (1,)), held_out=1)
    return MadeLayers(tuple(layer[:, :, None, None] for layer in pooled), labels, classes, plan)


@pytest.mark.parametrize("name", SCORES.names())
@given(widths=WIDTHS, kind=KINDS, seed=SEEDS)
@settings(deadline=None, max_examples=20)
def test_score_is_its_definition_on_the_raw_maps(name: str, widths: list[int], kind: str, seed: int) -> None:
    assert_as_in_reference(name, related_layers(widths, seed, kind))


@pytest.mark.parametrize("name", SCORES.names())
def test_score_of_rank_deficient_layers_is_its_definition(name: str) -> None:
    layers = related_layers([4, 6], 2, "rectified")
    first, second = layers.maps
    doubled = np.concatenate([first, first], axis=1)
    with_dead = np.concatenate([second, np.zeros_like(second[:, :3])], axis=1)
    assert_as_in_reference(name, layers.having([doubled, with_dead, np.full_like(first[:, :1], 0.5) * second[:, :1]]))


@pytest.mark.parametrize("name", SCORES.names())
def test_score_of_many_wide_layers_and_classes_is_its_definition(name: str) -> None:
    plan = plan_of(((70, 69), (68, 67, 66), (40, 41)), held_out=1)
    assert_as_in_reference(name, related_layers([16, 40, 24, 3], 1, "rectified", plan, classes=11))


def test_activation_norm_is_taken_before_centring_and_projection() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    measured = of_pooled(rows, labels=np.array([0, 1, 0])).measured()
    assert SCORES.get("activation_norm")(measured.evidence(), 0) == pytest.approx(5)


def test_sparsity_counts_zeros_before_pooling() -> None:
    maps = np.zeros((5, 2, 2, 2))
    maps[:, 0, 0] = 1  # 2 of 8 of each image
    layers = of_pooled(np.ones((5, 1)), labels=np.arange(5) % 2).having([maps])
    assert score("sparsity", layers) == 3 / 4


def test_dead_channels_are_those_that_never_fired() -> None:
    rows = np.zeros((5, 4))
    rows[4, 1] = rows[0, 3] = 1e-9
    assert score("dead_channels", of_pooled(rows, labels=np.arange(5) % 2)) == 1 / 2


def test_dead_channels_of_each_layer_are_its_own() -> None:
    alive, half = np.ones((5, 3)), np.ones((5, 2)) * [0, 1]
    layers = of_pooled(alive, half, labels=np.arange(5) % 2)
    assert (score("dead_channels", layers, 0), score("dead_channels", layers, 1)) == (0, 1 / 2)


def test_effective_rank_of_equal_orthogonal_channels_is_their_number() -> None:
    # Centring takes one direction.
    assert score("effective_rank", of_pooled(np.eye(6), labels=np.arange(6) % 2)) == pytest.approx(5)


def test_spectral_entropy_of_equal_orthogonal_channels_is_1() -> None:
    rows = np.concatenate([np.eye(4), -np.eye(4)])
    assert score("spectral_entropy", of_pooled(rows, labels=np.arange(8) % 2)) == pytest.approx(1)


def test_spectral_entropy_of_a_single_direction_is_0() -> None:
    rows = np.outer(np.arange(8), [1.0, 2.0, 3.0])
    assert score("spectral_entropy", of_pooled(rows, labels=np.arange(8) % 2)) == pytest.approx(0, abs=1e-12)


def test_duplicated_channels_change_no_effective_rank() -> None:
    layers = related_layers([4], 0)
    doubled = layers.having([np.concatenate([layers.maps[0]] * 2, axis=1)])
    assert score("effective_rank", doubled) == pytest.approx(score("effective_rank", layers))


def test_class_separation_of_one_channel_by_hand() -> None:
    # Means −1 and 3 around 1: between 4·4 = 16; each image is 1 from its mean: within 4.
    layers = of_pooled(np.array([[-2.0], [0.0], [2.0], [4.0]]), labels=np.array([0, 0, 1, 1]))
    assert score("class_separation", layers) == pytest.approx(4)


def test_class_without_images_is_left_out_of_class_separation() -> None:
    layers = related_layers([4], 0, classes=2)
    without = replace(layers, labels=2 * layers.labels, classes=4)
    assert score("class_separation", without) == pytest.approx(expected_class_separation(layers, 0))


def test_class_separation_of_a_single_class_is_0() -> None:
    layers = related_layers([4], 0, classes=1)
    assert score("class_separation", replace(layers, classes=2)) == 0


def test_class_separation_is_capped_where_classes_have_no_inner_spread() -> None:
    labels = np.arange(20) % 2
    assert score(
        "class_separation", of_pooled(np.array([[1.0, 0.0], [0.0, 1.0]])[labels], labels=labels)
    ) == pytest.approx(1e8)


def test_probe_tells_apart_what_a_line_parts() -> None:
    labels = np.arange(40) % 2
    rows = np.random.default_rng(0).uniform(0.1, 1, (40, 2)) * (2 * labels[:, None] - 1)
    layers = replace(of_pooled(rows, labels=labels), plan=plan_of(((20,), (20,)), held_out=1))
    assert score("linear_probe", layers) == 1


def test_probe_is_fitted_on_the_images_it_is_not_tested_on() -> None:
    # The held-out images contradict the others: fitted on them too, half of them would come out right.
    labels = np.arange(40) % 2
    sides = (2 * labels - 1) * np.where(np.arange(40) < 20, 1, -1)
    rows = sides[:, None].astype(np.float64)
    layers = replace(of_pooled(rows, labels=labels), plan=plan_of(((20,), (20,)), held_out=1))
    assert score("linear_probe", layers) == 0


def test_probe_of_a_constant_layer_names_the_class_with_the_most_fitted_images() -> None:
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1])
    layers = replace(of_pooled(np.ones((11, 3)), labels=labels), plan=plan_of(((6,), (5,)), held_out=1))
    assert score("linear_probe", layers) == 3 / 5


def test_probe_of_a_bootstrap_is_that_of_the_repeated_images() -> None:
    layers = related_layers([5], 4, classes=5)
    times = (0, 2, 1, 3, 1)
    repeated: dict[bool, list[int]] = {False: [], True: []}
    for chunk in PLAN.chunks:
        repeated[PLAN.is_held_out(chunk.group)] += times[chunk.group] * list(range(chunk.start, chunk.stop))
    drawn = SCORES.get("linear_probe")(LayerEvidence(layers.measured(), times), 0)
    expected = ridge_accuracy(layers.pooled[0], layers.labels, 5, repeated[False], repeated[True])
    assert drawn == pytest.approx(expected)
    assert drawn != expected_linear_probe(layers, 0)


def test_scores_of_a_bootstrap_are_those_of_the_repeated_images() -> None:
    layers = related_layers([5], 4, "rectified")
    times = (0, 2, 1, 3, 1)
    images = [i for chunk in PLAN.chunks for _ in range(times[chunk.group]) for i in range(chunk.start, chunk.stop)]
    repeated = replace(layers, maps=(layers.maps[0][images],), labels=layers.labels[images])
    drawn = LayerEvidence(layers.measured(), times)
    for name in ("activation_norm", "sparsity", "effective_rank", "class_separation"):
        assert SCORES.get(name)(drawn, 0) == pytest.approx(REFERENCES[name](repeated, 0), rel=1e-9), name


def test_probe_without_held_out_images_is_an_error() -> None:
    layers = replace(related_layers([2], 0), plan=plan_of(((100, 49),)))
    with pytest.raises(ValueError, match=r"^no held-out images were gathered$"):
        score("linear_probe", layers)


def test_sparsity_without_counted_zeros_is_an_error() -> None:
    measured = related_layers([2], 0).measured()
    without = replace(measured, groups=tuple(replace(group, zeros=None) for group in measured.groups))
    with pytest.raises(ValueError, match=r"^zeros were not counted$"):
        SCORES.get("sparsity")(without.evidence(), 0)


def test_depth_and_cost_are_shares_of_the_last_candidate() -> None:
    evidence = related_layers([2, 2, 2, 2], 0).measured().evidence()
    for name in ("relative_depth", "multiply_adds"):
        assert [SCORES.get(name)(evidence, layer) for layer in range(4)] == [0.25, 0.5, 0.75, 1]


def test_cost_is_0_where_no_layer_has_a_cost() -> None:
    measured = related_layers([2, 2], 0).measured()
    free = replace(measured, candidates=tuple(replace(c, multiply_adds=0) for c in measured.candidates))
    assert SCORES.get("multiply_adds")(free.evidence(), 1) == 0
