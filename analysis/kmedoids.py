"""K-medoids: the K items with the smallest sum of distances from each item to the nearest of them."""

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from .clustering import TIE_DECIMALS, Clustering, around
from .layer_statistics import Matrix

MOST_SUBSETS = 1000

# Of the largest distance. Less is rounding, and a swap for its sake could be undone by the next one, for ever.
LEAST_GAIN = 1e-12

States = NDArray[np.intp]


def kmedoids(distances: Matrix, clusters: int) -> Clustering:
    """K-medoids by BUILD and SWAP (Kaufman & Rousseeuw 1990).

    SWAP starts from every BUILD that fixes another first medoid, and the cheapest local optimum is kept. Where there
    are at most a thousand subsets (any K for L ≤ 12) they are all tried instead: about one small matrix in 600 has an
    optimum that no start reaches. Ties are broken by depth.

    Args:
        distances: [L, L] symmetric, not negative.
        clusters: K, 1..L.
    """
    size = len(distances)
    if comb(size, clusters) <= MOST_SUBSETS:
        contenders = np.array(list(combinations(range(size), clusters)), dtype=np.intp)
    else:
        contenders = build_and_swap(distances, clusters)
    costs = distances[:, contenders].min(axis=2).sum(axis=0).round(TIE_DECIMALS)
    best = min(contenders[costs == costs.min()].tolist())
    return around(distances, best)


def build_and_swap(distances: Matrix, clusters: int) -> States:
    """The local optima that SWAP reaches from BUILD with each item as first medoid; rows in depth order, no two equal.

    All starts go forward at once, and those that have met go on as one: a third of the time of one after the other.
    """
    running = np.unique(np.sort(_build(distances, clusters), axis=1), axis=0)
    settled: list[States] = []
    while len(running):
        swapped, improved = _swap_once(distances, running)
        settled.append(running[~improved])
        running = np.unique(np.sort(swapped[improved], axis=1), axis=0)
    return np.unique(np.concatenate(settled), axis=0)


def _build(distances: Matrix, clusters: int) -> States:
    """A start for each item as first medoid, [L, K]: each further medoid is the one that saves most."""
    starts = np.arange(len(distances))
    states = starts[:, None]
    nearest = distances.copy()
    while states.shape[1] < clusters:
        # Cost after adding each item as a further medoid; those that are medoids already must not be chosen again.
        costs = np.minimum(distances, nearest[:, :, None]).sum(axis=1)
        costs[starts[:, None], states] = np.inf
        added = costs.argmin(axis=1)
        states = np.column_stack([states, added])
        nearest = np.minimum(nearest, distances[added])
    return states


def _swap_once(distances: Matrix, states: States) -> tuple[States, NDArray[np.bool_]]:
    """The best swap of one medoid of each state [S, K] for another item, and which states it makes cheaper.

    The change of cost by medoid m leaving and item c coming (FastPAM1, Schubert & Rousseeuw 2019, arXiv 1810.05691) is
    the sum over the items of min(d(i, c), d₂) − d₁ where m is the nearest medoid, min(d(i, c), d₁) − d₁ elsewhere.
    """
    rows = np.arange(len(states))
    to_medoids = distances[states]
    owner = to_medoids.argmin(axis=1)
    first = to_medoids.min(axis=1)
    np.put_along_axis(to_medoids, owner[:, None, :], np.inf, axis=1)
    second = to_medoids.min(axis=1)
    kept = np.minimum(distances, first[:, :, None])
    lost = np.minimum(distances, second[:, :, None]) - kept
    owned = (owner[:, None, :] == np.arange(states.shape[1])[:, None]).astype(np.float64)
    changes = owned @ lost + (kept.sum(axis=1) - first.sum(axis=1)[:, None])[:, None, :]
    flat = changes.reshape(len(states), -1)
    best = flat.argmin(axis=1)
    leaving, coming = np.divmod(best, len(distances))
    swapped = states.copy()
    swapped[rows, leaving] = coming
    return swapped, flat[rows, best] < -LEAST_GAIN * distances.max()
