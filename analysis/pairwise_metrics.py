"""Distances between two candidates. To add one, write a function here with its registration on top.

Each reads `LayerEvidence` and gives an [L, L] matrix, 0 on the diagonal. A layer without spread (constant features,
dead channels only) is at 0 from another such layer, and at the distance of unrelated layers from the rest.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch

from ..models.errors import InputError
from ..models.registry import Registry
from .kernel_alignment import SMALLEST_ALIGNMENT, squared_distances
from .layer_statistics import Matrix
from .measurement import LayerEvidence, Spectrum

PairwiseMetric = Callable[[LayerEvidence], Matrix]

PAIRWISE: Registry[PairwiseMetric] = Registry("pairwise layer metric")

# Directions that SVCCA keeps, by their share of the variance.
SVCCA_VARIANCE = 0.99
# Where a debiased self-similarity is rounding of what it was subtracted from.
_DEBIASED_TOLERANCE = 1e-12


@PAIRWISE.register(
    "r2_cca",
    source="Kornblith et al. 2019, arXiv 1905.00414; used by Keser et al., arXiv 2103.00053",
    kind="pairwise",
    symmetric="yes",
    reads="sums",
    images="2 × widest",
    range="0..1",
    direction="0 is most alike",
    invariances="invertible linear maps, translation",
)
def r2_cca(evidence: LayerEvidence) -> Matrix:
    """1 − mean squared canonical correlation over min(rank X, rank Y), [L, L]."""

    def distance(first: int, second: int, between: Matrix) -> float:
        return 1 - float(np.square(between).sum() / min(between.shape))

    return _by_whitened(evidence, evidence.spectra, distance)


@PAIRWISE.register(
    "svcca",
    source="Raghu et al. 2017, arXiv 1706.05806",
    kind="pairwise",
    symmetric="yes",
    reads="sums",
    images="2 × widest",
    range="0..1",
    direction="0 is most alike",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def svcca(evidence: LayerEvidence) -> Matrix:
    """1 − mean canonical correlation of the principal axes that hold 99 % of each layer's variance, [L, L]."""

    def distance(first: int, second: int, between: Matrix) -> float:
        return 1 - float(np.linalg.svd(between, compute_uv=False).mean())

    return _by_whitened(evidence, tuple(_truncated(spectrum) for spectrum in evidence.spectra), distance)


@PAIRWISE.register(
    "pwcca",
    source="Morcos et al. 2018, arXiv 1806.05759; the mean of both directions",
    kind="pairwise",
    symmetric="yes",
    reads="sums",
    images="2 × widest",
    range="0..1",
    direction="0 is most alike",
    invariances="permutations and sign flips of channels, isotropic scaling, translation",
)
def pwcca(evidence: LayerEvidence) -> Matrix:
    """1 − canonical correlations weighted by how much of each layer their variates account for, [L, L]."""
    spectra = evidence.spectra

    def distance(first: int, second: int, between: Matrix) -> float:
        ours, correlations, theirs = np.linalg.svd(between, full_matrices=False)
        weights = _projection_weights(spectra[first], ours), _projection_weights(spectra[second], theirs.T)
        return 1 - float(np.mean([share @ correlations for share in weights]))

    return _by_whitened(evidence, spectra, distance)


