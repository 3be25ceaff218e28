"""Clustering of the items of a distance matrix around centres that are items themselves."""

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np

from .layer_statistics import Matrix

MAXIMUM_ROUNDS = 80
MOST_SUBSETS = 1000


def assignment(distances: Matrix, centres: Sequence[int]) -> list[int]:
    """For every item the position in `centres` of its nearest centre; ties go to the earlier centre.

    A centre is always its own, even where another centre is at distance 0.
    """
    nearest = np.argmin(distances[:, list(centres)], axis=1).tolist()
    for position, centre in enumerate(centres):
        nearest[centre] = position
    return [int(position) for position in nearest]


def cost(distances: Matrix, centres: Sequence[int]) -> float:
    """Sum over the items of the distance to the nearest centre."""
    return float(distances[:, list(centres)].min(axis=1).sum())


def evenly_spaced(size: int, points: int) -> list[int]:
    """`points` of 0 .. size−1 at equal steps from the first to the last; the middle if it is one."""
    if points == 1:
        return [size // 2]
    return [step * (size - 1) // (points - 1) for step in range(points)]


def index_kmeans(distances: Matrix, clusters: int) -> list[int]:
    """PURSUhInT's k-means over layers (Keser et al., arXiv 2103.00053): centres in depth order, 0-based.

    Seeds are evenly spaced by index. Each layer goes to the centre layer of smallest distance; a cluster's new centre
    is the member whose index is nearest to the floor of the mean member index (the shallower one on a tie). Assignment
    and update minimise different things, so the rounds may cycle: on the first repeated state the state of the cycle
    with the smallest cost is taken (the earliest on a tie).

    Args:
        distances: [L, L].
        clusters: K, 1..L.
    """
    centres = tuple(evenly_spaced(len(distances), clusters))
    visited: list[tuple[int, ...]] = []
    while centres not in visited and len(visited) < MAXIMUM_ROUNDS:
        visited.append(centres)
        nearest = assignment(distances, centres)
        centres = tuple(sorted(_middle_member(nearest, position) for position in range(clusters)))
    cycle = visited[visited.index(centres) :] if centres in visited else visited
    best: tuple[int, ...] = min(cycle, key=lambda state: cost(distances, state))
    return list(best)


def _middle_member(nearest: list[int], position: int) -> int:
    members = [layer for layer, centre in enumerate(nearest) if centre == position]
    middle = sum(members) // len(members)
    return min(members, key=lambda layer: (abs(layer - middle), layer))


def medoids(distances: Matrix, clusters: int) -> list[int]:
    """K-medoids by BUILD and SWAP (Kaufman & Rousseeuw 1990), centres in depth order, 0-based.

    SWAP starts from every BUILD that fixes another first medoid, and the cheapest local optimum is kept. Where there
    are at most a thousand subsets (any K for L ≤ 12) they are all tried instead: about one small matrix in 600 has an
    optimum that no start reaches. Ties are broken by depth.

    Args:
        distances: [L, L] symmetric, not negative.
        clusters: K, 1..L.
    """
    size = len(distances)
    if comb(size, clusters) <= MOST_SUBSETS:
        contenders = list(combinations(range(size), clusters))
    else:
        contenders = build_and_swap(distances, clusters)
    best: tuple[int, ...] = min(contenders, key=lambda centres: (round(cost(distances, centres), 12), centres))
    return list(best)


def build_and_swap(distances: Matrix, clusters: int) -> list[tuple[int, ...]]:
    """The local optima that SWAP reaches from BUILD with each item as first medoid; centres in depth order."""
    return [_swap(distances, _build(distances, clusters, first)) for first in range(len(distances))]


def _build(distances: Matrix, clusters: int, first: int) -> list[int]:
    centres = [first]
    nearest = distances[:, first].copy()
    while len(centres) < clusters:
        # Cost after adding each item as a further centre; those that are centres already must not be chosen again.
        costs = np.minimum(distances, nearest[:, None]).sum(axis=0)
        costs[centres] = np.inf
        added = int(np.argmin(costs))
        centres.append(added)
        nearest = np.minimum(nearest, distances[:, added])
    return centres


def _swap(distances: Matrix, centres: list[int]) -> tuple[int, ...]:
    best = cost(distances, centres)
    improved = True
    while improved:
        improved = False
        for position in range(len(centres)):
            others = [centre for place, centre in enumerate(centres) if place != position]
            nearest = distances[:, others].min(axis=1) if others else np.full(len(distances), np.inf)
            costs = np.minimum(distances, nearest[:, None]).sum(axis=0)
            costs[others] = np.inf
            candidate = int(np.argmin(costs))
            if costs[candidate] < best - 1e-12:
                centres = [*others, candidate]
                best, improved = float(costs[candidate]), True
                break
    return tuple(sorted(centres))
