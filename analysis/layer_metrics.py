"""What is measured of a teacher's layers: distances between two of them, and scores of one.

Each metric reads `LayerSums` only. To add one, write a function here with its registration on top.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from ..models.errors import InputError
from ..models.registry import Registry
from .layer_distances import LayerDistances
from .layer_statistics import LayerSums, Matrix

# Covariance eigenvalues below this share of the largest count as zero; a tighter rule is not reproducible from sums.
RANK_TOLERANCE = 1e-8

PairwiseMetric = Callable[[LayerSums], Matrix]
ScoreMetric = Callable[[LayerSums, int], float]

PAIRWISE: Registry[PairwiseMetric] = Registry("pairwise layer metric")
SCORES: Registry[ScoreMetric] = Registry("layer score")


@PAIRWISE.register(
    "r2_cca",
    source="Kornblith et al. 2019, arXiv 1905.00414; used by Keser et al., arXiv 2103.00053",
    kind="pairwise",
    range="0..1",
    direction="0 is most alike",
    invariances="invertible linear maps, translation",
)
def r2_cca(sums: LayerSums) -> Matrix:
    """1 − mean squared canonical correlation over min(rank X, rank Y), [L, L].

    A constant layer is at 0 from another constant one and at 1 from the rest.

    Raises:
        InputError: N < 2·max C, where the correlations are mostly chance.
    """
    widest = max(sums.channels)
    if sums.count < 2 * widest:
        raise InputError(
            f"r2_cca needs at least {2 * widest} images for layers of {widest} channels, but there are {sums.count}; "
            "raise layers.images or data.train_fraction, or leave r2_cca out"
        )
    whitened = [_whitening(sums, layer) for layer in range(len(sums.channels))]

    def distance(first: int, second: int) -> float:
        ours, theirs = whitened[first], whitened[second]
        rank = min(ours.shape[1], theirs.shape[1])
        if rank == 0:
            return float(ours.shape[1] != theirs.shape[1])
        correlations = ours.T @ sums.cross(first, second) @ theirs
        return 1 - float(np.square(correlations).sum() / rank)

    return _symmetric(len(sums.channels), distance)


@PAIRWISE.register(
    "cka_linear",
    source="Kornblith et al. 2019, arXiv 1905.00414",
    kind="pairwise",
    range="0..1",
    direction="0 is most alike",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def cka_linear(sums: LayerSums) -> Matrix:
    """1 − ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), [L, L].

    A constant layer is at 0 from another constant one and at 1 from the rest.
    """
    norms = [float(np.linalg.norm(sums.cross(layer, layer))) for layer in range(len(sums.channels))]

    def distance(first: int, second: int) -> float:
        if norms[first] == 0 or norms[second] == 0:
            return float(norms[first] != norms[second])
        return 1 - float(np.square(sums.cross(first, second)).sum()) / (norms[first] * norms[second])

    return _symmetric(len(sums.channels), distance)


@SCORES.register(
    "effective_rank",
    source="Roy & Vetterli 2007, EUSIPCO",
    kind="score",
    range="1..channels (0 for a constant layer)",
    direction="none",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def effective_rank(sums: LayerSums, layer: int) -> float:
    """Exponential of the entropy of the normalised singular values of the centred features."""
    eigenvalues = np.linalg.eigvalsh(sums.cross(layer, layer))
    kept = eigenvalues[eigenvalues > RANK_TOLERANCE * eigenvalues[-1]]
    if eigenvalues[-1] <= 0:
        return 0.0
    shares = np.sqrt(kept) / np.sqrt(kept).sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@SCORES.register(
    "class_separation",
    source="Fisher 1936: between-class over within-class variance",
    kind="score",
    range="0..∞",
    direction="higher separates better",
    invariances="orthogonal maps, isotropic scaling, translation",
)
def class_separation(sums: LayerSums, layer: int) -> float:
    """Between-class scatter over within-class scatter of the features (their traces); 0 for a constant layer."""
    total = float(np.trace(sums.cross(layer, layer)))
    if total <= 0:
        return 0.0
    members = sums.mean[sums.labels] * sums.count
    present = members > 0
    # Σ over the class's images of (x − mean), [classes, C], from the moment with the one-hot columns.
    deviations = sums.moment[sums.labels, sums.layer(layer)][present]
    between = float((np.square(deviations).sum(axis=1) / members[present]).sum())
    # Classes without inner spread would divide by zero: the ratio is capped where rounding begins.
    within = max(total - between, RANK_TOLERANCE * total)
    return max(between, 0.0) / within


def metric_names() -> tuple[str, ...]:
    """All layer metrics, pairwise ones first."""
    return PAIRWISE.names() + SCORES.names()


def check_metric(name: str) -> None:
    """Raises `InputError` with the nearest name unless `name` is a layer metric."""
    if name in PAIRWISE or name in SCORES:
        return
    everything: Registry[object] = Registry("layer metric")
    for entry in (*PAIRWISE, *SCORES):
        everything.register(entry.name, source=entry.source)(entry.item)
    everything.entry(name)


def layer_distances(sums: LayerSums, paths: Sequence[str], metrics: Sequence[str]) -> LayerDistances:
    """Turns the sums into one [L, L] matrix a metric.

    Args:
        sums: over the images, of the candidates in the order of `paths`.
        paths: module paths of the candidates.
        metrics: names of layer metrics.

    Raises:
        InputError: an unknown metric, or too few images for one.
    """
    distances: dict[str, Matrix] = {}
    scores: dict[str, Matrix] = {}
    for name in metrics:
        check_metric(name)
        if name in SCORES:
            values = np.array([SCORES.get(name)(sums, layer) for layer in range(len(paths))])
            scores[name] = values
            distances[name] = np.abs(values[:, None] - values[None, :])
        else:
            distances[name] = PAIRWISE.get(name)(sums)
    return LayerDistances(tuple(paths), distances, scores, sums.count)


def _whitening(sums: LayerSums, layer: int) -> Matrix:
    """W [C, rank] with orthonormal columns X·W for the centred features X."""
    eigenvalues, vectors = np.linalg.eigh(sums.cross(layer, layer))
    kept = eigenvalues > max(RANK_TOLERANCE * eigenvalues[-1], 0.0)
    return np.asarray(vectors[:, kept] / np.sqrt(eigenvalues[kept]))


def _symmetric(size: int, distance: Callable[[int, int], float]) -> Matrix:
    """[size, size] of distances, clipped to 0..1 against rounding, zero on the diagonal."""
    matrix = np.zeros((size, size))
    for first, second in combinations(range(size), 2):
        matrix[first, second] = matrix[second, first] = min(max(distance(first, second), 0.0), 1.0)
    return matrix