@PAIRWISE.register(
    "cka_linear",
    source="Kornblith et al. 2019, arXiv 1905.00414",
    kind="pairwise",
    symmetric="yes",
    reads="sums",
    images="2",
    range="0..1",
    direction="0 is most alike",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def cka_linear(evidence: LayerEvidence) -> Matrix:
    """1 − ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), [L, L]."""
    return _from_alignment(_squared_cross_norms(evidence), 0.0, 1.0)


@PAIRWISE.register(
    "cka_linear_debiased",
    source="Nguyen et al. 2021, arXiv 2010.15327; Song et al. 2012, JMLR 13",
    kind="pairwise",
    symmetric="yes",
    reads="sums",
    images="4",
    range="0..2",
    direction="0 is most alike, 1 unrelated",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def cka_linear_debiased(evidence: LayerEvidence) -> Matrix:
    """1 − CKA by the unbiased HSIC of linear Grams over all images, [L, L].

    With centred features, n(n−3)·HSIC = ‖XᵀY‖²_F − n/(n−2)·kᵀl + Σk·Σl/((n−1)(n−2)) for k_i = ‖x_i‖², l_i = ‖y_i‖²;
    kᵀl comes from the columns of squared norms.
    """
    sums = evidence.sums
    count, layers = sums.count, len(sums.channels)
    norms = [slice(place, place + 1) for place in range(sums.norms.start, sums.norms.stop)]
    # ‖x − μ‖² = ‖x‖² − 2μᵀx + ‖μ‖²: its deviation from its mean is this combination of the columns.
    combination = np.zeros((layers, len(sums.mean)))
    for layer in range(layers):
        combination[layer, norms[layer]] = 1
        combination[layer, sums.layer(layer)] = -2 * sums.mean[sums.layer(layer)]
    totals = np.array([np.trace(sums.cross(layer, layer)) for layer in range(layers)])
    outer = np.outer(totals, totals)
    products = combination @ sums.moment @ combination.T + outer / count
    squares = _squared_cross_norms(evidence)
    alignment = squares - count / (count - 2) * products + outer / ((count - 1) * (count - 2))
    return _from_alignment(alignment, 0.0, 2.0, _DEBIASED_TOLERANCE * np.diag(squares))


@PAIRWISE.register(
    "cka_rbf",
    source="Kornblith et al. 2019, arXiv 1905.00414; minibatches: Nguyen et al. 2021, arXiv 2010.15327",
    kind="pairwise",
    symmetric="yes",
    reads="Grams",
    images="4 a chunk",
    range="0..2",
    direction="0 is most alike, 1 unrelated",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def cka_rbf(evidence: LayerEvidence) -> Matrix:
    """1 − CKA by the unbiased HSIC of Gaussian Grams, averaged over the chunks, [L, L].

    The bandwidth of a layer is the median distance between images of the first chunk that differ in it; 1 if none do.
    """
    statistics = evidence.statistics
    if statistics.alignment is None:
        raise ValueError("no Grams were gathered")
    alignment = statistics.alignment / statistics.minibatches
    return _from_alignment(alignment, 0.0, 2.0, SMALLEST_ALIGNMENT)


@PAIRWISE.register(
    "procrustes",
    source="Williams et al. 2021, arXiv 2110.14739 (angular)",
    kind="pairwise",
    symmetric="yes",
    reads="sums",
    images="2",
    range="0..π/2",
    direction="0 is most alike",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def procrustes(evidence: LayerEvidence) -> Matrix:
    """arccos(‖XᵀY‖_* / (‖X‖_F ‖Y‖_F)), radians, [L, L]."""
    sums = evidence.sums
    layers = len(sums.channels)
    alignment = np.zeros((layers, layers))
    for layer in range(layers):
        alignment[layer, layer] = np.trace(sums.cross(layer, layer))
    for first, second in combinations(range(layers), 2):
        nuclear = np.linalg.svd(sums.cross(first, second), compute_uv=False).sum()
        alignment[first, second] = alignment[second, first] = nuclear
    return np.arccos(1 - _from_alignment(alignment, 0.0, 1.0))


@PAIRWISE.register(
    "rsa",
    source="Kriegeskorte et al. 2008, Front. Syst. Neurosci. 2:4; Euclidean dissimilarities, Spearman's correlation",
    kind="pairwise",
    symmetric="yes",
    reads="anchors",
    images="4",
    range="0..2",
    direction="0 is most alike, 1 unrelated",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def rsa(evidence: LayerEvidence) -> Matrix:
    """1 − rank correlation of the Euclidean distances between all pairs of anchor images, [L, L]."""
    if not len(evidence.anchors):
        raise ValueError("no anchors were gathered")
    pairs = np.triu_indices(len(evidence.anchors), 1)
    ranks = []
    for layer in range(len(evidence.candidates)):
        features = evidence.anchors[:, evidence.sums.layer(layer)]
        ranks.append(_centred_ranks(squared_distances(torch.from_numpy(features)).numpy()[pairs]))
    stacked = np.stack(ranks)
    return _from_alignment(stacked @ stacked.T, 0.0, 2.0)


def _by_whitened(
    evidence: LayerEvidence, spectra: tuple[Spectrum, ...], distance: Callable[[int, int, Matrix], float]
) -> Matrix:
    """[L, L] of `distance(first, second, W_xᵀ XᵀY W_y)`, whose singular values are the canonical correlations."""
    sums = evidence.sums
    result = np.zeros((len(spectra), len(spectra)))
    whitened = [spectrum.whitening for spectrum in spectra]
    for first, ours in enumerate(whitened):
        across = ours.T @ sums.moment[sums.layer(first)]
        for second in range(first + 1, len(spectra)):
            theirs = whitened[second]
            if not ours.shape[1] or not theirs.shape[1]:
                value = float(ours.shape[1] != theirs.shape[1])
            else:
                value = distance(first, second, across[:, sums.layer(second)] @ theirs)
            result[first, second] = result[second, first] = min(max(value, 0.0), 1.0)
    return result


def _truncated(spectrum: Spectrum) -> Spectrum:
    if not len(spectrum.eigenvalues):
        return spectrum
    shares = np.cumsum(spectrum.eigenvalues) / spectrum.eigenvalues.sum()
    kept = int(np.searchsorted(shares, SVCCA_VARIANCE)) + 1
    return Spectrum(spectrum.eigenvalues[:kept], spectrum.axes[:, :kept])


def _projection_weights(spectrum: Spectrum, directions: Matrix) -> Matrix:
    """Σ_j |⟨h_i, x_j⟩| of the canonical variates h = X·W·directions with the channels x_j, as shares [k]."""
    variates = directions.T @ (np.sqrt(spectrum.eigenvalues)[:, None] * spectrum.axes.T)
    weights = np.abs(variates).sum(axis=1)
    return np.asarray(weights / weights.sum())


def _squared_cross_norms(evidence: LayerEvidence) -> Matrix:
    """‖XᵀY‖²_F of all pairs, [L, L]."""
    sums = evidence.sums
    features = slice(0, sum(sums.channels))
    edges = np.cumsum([0, *sums.channels[:-1]])
    squares = np.square(sums.moment[features, features])
    return np.asarray(np.add.reduceat(np.add.reduceat(squares, edges, axis=0), edges, axis=1))


def _centred_ranks(values: Matrix) -> Matrix:
    """Mean ranks of the values, centred; zeros if all are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(ranks[inverse] - (len(values) + 1) / 2)


def _from_alignment(alignment: Matrix, low: float, high: float, least: Matrix | float = 0.0) -> Matrix:
    """1 − alignment of each pair over the geometric mean of the self-alignments, clipped against rounding; [L, L].

    A layer whose self-alignment is at most `least` has no spread.
    """
    own = np.diag(alignment)
    own = np.sqrt(np.where(own > least, own, 0))
    scale = np.outer(own, own)
    similarity = np.divide(alignment, scale, out=np.zeros_like(alignment), where=scale > 0)
    flat = own == 0
    similarity[np.ix_(flat, flat)] = 1
    distances = np.clip(1 - similarity, low, high)
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    return np.asarray(distances)


def check_images(metric: str, images: int, widest: int, smallest_chunk: int) -> None:
    """Whether there are enough images for a pairwise metric.

    Args:
        metric: its name.
        images: number of images N.
        widest: columns of the widest candidate.
        smallest_chunk: images of the smallest chunk.

    Raises:
        InputError: too few.
    """
    rule = PAIRWISE.entry(metric).facts["images"]
    if rule == "2 × widest" and images < 2 * widest:
        raise InputError(
            f"{metric} needs at least {2 * widest} images for layers of {widest} channels, but there are {images}; "
            f"raise layers.images or data.train_fraction, or leave {metric} out"
        )
    if rule == "4 a chunk" and smallest_chunk < 4:
        raise InputError(
            f"{metric} needs at least 4 images a chunk, but there are {smallest_chunk}; "
            f"raise layers.chunk or layers.images, or leave {metric} out"
        )
    if rule in ("2", "4") and images < int(rule):
        raise InputError(f"{metric} needs at least {rule} images, but there are {images}; raise layers.images")
