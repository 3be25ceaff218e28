"""Mergeable sums over images that hold every pairwise and per-layer statistic of pooled features.

One forward pass of an image serves all candidates and all metrics. For each image the pooled features of all candidates
are concatenated with one column of squared norms a candidate and the one-hot label; count, mean and centred second
moment of these rows add up across chunks, actors and machines (Chan, Golub & LeVeque 1983), in float64 and without the
cancellation of raw sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.taps import LayerTaps

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSums:
    """Sums over `count` images.

    Attributes:
        count: number of images N.
        mean: [D] mean row.
        moment: [D, D] Σ (x − mean)(x − mean)ᵀ.
        channels: pooled features of each candidate, in the order of the columns.
        classes: number of one-hot columns at the end.

    The D columns are the candidates' channels one after the other, then ‖x_l‖² of each candidate, then the classes.
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
    def labels(self) -> slice:
        """Columns of the one-hot labels."""
        start = sum(self.channels) + len(self.channels)
        return slice(start, start + self.classes)

    def cross(self, first: int, second: int) -> Matrix:
        """XᵀY of the centred features of two candidates, [C_first, C_second]."""
        return self.moment[self.layer(first), self.layer(second)]


def sums_of_rows(rows: Matrix, channels: tuple[int, ...], classes: int) -> LayerSums:
    """Sums of one chunk.

    Args:
        rows: [N, D] in the column order of `LayerSums`.
        channels: pooled features of each candidate.
        classes: number of one-hot columns.
    """
    # From the first row, a constant column's spread is exactly 0: its mean alone would be off by rounding.
    steps = rows - rows[0]
    step = steps.mean(axis=0)
    centred = steps - step
    return LayerSums(len(rows), rows[0] + step, centred.T @ centred, channels, classes)


def merge(first: LayerSums, second: LayerSums) -> LayerSums:
    """Sums of two sets of images together.

    Raises:
        ValueError: the sums are of different layers or classes.
    """
    if first.channels != second.channels or first.classes != second.classes:
        raise ValueError("sums of different layers cannot be merged")
    count = first.count + second.count
    step = second.mean - first.mean
    mean = first.mean + step * (second.count / count)
    moment = first.moment + second.moment + np.outer(step, step) * (first.count * second.count / count)
    return LayerSums(count, mean, moment, first.channels, first.classes)


def merge_all(chunks: Sequence[LayerSums]) -> LayerSums:
    """Merges chunks pairwise in their order: the same tree, hence the same bits, whoever computed which chunk."""
    if not chunks:
        raise ValueError("there are no sums to merge")
    level = list(chunks)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


class LayerReader:
    """Reads the pooled features of a network's candidates, one forward pass a batch.

    Args:
        model: the teacher; set to eval mode.
        paths: module paths of the candidates.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._model = model.eval()
        self._taps = LayerTaps(model, paths)

    @torch.no_grad()
    def sums(self, batches: Iterator[tuple[Tensor, Tensor]], classes: int) -> LayerSums:
        """Sums over batches of (normalised images [B, C, H, W], labels [B])."""
        rows: list[Matrix] = []
        channels: tuple[int, ...] = ()
        for images, labels in batches:
            self._model(images)
            features = [feature.mean(dim=(2, 3)).double() for feature in self._taps.take()]
            channels = tuple(feature.shape[1] for feature in features)
            norms = [feature.square().sum(dim=1, keepdim=True) for feature in features]
            one_hot = torch.nn.functional.one_hot(labels, classes).double()
            rows.append(torch.cat([*features, *norms, one_hot], dim=1).cpu().numpy())
        return sums_of_rows(np.concatenate(rows), channels, classes)
