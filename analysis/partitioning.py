"""Selectors that share the layers out first and then take the medoid of each cluster as its centre."""

import numpy as np
from numpy.typing import NDArray

from .clustering import TIE_DECIMALS, Clustering, of_labels
from .layer_statistics import Matrix


def contiguous(distances: Matrix, clusters: int) -> Clustering:
    """Runs of consecutive layers with the smallest sum of distances to each run's medoid, by dynamic programming.

    Exact: no other K runs are cheaper (Fisher 1958; the cost is that of k-medoids). Ties are broken by depth: the first
    run is as short as it can be, then the second.

    Args:
        distances: [L, L] symmetric, not negative.
        clusters: K, 1..L.
    """
    size = len(distances)
    runs = _run_costs(distances)
    # The cheapest way to share out the layers from each one on, among a growing number of runs.
    remaining = runs[:, -1]
    last_of_first: list[NDArray[np.intp]] = []
    for _ in range(clusters - 1):
        totals = (runs[:, :-1] + remaining[1:]).round(TIE_DECIMALS)
        last_of_first.append(totals.argmin(axis=1))
        remaining = np.append(totals.min(axis=1), np.inf)[:size]
    labels: list[int] = []
    for label, lasts in enumerate(reversed(last_of_first)):
        labels += [label] * (int(lasts[len(labels)]) + 1 - len(labels))
    return of_labels(distances, labels + [clusters - 1] * (size - len(labels)))


def agglomerative(distances: Matrix, clusters: int) -> Clustering:
    """Agglomerative clustering by average linkage (Sokal & Michener 1958, UPGMA), cut at K clusters.

    Args:
        distances: [L, L] symmetric, not negative.
        clusters: K, 1..L.
    """
    if clusters in (1, len(distances)):
        return _trivial(distances, clusters)
    # scikit-learn takes a second to import, which every command of the command line would pay.
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(n_clusters=clusters, metric="precomputed", linkage="average")
    return of_labels(distances, model.fit_predict(distances).tolist())


def spectral(distances: Matrix, clusters: int) -> Clustering:
    """Normalised spectral clustering (Ng, Jordan & Weiss 2001) with labels by pivoted QR (Damle et al. 2019).

    The affinity is exp(−d²/2σ²) with σ the median distance of two layers, or 1 where that is 0. It is what
    scikit-learn's `SpectralClustering(affinity="precomputed", assign_labels="cluster_qr")` computes, with a dense eigen
    solver: its ARPACK gives up on matrices with many equal distances, or gives another answer each time. Labels that
    nobody got are given to the layers farthest from the medoid of their cluster, one after the other (the shallower on
    a tie).

    Args:
        distances: [L, L] symmetric, not negative.
        clusters: K, 1..L.
    """
    if clusters in (1, len(distances)):
        return _trivial(distances, clusters)
    embedding = _embedding(_affinity(distances), clusters)
    found = of_labels(distances, _labels_by_pivoted_qr(embedding))
    while len(found.centres) < clusters:
        found = _split(distances, found)
    return found


def _trivial(distances: Matrix, clusters: int) -> Clustering:
    size = len(distances)
    return of_labels(distances, [0] * size if clusters == 1 else range(size))


def _run_costs(distances: Matrix) -> Matrix:
    """Sum of distances to the medoid of the run from layer a to layer b, [a, b]; infinite for b < a."""
    size = len(distances)
    costs = np.full((size, size), np.inf)
    for first in range(size):
        sums = np.cumsum(distances[first:, first:], axis=0)
        # Row b of `sums` counts for the members a..b only.
        inside = np.tri(size - first, dtype=np.bool_)
        costs[first, first:] = np.where(inside, sums, np.inf).min(axis=1)
    return costs


def _affinity(distances: Matrix) -> Matrix:
    """Gaussian affinity, 0 on the diagonal."""
    bandwidth = float(np.median(distances[np.triu_indices(len(distances), 1)])) or 1.0
    # An affinity that underflows to 0 could leave a layer without any neighbour, and the Laplacian without a meaning.
    affinity = np.maximum(np.exp(-0.5 * np.square(distances / bandwidth)), np.finfo(np.float64).eps)
    np.fill_diagonal(affinity, 0.0)
    return affinity


def _embedding(affinity: Matrix, dimensions: int) -> Matrix:
    """The eigenvectors of the normalised Laplacian's smallest eigenvalues, divided by √degree; [L, dimensions]."""
    roots = np.sqrt(affinity.sum(axis=0))
    laplacian = np.eye(len(affinity)) - affinity / np.outer(roots, roots)
    _, vectors = np.linalg.eigh(laplacian)
    return np.asarray(vectors[:, :dimensions] / roots[:, None])


def _labels_by_pivoted_qr(embedding: Matrix) -> list[int]:
    """K layers whose rows [K] are the most independent are made the axes; each layer gets the axis it lies nearest."""
    rest = embedding.copy()
    pivots: list[int] = []
    for _ in range(embedding.shape[1]):
        pivot = int(np.square(rest).sum(axis=1).argmax())
        pivots.append(pivot)
        direction = rest[pivot] / np.linalg.norm(rest[pivot])
        rest -= np.outer(rest @ direction, direction)
    left, _, right = np.linalg.svd(embedding[pivots].T)
    labels: list[int] = np.abs(embedding @ (left @ right)).argmax(axis=1).tolist()
    return labels


def _split(distances: Matrix, clustering: Clustering) -> Clustering:
    """Opens one more cluster with the layer that is farthest from its centre."""
    labels = clustering.labels()
    gaps = distances[np.arange(len(labels)), [clustering.centres[label] for label in labels]]
    gaps[list(clustering.centres)] = -1.0
    labels[int(gaps.argmax())] = len(clustering.centres)
    return of_labels(distances, labels)
