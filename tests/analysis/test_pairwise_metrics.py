"""Distances between layers against references from the raw features, written from the definitions in the papers."""

from collections.abc import Callable

import numpy as np
import pytest
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.measurement import LayerEvidence
from hintsearch.analysis.pairwise_metrics import PAIRWISE, check_images
from hintsearch.models.errors import InputError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_layers import MadeLayers, plan_of, related_layers
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.lists(st.integers(1, 9), min_size=3, max_size=3)
KINDS = st.sampled_from(["plain", "rectified", "offset"])

# Distance of two layers, by their places.
Reference = Callable[[MadeLayers, int, int], float]


def centred(features: Matrix) -> Matrix:
    return np.asarray(features - features.mean(axis=0))


def orthonormal_basis(features: Matrix) -> Matrix:
    """Of the centred features, by the rank rule that covariance eigenvalues count above 1e-8 of the largest."""
    left, singular, _ = np.linalg.svd(centred(features), full_matrices=False)
    return np.asarray(left[:, np.square(singular) > 1e-8 * np.square(singular).max()])


def expected_r2_cca(layers: MadeLayers, first: int, second: int) -> float:
    ours, theirs = (orthonormal_basis(layers.pooled[layer]) for layer in (first, second))
    return 1 - float(np.square(ours.T @ theirs).sum() / min(ours.shape[1], theirs.shape[1]))


def principal_part(features: Matrix) -> Matrix:
    """The centred features along as few principal axes as hold 99 % of their variance."""
    left, singular, _ = np.linalg.svd(centred(features), full_matrices=False)
    kept = 1
    while np.square(singular[:kept]).sum() < 0.99 * np.square(singular).sum():
        kept += 1
    return np.asarray(left[:, :kept] * singular[:kept])


def expected_svcca(layers: MadeLayers, first: int, second: int) -> float:
    ours, theirs = (np.linalg.qr(principal_part(layers.pooled[layer]))[0] for layer in (first, second))
    return 1 - float(np.linalg.svd(ours.T @ theirs, compute_uv=False).mean())


def projection_weighted(ours: Matrix, theirs: Matrix) -> float:
    """Morcos et al. 2018: correlations weighted by Σ_j |⟨h_i, x_j⟩| of our canonical variates and channels."""
    basis, other = orthonormal_basis(ours), orthonormal_basis(theirs)
    directions, correlations, _ = np.linalg.svd(basis.T @ other, full_matrices=False)
    variates = basis @ directions
    weights = np.zeros(len(correlations))
    for i in range(len(correlations)):
        for channel in centred(ours).T:
            weights[i] += abs(variates[:, i] @ channel)
    return float((weights * correlations).sum() / weights.sum())


def expected_pwcca(layers: MadeLayers, first: int, second: int) -> float:
    ours, theirs = layers.pooled[first], layers.pooled[second]
    return 1 - (projection_weighted(ours, theirs) + projection_weighted(theirs, ours)) / 2


def expected_cka_linear(layers: MadeLayers, first: int, second: int) -> float:
    """By the N×N Grams, each centred from both sides."""

    def centred_gram(features: Matrix) -> Matrix:
        gram = features @ features.T
        return np.asarray(gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean())

    ours, theirs = (centred_gram(layers.pooled[layer]) for layer in (first, second))
    return 1 - float((ours * theirs).sum() / np.sqrt(np.square(ours).sum() * np.square(theirs).sum()))


def unbiased_hsic(first: Matrix, second: Matrix) -> float:
    """Song et al. 2012, eq. 5, of two Grams."""
    n = len(first)
    ours, theirs = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    pairs = (ours * theirs.T).sum()
    totals = ours.sum() * theirs.sum() / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (ours.sum(axis=0) @ theirs.sum(axis=1))
    return float(pairs + totals - mixed) / (n * (n - 3))


def unbiased_cka(grams: list[tuple[Matrix, Matrix]]) -> float:
    """Nguyen et al. 2021: each HSIC is averaged over the minibatches, then divided."""
    both = np.mean([unbiased_hsic(ours, theirs) for ours, theirs in grams])
    first = np.mean([unbiased_hsic(ours, ours) for ours, _ in grams])
    second = np.mean([unbiased_hsic(theirs, theirs) for _, theirs in grams])
    return float(both / np.sqrt(first * second))


def expected_cka_linear_debiased(layers: MadeLayers, first: int, second: int) -> float:
    # The estimator does not change by a common offset; without it the Grams keep their digits.
    ours, theirs = centred(layers.pooled[first]), centred(layers.pooled[second])
    return 1 - unbiased_cka([(ours @ ours.T, theirs @ theirs.T)])


