"""Which of the teacher's candidates become hint points.

A searched selector clusters a combination of layer metrics. A control selector ignores the metrics: it is what searched
hint points have to beat.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..models.candidates import Candidate, stage_ends
from ..models.errors import InputError, nearest
from ..models.registry import Registry
from .clustering import Selector, evenly_spaced, paper_kmeans
from .kmedoids import kmedoids
from .layer_distances import LayerDistances
from .partitioning import agglomerative, contiguous, spectral
from .silhouette import choose_clusters, medoid_silhouette

# The control selector that draws its layers.
RANDOM = "random"

ControlSelector = Callable[[Sequence[Candidate], int, np.random.Generator], list[int]]

SELECTORS: Registry[Selector] = Registry("selector")
CONTROL_SELECTORS: Registry[ControlSelector] = Registry("control selector")

AUTO: Literal["auto"] = "auto"
# More hint points than this are never chosen automatically: in a small student their layers would coincide.
HIGHEST_AUTOMATIC = 10


@dataclass(frozen=True)
class HintSelection:
    """Hint points with the reason for them.

    Attributes:
        points: module paths in depth order.
        indices: 1-based indices of the points among the candidates.
        clusters: for every point the 1-based indices of the candidates it stands for.
        selector: name.
        metrics: the combined layer metrics; empty for a control selector.
        weights: of the metrics, in their order; empty if all weigh the same.
        silhouette: mean medoid silhouette, −1..1; None for one cluster and for a control selector.
        stability: mean adjusted Rand index with the same choice on bootstraps of the images, 1 for no change, about 0
            for chance; None if it was not computed (`stability.with_stability`).
    """

    points: tuple[str, ...]
    indices: tuple[int, ...]
    clusters: tuple[tuple[int, ...], ...]
    selector: str
    metrics: tuple[str, ...]
    weights: tuple[float, ...] = ()
    silhouette: float | None = None
    stability: float | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "HintSelection":
        """The inverse of `dataclasses.asdict`, also from JSON, which has lists for tuples."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        values["clusters"] = tuple(tuple(own) for own in content["clusters"])
        return cls(**values)


SELECTORS.register(
    "paper_kmeans", source="Keser et al. 2023, arXiv 2103.00053", kind="clustering", centre="nearest the mean index"
)(paper_kmeans)
SELECTORS.register("kmedoids", source="Kaufman & Rousseeuw 1990", kind="clustering", centre="medoid")(kmedoids)
SELECTORS.register(
    "contiguous", source="Fisher 1958, with the cost of k-medoids", kind="clustering", centre="medoid of the run"
)(contiguous)
SELECTORS.register(
    "agglomerative", source="Sokal & Michener 1958, average linkage", kind="clustering", centre="medoid of the cluster"
)(agglomerative)
SELECTORS.register(
    "spectral",
    source="Ng et al. 2001; Damle et al. 2019, arXiv 1609.08251",
    kind="clustering",
    centre="medoid of the cluster",
)(spectral)


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


@CONTROL_SELECTORS.register(RANDOM, source="uniform without replacement, by seed", kind="control")
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


def select_hints(
    distances: LayerDistances,
    clusters: int | Literal["auto"],
    metrics: Sequence[str],
    selector: str,
    weights: Mapping[str, float] | None = None,
) -> HintSelection:
    """Chooses hint points by clustering the candidates; says how well they are apart, but not yet how stable they are.

    Args:
        distances: the layer metrics of the teacher.
        clusters: K, 1..L, or "auto" for the K of the largest medoid silhouette in 2..min(10, L−1) (1 for L ≤ 2).
        metrics: the layer metrics to combine.
        selector: name of a selector, not of a control selector.
        weights: of metrics by name, each above 0; 1 for a metric that is not in it.

    Raises:
        InputError: an unknown selector or metric, a wrong weight, or K out of range.
    """
    select = SELECTORS.get(selector)
    _check_weights(distances, weights or {})
    if clusters != AUTO:
        _check_clusters(clusters, len(distances.paths))
    combined = distances.combined(metrics, weights)
    if clusters == AUTO:
        clusters, _ = choose_clusters(combined, select, 2, HIGHEST_AUTOMATIC)
    found = select(combined, clusters)
    return HintSelection(
        tuple(distances.paths[centre] for centre in found.centres),
        tuple(centre + 1 for centre in found.centres),
        tuple(tuple(member + 1 for member in own) for own in found.members),
        selector,
        tuple(metrics),
        weights=tuple(float(weights.get(metric, 1.0)) for metric in metrics) if weights else (),
        silhouette=medoid_silhouette(combined, found),
    )


def silhouettes(
    distances: LayerDistances,
    metrics: Sequence[str],
    selector: str,
    weights: Mapping[str, float] | None = None,
    highest: int = HIGHEST_AUTOMATIC,
) -> dict[int, float]:
    """Mean medoid silhouette of each number of clusters K in 2..min(highest, L−1); empty for L ≤ 2.

    Its largest value is where `select_hints` with "auto" stops, if `highest` is left alone.

    Raises:
        InputError: an unknown selector or metric, or a wrong weight.
    """
    _check_weights(distances, weights or {})
    _, values = choose_clusters(distances.combined(metrics, weights), SELECTORS.get(selector), 2, highest)
    return values


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
    if not isinstance(clusters, int):
        raise InputError(f"hints.clusters is {clusters!r}, but must be 'auto' or a number; choose 1..{candidates}")
    if not 1 <= clusters <= candidates:
        raise InputError(
            f"hints.clusters is {clusters}, but the teacher has {candidates} candidates; choose 1..{candidates}"
        )


def _check_weights(distances: LayerDistances, weights: Mapping[str, float]) -> None:
    for metric in weights:
        if metric not in distances.distances:
            raise InputError(
                f"there is a weight for {metric!r}, but no such layer metric was measured; "
                f"{nearest(metric, distances.distances)}"
            )


def _even(size: int, points: int) -> list[int]:
    """`points` of 0 .. size−1 at equal steps, the last one included."""
    return [round((i + 1) * size / points) - 1 for i in range(points)]
