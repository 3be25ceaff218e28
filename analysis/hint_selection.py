"""Which of the teacher's candidates become hint points.

A searched selector clusters a combination of layer metrics. A control selector ignores the metrics: it is what searched
hint points have to beat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..models.candidates import Candidate, stage_ends
from ..models.errors import InputError
from ..models.registry import Registry
from .clustering import assignment, evenly_spaced, index_kmeans, medoids
from .layer_distances import LayerDistances
from .layer_statistics import Matrix

Selector = Callable[[Matrix, int], list[int]]
ControlSelector = Callable[[Sequence[Candidate], int, np.random.Generator], list[int]]

SELECTORS: Registry[Selector] = Registry("selector")
CONTROL_SELECTORS: Registry[ControlSelector] = Registry("control selector")


@dataclass(frozen=True)
class HintSelection:
    """Hint points with the reason for them.

    Attributes:
        points: module paths in depth order.
        indices: 1-based indices of the points among the candidates.
        clusters: for every point the 1-based indices of the candidates it stands for.
        selector: name.
        metrics: the combined layer metrics; empty for a control selector.
    """

    points: tuple[str, ...]
    indices: tuple[int, ...]
    clusters: tuple[tuple[int, ...], ...]
    selector: str
    metrics: tuple[str, ...]


SELECTORS.register(
    "paper_kmeans", source="Keser et al. 2023, arXiv 2103.00053", kind="clustering", centre="nearest the mean index"
)(index_kmeans)
SELECTORS.register("kmedoids", source="Kaufman & Rousseeuw 1990", kind="clustering", centre="medoid")(medoids)


@CONTROL_SELECTORS.register("stage_ends", source="last block of each stage, the usual hints", kind="control")
def select_stage_ends(candidates: Sequence[Candidate], points: int, _rng: np.random.Generator) -> list[int]:
    """Ends of the teacher's stages; evenly spaced among them if there are more than wanted.

    If the teacher has fewer stages than points are wanted, all its stage ends are taken, and the evenly spaced
    candidates that lie farthest from them fill up.
    """
    ends = [candidate.index - 1 for candidate in stage_ends(candidates)]
    if points <= len(ends):
        return [ends[i] for i in _even(len(ends), points)]
    chosen = list(ends)
    while len(chosen) < points:
        free = [i for i in range(len(candidates)) if i not in chosen]
        chosen.append(max(free, key=lambda i: (min(abs(i - taken) for taken in chosen), i)))
    return sorted(chosen)


@CONTROL_SELECTORS.register("evenly_spaced", source="equal steps of index, both ends included", kind="control")
def select_evenly_spaced(candidates: Sequence[Candidate], points: int, _rng: np.random.Generator) -> list[int]:
    """Equal steps of index from the first candidate to the last, the seeds of PURSUhInT's k-means; the middle if one.

    Steps that end at the last candidate only would be the stage ends again in every network of equal stages.
    """
    return evenly_spaced(len(candidates), points)


@CONTROL_SELECTORS.register("random", source="uniform without replacement, by seed", kind="control")
def select_random(candidates: Sequence[Candidate], points: int, rng: np.random.Generator) -> list[int]:
    """Uniform without replacement."""
    return sorted(int(i) for i in rng.choice(len(candidates), size=points, replace=False))


@CONTROL_SELECTORS.register("reversed", source="arXiv 2502.04499: stage ends paired backwards", kind="control")
def select_reversed(candidates: Sequence[Candidate], points: int, rng: np.random.Generator) -> list[int]:
    """The points of `stage_ends`; pairing turns them round."""
    return select_stage_ends(candidates, points, rng)


@CONTROL_SELECTORS.register("last", source="a single hint at the end of the network", kind="control")
def select_last(candidates: Sequence[Candidate], _points: int, _rng: np.random.Generator) -> list[int]:
    """The last candidate only, whatever number of points is asked for."""
    return [len(candidates) - 1]


def select_hints(distances: LayerDistances, clusters: int, metrics: Sequence[str], selector: str) -> HintSelection:
    """Chooses hint points by clustering the candidates.

    Args:
        distances: the layer metrics of the teacher.
        clusters: K, 1..L.
        metrics: the layer metrics to combine.
        selector: `paper_kmeans` or `kmedoids`.

    Raises:
        InputError: an unknown selector or metric, or K out of range.
    """
    _check_clusters(clusters, len(distances.paths))
    combined = distances.combined(metrics)
    centres = SELECTORS.get(selector)(combined, clusters)
    nearest = assignment(combined, centres)
    return _selection(distances.paths, centres, nearest, selector, tuple(metrics))


def select_control(
    candidates: Sequence[Candidate], points: int, selector: str, rng: np.random.Generator
) -> HintSelection:
    """Chooses hint points without looking at the metrics; each point stands for itself alone.

    Args:
        candidates: of the teacher, in depth order.
        points: how many are wanted; `last` always gives one.
        selector: name of a control selector.
        rng: source of `random`.

    Raises:
        InputError: an unknown selector, or more points than candidates.
    """
    _check_clusters(points, len(candidates))
    centres = CONTROL_SELECTORS.get(selector)(candidates, points, rng)
    paths = tuple(candidate.path for candidate in candidates)
    return HintSelection(
        tuple(paths[i] for i in centres),
        tuple(i + 1 for i in centres),
        tuple((i + 1,) for i in centres),
        selector,
        (),
    )


def _check_clusters(clusters: int, candidates: int) -> None:
    if not 1 <= clusters <= candidates:
        raise InputError(
            f"hints.clusters is {clusters}, but the teacher has {candidates} candidates; choose 1..{candidates}"
        )


def _selection(
    paths: tuple[str, ...], centres: list[int], nearest: list[int], selector: str, metrics: tuple[str, ...]
) -> HintSelection:
    members = tuple(
        tuple(layer + 1 for layer, centre in enumerate(nearest) if centre == position)
        for position in range(len(centres))
    )
    points = tuple(paths[centre] for centre in centres)
    return HintSelection(points, tuple(centre + 1 for centre in centres), members, selector, metrics)


def _even(size: int, points: int) -> list[int]:
    """`points` of 0 .. size−1 at equal steps, the last one included."""
    return [round((i + 1) * size / points) - 1 for i in range(points)]
