"""Clusterings of the items of a distance matrix around centres that are items themselves, and PURSUhInT's way to one.

A selector turns distances [L, L] (symmetric, not negative, 0 on the diagonal) and a number of clusters K, 1..L, into
exactly K clusters. It draws no random numbers: the same distances give the same clustering.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .layer_statistics import Matrix

MAXIMUM_ROUNDS = 80

# Sums of distances that differ by less are a tie: the order of addition alone makes them differ in the last digits.
TIE_DECIMALS = 12


@dataclass(frozen=True)
class Clustering:
    """Items 0 .. L−1 shared out among centres, each item to exactly one.

    Attributes:
        centres: in depth order.
        members: of each centre, in depth order; a centre is a member of its own cluster.
    """

    centres: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]

    def labels(self) -> list[int]:
        """For every item the position of its centre."""
        cluster_of = {item: position for position, own in enumerate(self.members) for item in own}
        return [cluster_of[item] for item in range(len(cluster_of))]


Selector = Callable[[Matrix, int], Clustering]


def paper_kmeans(distances: Matrix, clusters: int) -> Clustering:
    """PURSUhInT's k-means over layers (Keser et al., arXiv 2103.00053).

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
    return around(distances, min(cycle, key=lambda state: cost(distances, state)))


def around(distances: Matrix, centres: Sequence[int]) -> Clustering:
    """The clustering that gives each item to its nearest centre; `centres` in depth order."""
    nearest = assignment(distances, centres)
    return Clustering(tuple(centres), tuple(_items(nearest, position) for position in range(len(centres))))


def of_labels(distances: Matrix, labels: Sequence[int]) -> Clustering:
    """The clustering of items with equal labels, each around its medoid."""
    members = [_items(labels, label) for label in sorted(set(labels))]
    by_centre = sorted((medoid(distances, own), own) for own in members)
    return Clustering(tuple(centre for centre, _ in by_centre), tuple(own for _, own in by_centre))


def medoid(distances: Matrix, members: Sequence[int]) -> int:
    """The member with the smallest sum of distances to all members; the shallower one on a tie."""
    own = list(members)
    return own[int(np.argmin(distances[np.ix_(own, own)].sum(axis=0).round(TIE_DECIMALS)))]


def assignment(distances: Matrix, centres: Sequence[int]) -> list[int]:
    """For every item the position in `centres` of its nearest centre; ties go to the earlier centre.

    A centre is always its own, even where another centre is at distance 0.
    """
    nearest: list[int] = np.argmin(distances[:, list(centres)], axis=1).tolist()
    for position, centre in enumerate(centres):
        nearest[centre] = position
    return nearest


def cost(distances: Matrix, centres: Sequence[int]) -> float:
    """Sum over the items of the distance to the nearest centre."""
    return float(distances[:, list(centres)].min(axis=1).sum())


def evenly_spaced(size: int, points: int) -> list[int]:
    """`points` of 0 .. size−1 at equal steps from the first to the last; the middle if it is one."""
    if points == 1:
        return [size // 2]
    return [step * (size - 1) // (points - 1) for step in range(points)]


def _middle_member(nearest: list[int], position: int) -> int:
    members = _items(nearest, position)
    middle = sum(members) // len(members)
    return min(members, key=lambda layer: (abs(layer - middle), layer))


def _items(labels: Sequence[int], label: int) -> tuple[int, ...]:
    return tuple(item for item, own in enumerate(labels) if own == label)