def expected_cka_rbf(layers: MadeLayers, first: int, second: int) -> float:
    def grams_of(features: Matrix) -> list[Matrix]:
        cuts = [slice(chunk.start, chunk.stop) for chunk in layers.plan.chunks]
        distances = pdist(features[cuts[0]])
        distances = distances[distances > 0]
        bandwidth = np.median(distances) if len(distances) else 1
        return [np.exp(-squareform(pdist(features[cut], "sqeuclidean")) / (2 * bandwidth**2)) for cut in cuts]

    return 1 - unbiased_cka(list(zip(grams_of(layers.pooled[first]), grams_of(layers.pooled[second]), strict=True)))


def expected_procrustes(layers: MadeLayers, first: int, second: int) -> float:
    """The angle to the other layer, best rotated; the narrower one has channels of zeros added."""
    ours, theirs = (centred(layers.pooled[layer]) for layer in (first, second))
    width = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (ours, theirs))
    rotation, _ = orthogonal_procrustes(theirs, ours)
    aligned = theirs @ rotation
    return float(np.arccos((ours * aligned).sum() / (np.linalg.norm(ours) * np.linalg.norm(aligned))))


def anchor_places(layers: MadeLayers) -> list[int]:
    return [chunk.start + place for chunk in layers.plan.chunks for place in range(chunk.anchors)]


def expected_rsa(layers: MadeLayers, first: int, second: int) -> float:
    places = anchor_places(layers)
    return 1 - float(spearmanr(*(pdist(layers.pooled[layer][places]) for layer in (first, second))).statistic)


# Whatever is registered has to be here.
REFERENCES: dict[str, Reference] = {
    "r2_cca": expected_r2_cca,
    "svcca": expected_svcca,
    "pwcca": expected_pwcca,
    "cka_linear": expected_cka_linear,
    "cka_linear_debiased": expected_cka_linear_debiased,
    "cka_rbf": expected_cka_rbf,
    "procrustes": expected_procrustes,
    "rsa": expected_rsa,
}


def distances(name: str, layers: MadeLayers) -> Matrix:
    return PAIRWISE.get(name)(layers.measured().evidence())


def assert_as_in_reference(name: str, layers: MadeLayers, rel: float = 1e-6) -> None:
    matrix = distances(name, layers)
    for first in range(len(layers.maps)):
        for second in set(range(len(layers.maps))) - {first}:
            expected = REFERENCES[name](layers, first, second)
            assert matrix[first, second] == pytest.approx(expected, rel=rel), (first, second)


@pytest.mark.parametrize("name", PAIRWISE.names())
@given(widths=WIDTHS, kind=KINDS, seed=SEEDS)
@example(widths=[5, 4, 1], kind="rectified", seed=1)  # The last layer is 0 on the whole first chunk.
@settings(deadline=None, max_examples=20)
def test_distance_is_its_definition_on_the_raw_features(name: str, widths: list[int], kind: str, seed: int) -> None:
    assert_as_in_reference(name, related_layers(widths, seed, kind))


@pytest.mark.parametrize("name", PAIRWISE.names())
def test_distance_of_many_wide_layers_is_its_definition(name: str) -> None:
    plan = plan_of(((50, 49), (48, 47, 46)), anchors=20)
    assert_as_in_reference(name, related_layers([16, 40, 24, 3, 40], 1, "rectified", plan))


@pytest.mark.parametrize("name", PAIRWISE.names())
def test_distance_of_rank_deficient_layers_is_its_definition(name: str) -> None:
    layers = related_layers([4, 6, 5], 2)
    first, second, third = layers.maps
    doubled = np.concatenate([first, first, first[:, :1] + first[:, 1:2]], axis=1)
    with_dead = np.concatenate([second, np.zeros_like(second[:, :3])], axis=1)
    with_constant = np.concatenate([np.full_like(third[:, :2], 0.1), third], axis=1)
    assert_as_in_reference(name, layers.having([doubled, with_dead, with_constant]))


@pytest.mark.parametrize("name", ["r2_cca", "svcca", "pwcca"])
def test_axes_below_the_rank_rule_do_not_count(name: str) -> None:
    layers = related_layers([5, 4], 0)
    faint, *_ = related_layers([2], 1).maps
    # 3e-5² is below 1e-8 of the largest variance, 3e-3² above it.
    below = np.concatenate([layers.maps[0], 3e-5 * faint], axis=1)
    above = np.concatenate([layers.maps[0], 3e-3 * faint], axis=1)
    assert_as_in_reference(name, layers.having([below, layers.maps[1]]))
    assert_as_in_reference(name, layers.having([above, layers.maps[1]]), rel=1e-5)


