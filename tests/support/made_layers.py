"""Made-up layers whose feature maps are at hand, and the measurement that a pass over them leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from hintsearch.analysis.kernel_alignment import gaussian_gram, median_distance, stacked_hsic
from hintsearch.analysis.layer_reading import ChunkReading
from hintsearch.analysis.layer_statistics import LayerStatistics, Matrix, sums_of_rows
from hintsearch.analysis.measurement import LayerMeasurement, MeasurementBuilder
from hintsearch.analysis.reading_plan import Chunk, ReadingPlan
from hintsearch.models.candidates import Candidate
from numpy.typing import NDArray

Labels = NDArray[np.int64]


def plan_of(groups: Sequence[Sequence[int]], anchors: int = 0, held_out: int = 0) -> ReadingPlan:
    """A plan of chunks of these sizes.

    Args:
        groups: sizes of each group's chunks.
        anchors: of each group.
        held_out: how many of the last groups the linear probe is tested on.
    """
    chunks: list[Chunk] = []
    start = 0
    for number, sizes in enumerate(groups):
        left = anchors
        for size in sizes:
            chunks.append(Chunk(start, start + size, number, min(left, size)))
            left -= min(left, size)
            start += size
    return ReadingPlan(start, len(groups), held_out, tuple(chunks))


# Groups and chunks of unequal size; the anchors of one group lie in two chunks.
PLAN = plan_of(((20, 11), (9, 30, 4), (17,), (25, 14), (7, 12)), anchors=12, held_out=2)


@dataclass(frozen=True)
class MadeLayers:
    """Layers and what they were measured on.

    Attributes:
        maps: feature maps [N, C_l, H_l, W_l] of each layer.
        labels: [N].
        classes: number of classes.
        plan: how the images are cut.
    """

    maps: tuple[Matrix, ...]
    labels: Labels
    classes: int = 3
    plan: ReadingPlan = PLAN

    @property
    def pooled(self) -> list[Matrix]:
        """Spatial means [N, C_l]."""
        return [maps.mean(axis=(2, 3)) for maps in self.maps]

    def having(self, maps: Sequence[Matrix]) -> "MadeLayers":
        """The same images with other layers."""
        return replace(self, maps=tuple(maps))

    def measured(self) -> LayerMeasurement:
        """What a pass over the layers leaves; the chunks arrive in order."""
        return measurement_of(self, range(len(self.plan.chunks)))


def related_layers(
    widths: Sequence[int], seed: int, kind: str = "plain", plan: ReadingPlan = PLAN, classes: int = 3
) -> MadeLayers:
    """Layers that share some signal, classes among it, as a network's layers do.

    Args:
        widths: channels of each layer.
        seed: of everything random.
        kind: `plain`; `rectified`: many activations are 0; `offset`: means 1000 times the spread.
        plan: how the images are cut.
        classes: number of classes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permuted(np.arange(plan.images) % classes)
    signal = rng.standard_normal((plan.images, 4)) + rng.standard_normal((classes, 4))[labels]
    maps = []
    for width in widths:
        shared = signal @ rng.standard_normal((4, width)) + rng.uniform(-1, 1, width)
        noise = rng.uniform(0.5, 2) * rng.standard_normal((plan.images, width, 2, 2))
        made = shared[:, :, None, None] + noise
        if kind == "rectified":
            made = np.maximum(made, 0)
        if kind == "offset":
            made = made + 1000 * made.std() * rng.uniform(0.5, 1, width)[:, None, None]
        maps.append(made)
    return MadeLayers(tuple(maps), labels, classes, plan)


def measurement_of(layers: MadeLayers, arrival: Sequence[int]) -> LayerMeasurement:
    """What a pass leaves if the plan's chunks arrive in this order."""
    plan, pooled = layers.plan, layers.pooled
    first = plan.chunks[0]
    bandwidths = tuple(median_distance(torch.from_numpy(layer[first.start : first.stop])) for layer in pooled)
    builder = MeasurementBuilder(plan, layers.labels)
    for position in arrival:
        builder.add(position, _reading(layers, pooled, plan.chunks[position], bandwidths))
    return builder.measurement(made_candidates(layers))


def made_candidates(layers: MadeLayers) -> tuple[Candidate, ...]:
    """Candidates as the layers' feature maps have it; the n-th costs 100·n multiply-adds."""
    return tuple(
        Candidate(f"layer{number}", number, maps.shape[1], maps.shape[2], maps.shape[3], 100 * number)
        for number, maps in enumerate(layers.maps, start=1)
    )


def rows_of(layers: Sequence[Matrix], labels: Labels, classes: int) -> Matrix:
    """Rows in the column order of `LayerSums`: features of each layer, their squared norms, one-hot labels."""
    norms = [np.square(layer).sum(axis=1, keepdims=True) for layer in layers]
    return np.concatenate([*layers, *norms, np.eye(classes)[labels]], axis=1)


def parts(rows: Matrix, sizes: Sequence[int]) -> list[Matrix]:
    """The rows cut into parts of these sizes."""
    return [rows[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]


def _reading(layers: MadeLayers, pooled: Sequence[Matrix], chunk: Chunk, bandwidths: tuple[float, ...]) -> ChunkReading:
    images = slice(chunk.start, chunk.stop)
    features = [layer[images] for layer in pooled]
    rows = rows_of(features, layers.labels[images], layers.classes)
    channels = tuple(layer.shape[1] for layer in features)
    alignment = None
    if chunk.stop - chunk.start >= 4:
        grams = [gaussian_gram(torch.from_numpy(x), width) for x, width in zip(features, bandwidths, strict=True)]
        alignment = stacked_hsic(torch.stack(grams)).numpy()
    statistics = LayerStatistics(
        sums_of_rows(rows, channels, layers.classes),
        np.array([np.linalg.norm(layer, axis=1).sum() for layer in features]),
        np.concatenate([(layer != 0).any(axis=0) for layer in features]),
        np.array([np.count_nonzero(maps[images] == 0) for maps in layers.maps], dtype=float),
        alignment,
        int(alignment is not None),
    )
    joined = np.concatenate(features, axis=1)
    tested = layers.plan.is_held_out(chunk.group)
    return ChunkReading(statistics, joined[: chunk.anchors], joined[: len(joined) if tested else 0], bandwidths)
