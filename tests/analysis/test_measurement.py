from dataclasses import replace

import numpy as np
import pytest
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.measurement import LayerEvidence, LayerMeasurement
from hypothesis import given, settings
from hypothesis import strategies as st
from made_layers import PLAN, MadeLayers, made_candidates, measurement_of, plan_of, related_layers, rows_of

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def layers() -> MadeLayers:
    """Two layers of 4 and 3 channels, read by `PLAN`: five groups, of which two are held out."""
    return related_layers([4, 3], 0)


@pytest.fixture(scope="module")
def measured(layers: MadeLayers) -> LayerMeasurement:
    return layers.measured()


def images_of(group: int) -> list[int]:
    return [image for chunk in PLAN.chunks if chunk.group == group for image in range(chunk.start, chunk.stop)]


def joined(layers: MadeLayers) -> Matrix:
    return np.concatenate(layers.pooled, axis=1)


def test_each_group_holds_the_sums_of_its_own_images(layers: MadeLayers, measured: LayerMeasurement) -> None:
    rows = rows_of(layers.pooled, layers.labels, layers.classes)
    assert len(measured.groups) == 5
    for group, statistics in enumerate(measured.groups):
        own = rows[images_of(group)]
        assert statistics.sums.count == len(own)
        np.testing.assert_allclose(statistics.sums.mean, own.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(statistics.sums.moment, np.cov(own.T, bias=True) * len(own), rtol=1e-9, atol=1e-9)


def test_evidence_is_the_whole(layers: MadeLayers, measured: LayerMeasurement) -> None:
    evidence = measured.evidence()
    rows = rows_of(layers.pooled, layers.labels, layers.classes)
    assert evidence.times == (1,) * 5
    assert evidence.sums.count == len(rows)
    np.testing.assert_allclose(evidence.sums.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(evidence.sums.moment, np.cov(rows.T, bias=True) * len(rows), rtol=1e-9, atol=1e-9)
    assert evidence.statistics.minibatches == len(PLAN.chunks)
    assert evidence.candidates == made_candidates(layers)


def test_the_probe_is_fitted_on_the_groups_that_are_not_held_out(
    layers: MadeLayers, measured: LayerMeasurement
) -> None:
    fitted = images_of(0) + images_of(1) + images_of(2)
    fit = measured.evidence().fit
    assert fit.count == len(fitted)
    np.testing.assert_allclose(fit.mean[fit.layer(0)], layers.pooled[0][fitted].mean(axis=0), rtol=1e-12)


def test_held_out_features_and_labels_are_those_of_the_last_groups(
    layers: MadeLayers, measured: LayerMeasurement
) -> None:
    tested = images_of(3) + images_of(4)
    features, labels = measured.evidence().held_out
    np.testing.assert_array_equal(features, joined(layers)[tested])
    np.testing.assert_array_equal(labels, layers.labels[tested])


def test_anchors_are_the_first_images_of_every_group(layers: MadeLayers, measured: LayerMeasurement) -> None:
    first = [image for group in range(5) for image in images_of(group)[:12]]
    np.testing.assert_array_equal(measured.evidence().anchors, joined(layers)[first])


def test_a_drawn_group_counts_as_often_as_it_was_drawn(layers: MadeLayers, measured: LayerMeasurement) -> None:
    evidence = LayerEvidence(measured, (2, 0, 1, 0, 3))
    images = 2 * images_of(0) + images_of(2) + 3 * images_of(4)
    rows = rows_of(layers.pooled, layers.labels, layers.classes)[images]
    assert evidence.sums.count == len(images)
    np.testing.assert_allclose(evidence.sums.moment, np.cov(rows.T, bias=True) * len(rows), rtol=1e-9, atol=1e-9)
    assert evidence.fit.count == 2 * len(images_of(0)) + len(images_of(2))


def test_a_held_out_group_drawn_twice_is_tested_twice(layers: MadeLayers, measured: LayerMeasurement) -> None:
    features, labels = LayerEvidence(measured, (1, 1, 1, 0, 2)).held_out
    np.testing.assert_array_equal(features, joined(layers)[2 * images_of(4)])
    np.testing.assert_array_equal(labels, layers.labels[2 * images_of(4)])


def test_anchors_of_a_group_drawn_twice_count_once(layers: MadeLayers, measured: LayerMeasurement) -> None:
    anchors = LayerEvidence(measured, (2, 0, 0, 3, 0)).anchors
    np.testing.assert_array_equal(anchors, joined(layers)[images_of(0)[:12] + images_of(3)[:12]])


@given(SEEDS)
@settings(deadline=None)
def test_a_bootstrap_draws_as_many_groups_held_out_ones_among_themselves(measured: LayerMeasurement, seed: int) -> None:
    times = measured.bootstrap(np.random.default_rng(seed)).times
    assert len(times) == 5
    assert sum(times[:3]) == 3
    assert sum(times[3:]) == 2


def test_bootstraps_draw_every_group_about_equally_often(measured: LayerMeasurement) -> None:
    rng = np.random.default_rng(0)
    totals = np.sum([measured.bootstrap(rng).times for _ in range(600)], axis=0)
    # Binomial with a standard deviation of about 20.
    assert (np.abs(totals - 600) < 100).all()


def test_a_bootstrap_is_fixed_by_its_seed(measured: LayerMeasurement) -> None:
    drawn = [[measured.bootstrap(np.random.default_rng(seed)).times for seed in range(9)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 4


def test_without_held_out_groups_a_bootstrap_draws_from_all() -> None:
    measured = related_layers([2], 0, plan=plan_of(((9,), (8,), (7,)))).measured()
    times = [measured.bootstrap(np.random.default_rng(seed)).times for seed in range(20)]
    assert {sum(drawn) for drawn in times} == {3}
    assert all(any(drawn[group] for drawn in times) for group in range(3))


@given(st.permutations(range(len(PLAN.chunks))))
@settings(deadline=None, max_examples=30)
def test_readings_may_come_in_any_order(layers: MadeLayers, measured: LayerMeasurement, arrival: list[int]) -> None:
    other = measurement_of(layers, arrival)
    for ours, theirs in zip(measured.groups, other.groups, strict=True):
        np.testing.assert_array_equal(ours.sums.moment, theirs.sums.moment)
        np.testing.assert_array_equal(ours.sums.mean, theirs.sums.mean)
        np.testing.assert_array_equal(ours.alignment, theirs.alignment)
        np.testing.assert_array_equal(ours.norms, theirs.norms)
    for name in ("anchors", "held_out", "held_out_labels"):
        for mine, yours in zip(getattr(measured, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(mine, yours)


@pytest.mark.parametrize("missing", range(len(PLAN.chunks)))
def test_a_missing_reading_is_an_error(layers: MadeLayers, missing: int) -> None:
    others = [position for position in range(len(PLAN.chunks)) if position != missing]
    with pytest.raises(ValueError, match=f"^the reading of chunk number {missing} is missing$"):
        measurement_of(layers, others)


def test_axes_of_a_layer_are_those_of_its_covariance_that_have_spread(layers: MadeLayers) -> None:
    first, _ = layers.maps
    # Two directions of four channels; of the third layer, nothing.
    thin = np.concatenate([first[:, :2], first[:, :1] + first[:, 1:2], 1e-5 * first[:, 2:3]], axis=1)
    spectra = layers.having([first, thin, np.full_like(first, 0.1)]).measured().evidence().spectra
    assert [spectrum.axes.shape for spectrum in spectra] == [(4, 4), (4, 2), (4, 0)]
    features = thin.mean(axis=(2, 3)) - thin.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(
        spectra[1].eigenvalues, np.square(np.linalg.svd(features, compute_uv=False)[:2]), rtol=1e-9
    )
    whitened = features @ spectra[1].whitening
    np.testing.assert_allclose(whitened.T @ whitened, np.eye(2), atol=1e-9)


def test_without_held_out_groups_there_is_nothing_to_test_the_probe_on(layers: MadeLayers) -> None:
    features, labels = replace(layers, plan=plan_of(((100, 49),))).measured().evidence().held_out
    assert features.shape == (0, 7)
    assert labels.shape == (0,)