def test_svcca_keeps_the_axes_that_hold_99_percent_of_the_variance() -> None:
    layers = related_layers([3, 3], 0, plan=plan_of(((30, 30), (40, 40))))
    basis = np.linalg.qr(centred(np.random.default_rng(0).standard_normal((140, 6))))[0]
    # Uncorrelated channels with 80 %, 19.5 % and .5 % of the variance; the third agrees between the layers.
    strengths = np.sqrt([0.8, 0.195, 0.005])
    first, second = basis[:, :3] * strengths, basis[:, [3, 1, 2]] * strengths
    measured = layers.having([x[:, :, None, None] for x in (first, second)])
    assert distances("svcca", measured)[0, 1] == pytest.approx(1 / 2)
    assert distances("r2_cca", measured)[0, 1] == pytest.approx(1 / 3)


def test_pwcca_weighs_a_correlation_by_what_it_accounts_for() -> None:
    layers = related_layers([2, 2], 0)
    basis = np.linalg.qr(centred(np.random.default_rng(0).standard_normal((len(layers.labels), 3))))[0]
    # One channel of 4 in common, one of 1 not: weights ⅘ and ⅕ in both directions.
    first, second = basis[:, [0, 1]] * [4, 1], basis[:, [0, 2]] * [4, 1]
    measured = layers.having([x[:, :, None, None] for x in (first, second)])
    assert distances("pwcca", measured)[0, 1] == pytest.approx(1 / 5)


def test_procrustes_of_two_channels_at_60_degrees_is_60_degrees() -> None:
    layers = related_layers([1, 1], 0)
    basis = np.linalg.qr(centred(np.random.default_rng(0).standard_normal((len(layers.labels), 2))))[0]
    first, second = basis[:, :1], -7 * basis @ [[0.5], [np.sqrt(3) / 2]]
    measured = layers.having([x[:, :, None, None] for x in (first, second)])
    assert distances("procrustes", measured)[0, 1] == pytest.approx(np.pi / 3)


def test_rsa_gives_tied_distances_their_mean_rank() -> None:
    layers = related_layers([3, 2, 4], 3)
    # Whole numbers: many pairs of images are equally far apart, and some images are equal.
    rounded = layers.having([np.repeat(np.round(x), 2, axis=2)[:, :, :1, :1] for x in layers.maps])
    places = anchor_places(rounded)
    assert len(np.unique(pdist(rounded.pooled[0][places]))) < len(places) ** 2 / 10
    assert_as_in_reference("rsa", rounded)


def test_rsa_of_images_that_repeat_is_its_definition() -> None:
    layers = related_layers([60, 30], 3)
    repeated = np.arange(len(layers.labels)) % 7
    assert_as_in_reference("rsa", layers.having([maps[repeated] for maps in layers.maps]))


@pytest.mark.parametrize("name", ["rsa", "cka_rbf", "cka_linear", "procrustes", "r2_cca"])
def test_a_mean_of_ten_million_spreads_does_no_harm(name: str) -> None:
    layers = related_layers([4, 6], 3)
    moved = layers.having([maps + 1e7 for maps in layers.maps])
    # The maps themselves lose half of their digits.
    np.testing.assert_allclose(distances(name, moved), distances(name, layers), rtol=1e-5)


