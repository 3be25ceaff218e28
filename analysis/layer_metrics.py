"""What is measured of a teacher's layers: distances between two of them, and scores of one, by name."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..distill.seeding import derived_seed
from ..models.errors import InputError
from ..models.registry import Registry
from .layer_distances import LayerDistances
from .layer_reading import Wanted
from .layer_scores import SCORES
from .layer_statistics import Matrix
from .measurement import LayerEvidence, LayerMeasurement
from .pairwise_metrics import PAIRWISE, check_images
from .reading_plan import Columns, ReadingPlan

# In a study: every registered metric.
ALL_METRICS = "all"


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


def what_they_read(metrics: Iterable[str]) -> Wanted:
    """What has to be gathered for the metrics beside the sums."""
    reads = {(PAIRWISE if name in PAIRWISE else SCORES).entry(name).facts["reads"] for name in metrics}
    return Wanted(
        zeros="feature maps" in reads,
        grams="Grams" in reads,
        anchors="anchors" in reads,
        held_out="held-out images" in reads,
    )


def check_enough_images(metrics: Iterable[str], plan: ReadingPlan, columns: Columns) -> None:
    """Whether there are enough images for every metric.

    Raises:
        InputError: too few for one; names it.
    """
    smallest = min(chunk.stop - chunk.start for chunk in plan.chunks)
    for name in metrics:
        if name in PAIRWISE:
            check_images(name, plan.images, max(columns.widths), smallest)
        elif SCORES.entry(name).facts["reads"] == "held-out images" and not plan.held_out:
            raise InputError(f"{name} needs at least 8 images, but there are {plan.images}; raise layers.images")


def layer_distances(
    measurement: LayerMeasurement,
    metrics: Sequence[str],
    bootstraps: int = 0,
    seed: int = 0,
    on_bootstrap: Callable[[int], None] | None = None,
) -> LayerDistances:
    """Turns what one pass gathered into one [L, L] matrix a metric.

    Args:
        measurement: with all that the metrics read.
        metrics: names of layer metrics.
        bootstraps: how often the image groups are drawn again, for the stability of selections.
        seed: of the bootstraps.
        on_bootstrap: called with the number of bootstraps done.

    Raises:
        InputError: an unknown metric.
    """
    for name in metrics:
        check_metric(name)
    distances, scores = _evaluated(measurement.evidence(), metrics)
    drawn: list[dict[str, Matrix]] = []
    # A single group drawn with replacement is the whole again.
    for number in range(bootstraps if len(measurement.groups) > 1 else 0):
        rng = np.random.default_rng(derived_seed("bootstrap", seed, number))
        drawn.append(_evaluated(measurement.bootstrap(rng), metrics)[0])
        if on_bootstrap:
            on_bootstrap(number + 1)
    return LayerDistances(
        tuple(candidate.path for candidate in measurement.candidates),
        distances,
        scores,
        sum(group.sums.count for group in measurement.groups),
        {name: np.stack([matrices[name] for matrices in drawn]) for name in metrics} if drawn else {},
        measurement.groups[0].sums.channels,
    )


def _evaluated(evidence: LayerEvidence, metrics: Sequence[str]) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """For every metric its distances [L, L], and for every score its values [L]."""
    distances: dict[str, Matrix] = {}
    scores: dict[str, Matrix] = {}
    for name in metrics:
        if name in SCORES:
            values = np.array([SCORES.get(name)(evidence, layer) for layer in range(len(evidence.candidates))])
            scores[name] = values
            distances[name] = np.abs(values[:, None] - values[None, :])
        else:
            distances[name] = PAIRWISE.get(name)(evidence)
    return distances, scores
