"""What one pass over the images leaves behind, and the part of it that a layer metric reads."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..models.candidates import Candidate
from .layer_reading import ChunkReading
from .layer_statistics import LayerStatistics, LayerSums, Matrix, OrderedMerge, resampled
from .reading_plan import ReadingPlan

Labels = NDArray[np.int64]

# Covariance eigenvalues below this share of the largest count as zero; a tighter rule is not reproducible from sums.
RANK_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Spectrum:
    """The principal axes of a layer's features, as far as they have spread.

    Attributes:
        eigenvalues: [rank] of the centred second moment, largest first.
        axes: [C, rank] orthonormal.
    """

    eigenvalues: Matrix
    axes: Matrix

    @property
    def whitening(self) -> Matrix:
        """W [C, rank] with orthonormal columns X·W for the centred features X."""
        return np.asarray(self.axes / np.sqrt(self.eigenvalues))


@dataclass(frozen=True)
class LayerMeasurement:
    """Everything that one pass over the images leaves, kept in groups of images.

    Attributes:
        candidates: L, in depth order.
        groups: statistics of each of the G image groups.
        held_out_groups: how many of the last groups the linear probe is tested on.
        anchors: for each group [A_g, Σwidths]; no rows if they were not gathered.
        held_out: for each held-out group [M_g, Σwidths]; no rows if they were not gathered.
        held_out_labels: for each held-out group [M_g].
    """

    candidates: tuple[Candidate, ...]
    groups: tuple[LayerStatistics, ...]
    held_out_groups: int
    anchors: tuple[Matrix, ...]
    held_out: tuple[Matrix, ...]
    held_out_labels: tuple[Labels, ...]

    def evidence(self) -> "LayerEvidence":
        """All images once."""
        return LayerEvidence(self, (1,) * len(self.groups))

    def bootstrap(self, rng: np.random.Generator) -> "LayerEvidence":
        """As many groups, drawn with replacement; held-out groups are drawn among themselves."""
        tested = self.held_out_groups
        fitted = len(self.groups) - tested
        drawn = [rng.integers(fitted, size=fitted), fitted + rng.integers(max(tested, 1), size=tested)]
        times = np.bincount(np.concatenate(drawn), minlength=len(self.groups))
        return LayerEvidence(self, tuple(int(count) for count in times))


@dataclass(frozen=True)
class LayerEvidence:
    """What layer metrics read: a measurement, each group of images taken so many times.

    Attributes:
        measurement: of all groups.
        times: for every group how often it is in.
    """

    measurement: LayerMeasurement
    times: tuple[int, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """L, in depth order."""
        return self.measurement.candidates

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Of all images."""
        return resampled(self.measurement.groups, self.times)

    @property
    def sums(self) -> LayerSums:
        """Of all images."""
        return self.statistics.sums

    @cached_property
    def fit(self) -> LayerSums:
        """Of the images that the linear probe is fitted on."""
        fitted = len(self.times) - self.measurement.held_out_groups
        return resampled(self.measurement.groups[:fitted], self.times[:fitted]).sums

    @cached_property
    def anchors(self) -> Matrix:
        """[A, Σwidths] features of the anchor images; a group that is in twice gives them once."""
        rows = [rows for rows, count in zip(self.measurement.anchors, self.times, strict=True) if count]
        return np.concatenate(rows)

    @cached_property
    def held_out(self) -> tuple[Matrix, Labels]:
        """Features [M, Σwidths] and labels [M] of the images that the linear probe is tested on."""
        measured = self.measurement
        fitted = len(self.times) - measured.held_out_groups
        drawn = [place for place, count in enumerate(self.times[fitted:]) for _ in range(count)]
        if not drawn:
            return np.zeros((0, sum(self.sums.channels))), np.zeros(0, dtype=np.int64)
        features = np.concatenate([measured.held_out[place] for place in drawn])
        return features, np.concatenate([measured.held_out_labels[place] for place in drawn])

    @cached_property
    def spectra(self) -> tuple[Spectrum, ...]:
        """Of each candidate; no axes for one without spread."""
        return tuple(_spectrum(self.sums.cross(layer, layer)) for layer in range(len(self.candidates)))


class MeasurementBuilder:
    """Puts the readings of a plan's chunks together; they may come in any order.

    Args:
        plan: how the images were cut.
        labels: of all images [N].
    """

    def __init__(self, plan: ReadingPlan, labels: Labels) -> None:
        self._plan, self._labels = plan, labels
        self._merges = [OrderedMerge() for _ in range(plan.groups)]
        # Position of each chunk in its group.
        places = [0] * plan.groups
        self._places: list[int] = []
        for chunk in plan.chunks:
            self._places.append(places[chunk.group])
            places[chunk.group] += 1
        self._anchors: dict[int, Matrix] = {}
        self._held_out: dict[int, Matrix] = {}

    def add(self, position: int, reading: ChunkReading) -> None:
        """Takes the reading of the plan's chunk at that 0-based position."""
        self._merges[self._plan.chunks[position].group].add(self._places[position], reading.statistics)
        self._anchors[position], self._held_out[position] = reading.anchors, reading.held_out

    def measurement(self, candidates: tuple[Candidate, ...]) -> LayerMeasurement:
        """What all readings give together; raises ValueError if one is missing."""
        plan = self._plan
        for position in range(len(plan.chunks)):
            if position not in self._anchors:
                raise ValueError(f"the reading of chunk number {position} is missing")
        tested = [group for group in range(plan.groups) if plan.is_held_out(group)]
        return LayerMeasurement(
            candidates,
            tuple(merge.total() for merge in self._merges),
            plan.held_out,
            tuple(self._rows(self._anchors, group) for group in range(plan.groups)),
            tuple(self._rows(self._held_out, group) for group in tested),
            tuple(self._group_labels(group) for group in tested),
        )

    def _rows(self, kept: dict[int, Matrix], group: int) -> Matrix:
        """The kept rows of a group's chunks in their order."""
        return np.concatenate([kept[p] for p, chunk in enumerate(self._plan.chunks) if chunk.group == group])

    def _group_labels(self, group: int) -> Labels:
        chunks = [chunk for chunk in self._plan.chunks if chunk.group == group]
        return self._labels[chunks[0].start : chunks[-1].stop]


def _spectrum(moment: Matrix) -> Spectrum:
    eigenvalues, axes = np.linalg.eigh(moment)
    kept = eigenvalues > max(RANK_TOLERANCE * eigenvalues[-1], 0.0)
    return Spectrum(eigenvalues[kept][::-1], axes[:, kept][:, ::-1])
