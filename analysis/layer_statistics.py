"""Mergeable sums over images that hold every pairwise and per-layer statistic of pooled features.

For each image the pooled features of all candidates are concatenated with one column of squared norms a candidate and
the one-hot label; count, mean and centred second moment of these rows add up across chunks, actors and machines (Chan,
Golub & LeVeque 1983), in float64 and without the cancellation of raw sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class LayerSums:
    """Sums over `count` images.

    Attributes:
        count: number of images N.
        mean: [D] mean row.
        moment: [D, D] Σ (x − mean)(x − mean)ᵀ.
        channels: feature columns of each candidate, in the order of the columns: its pooled channels, or fewer where
            they were projected.
        classes: number of one-hot columns at the end.

    The D columns are the candidates' features one after the other, then ‖x_l‖² of each candidate, then the classes.
    """

    count: int
    mean: Matrix
    moment: Matrix
    channels: tuple[int, ...]
    classes: int

    def layer(self, index: int) -> slice:
        """Columns of the candidate at the 0-based `index`."""
        start = sum(self.channels[:index])
        return slice(start, start + self.channels[index])

    @property
    def norms(self) -> slice:
        """Columns of the squared norms, one a candidate."""
        start = sum(self.channels)
        return slice(start, start + len(self.channels))

    @property
    def labels(self) -> slice:
        """Columns of the one-hot labels."""
        start = sum(self.channels) + len(self.channels)
        return slice(start, start + self.classes)

    def cross(self, first: int, second: int) -> Matrix:
        """XᵀY of the centred features of two candidates, [C_first, C_second]."""
        return self.moment[self.layer(first), self.layer(second)]


@dataclass(frozen=True)
class LayerStatistics:
    """Everything about a set of images that adds up.

    Attributes:
        sums: of the rows.
        norms: [L] Σ over the images of ‖x_l‖, the pooled features before any projection.
        fired: [ΣC] whether a pooled channel, before any projection, was ever other than 0.
        zeros: [L] how many activations were 0 before pooling; None if they were not counted.
        alignment: [L, L] Σ over the minibatches of the unbiased HSIC of Gaussian Grams; None if there are no Grams.
        minibatches: how many minibatches `alignment` sums up.
    """

    sums: LayerSums
    norms: Matrix
    fired: Flags
    zeros: Matrix | None = None
    alignment: Matrix | None = None
    minibatches: int = 0


def sums_of_rows(rows: Matrix | Tensor, channels: tuple[int, ...], classes: int) -> LayerSums:
    """Sums of one chunk.

    Args:
        rows: float64 [N, D] in the column order of `LayerSums`; a tensor is summed on its own device.
        channels: feature columns of each candidate.
        classes: number of one-hot columns.
    """
    # NumPy knows that AᵀA is symmetric and takes half the multiplications; on a GPU the rows stay where they are.
    if isinstance(rows, Tensor) and rows.device.type == "cpu":
        rows = rows.numpy()
    # From the first row, a constant column's spread is exactly 0: its mean alone would be off by rounding.
    first = rows[0]
    steps = rows - first
    step = steps.mean(0)
    centred = steps - step
    mean, moment = first + step, centred.T @ centred
    return LayerSums(len(rows), _array(mean), _array(moment), channels, classes)


def merge(first: LayerSums, second: LayerSums) -> LayerSums:
    """Sums of two sets of images together.

    Raises:
        ValueError: the sums are of different layers or classes.
    """
    _check_alike(first, second)
    count = first.count + second.count
    step = second.mean - first.mean
    mean = first.mean + step * (second.count / count)
    moment = np.outer(step, step)
    moment *= first.count * second.count / count
    moment += first.moment
    moment += second.moment
    return LayerSums(count, mean, moment, first.channels, first.classes)


def merge_statistics(first: LayerStatistics, second: LayerStatistics) -> LayerStatistics:
    """Statistics of two sets of images together; raises ValueError like `merge`."""
    return LayerStatistics(
        merge(first.sums, second.sums),
        first.norms + second.norms,
        first.fired | second.fired,
        _added(first.zeros, second.zeros),
        _added(first.alignment, second.alignment),
        first.minibatches + second.minibatches,
    )


def resampled(groups: Sequence[LayerStatistics], times: Sequence[int]) -> LayerStatistics:
    """Statistics of groups of images, each taken so many times; all ones give the whole.

    Args:
        groups: of disjoint images.
        times: for every group how often it is in, 0 or more, at least one of them above 0.
    """
    drawn = [(group, share) for group, share in zip(groups, times, strict=True) if share]
    first = drawn[0][0].sums
    for group, _ in drawn:
        _check_alike(first, group.sums)
    counts = np.array([share * group.sums.count for group, share in drawn], dtype=float)
    means = np.stack([group.sums.mean for group, _ in drawn])
    # From one of the means: a column that is the same everywhere keeps a spread of exactly 0.
    steps = means - means[0]
    step = counts @ steps / counts.sum()
    between = (steps - step) * np.sqrt(counts)[:, None]
    moment = between.T @ between
    for group, share in drawn:
        moment += group.sums.moment if share == 1 else share * group.sums.moment
    sums = LayerSums(int(counts.sum()), means[0] + step, moment, first.channels, first.classes)
    return LayerStatistics(
        sums,
        np.sum([share * group.norms for group, share in drawn], axis=0),
        np.any([group.fired for group, _ in drawn], axis=0),
        _weighted([(group.zeros, share) for group, share in drawn]),
        _weighted([(group.alignment, share) for group, share in drawn]),
        sum(share * group.minibatches for group, share in drawn),
    )


class OrderedMerge:
    """Merges statistics that arrive in any order as if they had come in their own: always the same bits.

    Neighbours are merged as a binary counter adds, so that few matrices are held and rounding grows with the logarithm
    of their number only.
    """

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, LayerStatistics] = {}
        # Merged runs of 2^level neighbours, the longest first.
        self._runs: list[tuple[int, LayerStatistics]] = []

    def add(self, position: int, statistics: LayerStatistics) -> None:
        """Takes the statistics with the 0-based `position` in the order."""
        self._early[position] = statistics
        while self._next in self._early:
            self._append(self._early.pop(self._next))
            self._next += 1

    def total(self) -> LayerStatistics:
        """The merged statistics.

        Raises:
            ValueError: there are none, or some are missing.
        """
        if not self._runs or self._early:
            raise ValueError(f"statistics number {self._next} is missing, so that the rest cannot be merged")
        *longer, (_, result) = self._runs
        for _, run in reversed(longer):
            result = merge_statistics(run, result)
        return result

    def _append(self, statistics: LayerStatistics) -> None:
        level = 0
        while self._runs and self._runs[-1][0] == level:
            _, before = self._runs.pop()
            statistics = merge_statistics(before, statistics)
            level += 1
        self._runs.append((level, statistics))


def _array(values: Matrix | Tensor) -> Matrix:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _check_alike(first: LayerSums, second: LayerSums) -> None:
    if first.channels != second.channels or first.classes != second.classes:
        raise ValueError("sums of different layers cannot be merged")


def _added(first: Matrix | None, second: Matrix | None) -> Matrix | None:
    return None if first is None or second is None else first + second


def _weighted(parts: Sequence[tuple[Matrix | None, int]]) -> Matrix | None:
    present = [share * values for values, share in parts if values is not None]
    return np.sum(present, axis=0) if len(present) == len(parts) else None
