"""The layer metrics of one teacher as distance matrices, and how a subset of them is combined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..models.errors import InputError
from .layer_statistics import Matrix


@dataclass(frozen=True)
class LayerDistances:
    """The layer metrics of one teacher on one data set.

    Attributes:
        paths: candidates in depth order.
        distances: for every metric, pairwise or score, its [L, L] matrix; a score's is |difference|.
        scores: for every score, its value of each candidate [L].
        images: number of images they were measured on.
        bootstraps: for every metric [B, L, L], the distances of B bootstraps over the image groups; empty if none
            were drawn.
        widths: of each candidate, the columns it was measured on: fewer than its channels where it was projected.
    """

    paths: tuple[str, ...]
    distances: dict[str, Matrix]
    scores: dict[str, Matrix]
    images: int
    bootstraps: dict[str, Matrix] = field(default_factory=dict)
    widths: tuple[int, ...] = ()

    def combined(self, metrics: Sequence[str], weights: Mapping[str, float] | None = None) -> Matrix:
        """Weighted mean over `metrics` of the rank-normalised distances, [L, L] in 0..1, zero on the diagonal.

        Args:
            metrics: names of measured layer metrics.
            weights: by name, 1 for a metric that is not in it; only their ratios matter.

        Raises:
            InputError: no metric, one that was not measured, or a weight that is not above 0.
        """
        return self._combined(self.distances, metrics, weights)

    def tell_apart(self, metrics: Sequence[str]) -> bool:
        """Whether the combined distances of different layers differ at all; a single pair cannot."""
        combined = self.combined(metrics)
        upper = combined[np.triu_indices(len(self.paths), 1)]
        return len(upper) < 2 or float(np.ptp(upper)) > 0

    def combined_bootstraps(self, metrics: Sequence[str], weights: Mapping[str, float] | None = None) -> Matrix:
        """As `combined`, for each bootstrap: [B, L, L]; B is 0 if none were drawn."""
        if not self.bootstraps:
            return np.zeros((0, len(self.paths), len(self.paths)))
        return self._combined(self.bootstraps, metrics, weights)

    def _combined(
        self, matrices: Mapping[str, Matrix], metrics: Sequence[str], weights: Mapping[str, float] | None
    ) -> Matrix:
        if not metrics:
            raise InputError("the metric subset is empty, but hint selection needs at least one layer metric")
        for metric in metrics:
            if metric not in matrices:
                known = ", ".join(sorted(matrices))
                raise InputError(f"the layer metric {metric!r} was not measured; layers.metrics has {known}")
        shares = np.array([check_weight(metric, (weights or {}).get(metric, 1.0)) for metric in metrics])
        normalised = np.stack([rank_normalised(matrices[metric]) for metric in metrics])
        return np.asarray(np.tensordot(shares / shares.sum(), normalised, axes=1))


def rank_normalised(distances: Matrix) -> Matrix:
    """Replaces the distances off the diagonal by their mean ranks, scaled to 0..1; [..., L, L] symmetric."""
    if distances.ndim > 2:
        return np.stack([rank_normalised(matrix) for matrix in distances])
    size = len(distances)
    upper = np.triu_indices(size, 1)
    values = distances[upper]
    result = np.zeros((size, size))
    if len(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        mean_rank = last - (counts - 1) / 2
        result[upper] = mean_rank[inverse] / len(values)
    return result + result.T


def check_weight(metric: str, weight: float) -> float:
    """The weight of a metric in a combination, if it is a number above 0; else raises `InputError`."""
    # Written so that NaN fails too.
    if not 0 < weight < float("inf"):
        raise InputError(f"the weight of the layer metric {metric!r} is {weight:g}, but must be above 0; leave it out")
    return float(weight)