@pytest.mark.parametrize("name", ["cka_linear_debiased", "cka_rbf"])
def test_unbiased_metrics_see_no_spread_where_a_single_image_differs(name: str) -> None:
    # Off the diagonal, its Gram is that of a constant layer but for what centring takes away.
    layers = related_layers([4, 6], 3)
    single = np.where(np.arange(len(layers.labels))[:, None, None, None] == 5, layers.maps[0], layers.maps[0][:1])
    matrix = distances(name, layers.having([single, layers.maps[1], np.full_like(single, 0.1)]))
    np.testing.assert_array_equal(matrix, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_rbf_of_mostly_equal_images_is_its_definition() -> None:
    layers = related_layers([60, 30], 3)
    rare = np.arange(len(layers.labels))[:, None, None, None] % 5 == 0
    assert_as_in_reference("cka_rbf", layers.having([np.where(rare, x, x[1]) for x in layers.maps]))


def test_debiased_cka_of_unrelated_layers_is_about_1_where_the_biased_one_is_not() -> None:
    rng = np.random.default_rng(0)
    layers = related_layers([1], 0).having(list(rng.standard_normal((2, 144 + 5, 60, 1, 1))))
    assert distances("cka_linear_debiased", layers)[0, 1] == pytest.approx(1, abs=0.05)
    assert distances("cka_linear", layers)[0, 1] < 0.8


def test_r2_cca_is_1_between_layers_without_correlation() -> None:
    layers = related_layers([5], 0)
    columns = orthonormal_basis(layers.pooled[0])[:, :, None, None]
    assert distances("r2_cca", layers.having([columns[:, :2], columns[:, 2:]]))[0, 1] == pytest.approx(1)


def test_r2_cca_is_0_between_a_layer_and_a_wider_one_that_holds_it() -> None:
    layers = related_layers([5], 0)
    (wide,) = layers.maps
    assert distances("r2_cca", layers.having([wide[:, :2], wide]))[0, 1] == pytest.approx(0, abs=1e-12)


def test_rbf_of_a_layer_constant_in_the_first_chunk_has_a_bandwidth_of_1() -> None:
    layers = related_layers([3, 4], 0)
    first, second = (maps.copy() for maps in layers.maps)
    second[: layers.plan.chunks[0].stop] = 0
    grams = []
    for chunk in layers.plan.chunks:
        ours, theirs = (x[chunk.start : chunk.stop].mean(axis=(2, 3)) for x in (first, second))
        bandwidth = np.median(pdist(first[: layers.plan.chunks[0].stop].mean(axis=(2, 3))))
        gram = np.exp(-squareform(pdist(ours, "sqeuclidean")) / (2 * bandwidth**2))
        grams.append((gram, np.exp(-squareform(pdist(theirs, "sqeuclidean")) / 2)))
    matrix = distances("cka_rbf", layers.having([first, second]))
    assert matrix[0, 1] == pytest.approx(1 - unbiased_cka(grams), rel=1e-6)


def test_rbf_without_grams_is_an_error() -> None:
    # Chunks of three images have none.
    layers = related_layers([2, 2], 0, plan=plan_of(((3, 3), (3,))))
    with pytest.raises(ValueError, match=r"^no Grams were gathered$"):
        distances("cka_rbf", layers)


def test_rsa_without_anchors_is_an_error() -> None:
    layers = related_layers([2, 2], 0, plan=plan_of(((30, 30), (30,))))
    with pytest.raises(ValueError, match=r"^no anchors were gathered$"):
        distances("rsa", layers)


@pytest.mark.parametrize("name", ["r2_cca", "svcca", "pwcca"])
def test_cca_refuses_fewer_than_two_images_a_channel(name: str) -> None:
    check_images(name, 16, 8, 16)
    with pytest.raises(InputError) as caught:
        check_images(name, 15, 8, 15)
    assert str(caught.value) == (
        f"{name} needs at least 16 images for layers of 8 channels, but there are 15; "
        f"raise layers.images or data.train_fraction, or leave {name} out"
    )


@pytest.mark.parametrize(
    ("name", "least"), [("cka_linear", 2), ("procrustes", 2), ("cka_linear_debiased", 4), ("rsa", 4)]
)
def test_other_metrics_refuse_too_few_images(name: str, least: int) -> None:
    check_images(name, least, 8, least)
    with pytest.raises(InputError) as caught:
        check_images(name, least - 1, 8, least - 1)
    assert str(caught.value) == (
        f"{name} needs at least {least} images, but there are {least - 1}; raise layers.images"
    )


def test_rbf_refuses_chunks_of_fewer_than_four_images() -> None:
    check_images("cka_rbf", 100, 8, 4)
    with pytest.raises(InputError) as caught:
        check_images("cka_rbf", 100, 8, 3)
    assert str(caught.value) == (
        "cka_rbf needs at least 4 images a chunk, but there are 3; "
        "raise layers.chunk or layers.images, or leave cka_rbf out"
    )


def test_a_bootstrapped_distance_is_that_of_the_repeated_images() -> None:
    layers = related_layers([4, 6], 0)
    measured = layers.measured()
    times = (2, 0, 1, 3, 1)
    drawn = LayerEvidence(measured, times)
    images = [
        image
        for chunk in layers.plan.chunks
        for _ in range(times[chunk.group])
        for image in range(chunk.start, chunk.stop)
    ]
    repeated = layers.having([maps[images] for maps in layers.maps])
    assert PAIRWISE.get("r2_cca")(drawn)[0, 1] == pytest.approx(expected_r2_cca(repeated, 0, 1), rel=1e-9)
