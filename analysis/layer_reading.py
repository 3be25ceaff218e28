"""One forward pass of a chunk of images, read at every candidate: the source of all layer metrics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..models.taps import LayerTaps
from .kernel_alignment import gaussian_gram, median_distance, stacked_hsic
from .layer_statistics import LayerStatistics, Matrix, sums_of_rows
from .reading_plan import Columns


@dataclass(frozen=True)
class Wanted:
    """What the metrics need beyond the sums of pooled features.

    Attributes:
        zeros: the number of zeros before pooling, which reads every activation once more.
        grams: Gaussian Grams of each chunk.
        anchors: the features of the anchor images.
        held_out: the features of the held-out images.
    """

    zeros: bool = False
    grams: bool = False
    anchors: bool = False
    held_out: bool = False


@dataclass(frozen=True)
class ChunkReading:
    """What one chunk of n images gives.

    Attributes:
        statistics: what adds up.
        anchors: [a, Σwidths] pooled features of the chunk's anchors, projected where the columns say so; a is 0 if they
            are not wanted.
        held_out: [n, Σwidths] of all images of a held-out chunk; no rows of others, or if they are not wanted.
        bandwidths: of each candidate's Gaussian Gram; empty without Grams.
    """

    statistics: LayerStatistics
    anchors: Matrix
    held_out: Matrix
    bandwidths: tuple[float, ...]


class LayerReader:
    """Reads the candidates of a network, one forward pass a batch, and keeps no feature map.

    Args:
        model: the teacher; set to eval mode.
        paths: module paths of the candidates.
        columns: of the sums.
        wanted: what to gather beside the sums.
        device: where the images are.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], columns: Columns, wanted: Wanted, device: torch.device
    ) -> None:
        self._model = model.eval()
        self._columns, self._wanted = columns, wanted
        self._taps = LayerTaps(model, paths, read=self._read_map)
        projections = [columns.projection(layer) for layer in range(len(paths))]
        # MPS has no float64: there the sums are made on the CPU.
        self._sums_on = torch.device("cpu") if device.type == "mps" else device
        self._projections = [None if p is None else torch.from_numpy(p).to(self._sums_on) for p in projections]

    @torch.no_grad()
    def read(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        anchors: int = 0,
        held_out: bool = False,
        bandwidths: tuple[float, ...] | None = None,
    ) -> ChunkReading:
        """Reads one chunk.

        Args:
            batches: (normalised images [B, C, H, W], labels [B]), at least one.
            anchors: how many of the first images are anchors.
            held_out: whether the linear probe is tested on the images.
            bandwidths: of the Gaussian Grams; None: the median distances of this chunk's own features.
        """
        read: list[list[tuple[Tensor, Tensor | None]]] = []
        labels: list[Tensor] = []
        for images, batch_labels in batches:
            self._model(images)
            read.append(self._taps.take())
            labels.append(batch_labels)
        layers = range(len(self._columns.channels))
        pooled = [self._joined([batch[layer][0] for batch in read]) for layer in layers]
        zeros = [self._zeros(batch[layer][1] for batch in read) for layer in layers] if self._wanted.zeros else None
        statistics, rows, bandwidths = self._statistics(pooled, torch.cat(labels).to(self._sums_on), zeros, bandwidths)
        features = rows[:, : sum(self._columns.widths)]
        return ChunkReading(
            statistics,
            features[: anchors if self._wanted.anchors else 0].cpu().numpy(),
            features[: len(rows) if held_out and self._wanted.held_out else 0].cpu().numpy(),
            bandwidths,
        )

    def close(self) -> None:
        """Takes the taps off the network."""
        self._taps.close()

    def _read_map(self, _path: str, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled features [B, C] and, if wanted, the number of zeros in all channels."""
        feature = feature.float()
        return feature.mean(dim=(2, 3)), _count_zeros(feature) if self._wanted.zeros else None

    def _zeros(self, batches: Iterable[Tensor | None]) -> Tensor:
        return self._joined([zeros[None] for zeros in batches if zeros is not None]).sum()

    def _joined(self, batches: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(batches)).to(self._sums_on).double()

    def _statistics(
        self,
        pooled: list[Tensor],
        labels: Tensor,
        zeros: list[Tensor] | None,
        bandwidths: tuple[float, ...] | None,
    ) -> tuple[LayerStatistics, Tensor, tuple[float, ...]]:
        """What adds up, the rows [n, D] behind it, and the bandwidths used."""
        columns = self._columns
        norms = torch.stack([torch.linalg.vector_norm(layer, dim=1).sum() for layer in pooled])
        fired = torch.cat([(layer != 0).any(dim=0) for layer in pooled])
        features = [
            layer if projection is None else layer @ projection
            for layer, projection in zip(pooled, self._projections, strict=True)
        ]
        squares = [layer.square().sum(dim=1, keepdim=True) for layer in features]
        one_hot = nn.functional.one_hot(labels, columns.classes).double()
        rows = torch.cat([*features, *squares, one_hot], dim=1)
        alignment = None
        if self._wanted.grams:
            bandwidths = bandwidths or tuple(median_distance(layer) for layer in features)
            grams = torch.stack([gaussian_gram(x, width) for x, width in zip(features, bandwidths, strict=True)])
            alignment = stacked_hsic(grams).cpu().numpy()
        statistics = LayerStatistics(
            sums_of_rows(rows, columns.widths, columns.classes),
            norms.cpu().numpy(),
            fired.cpu().numpy(),
            None if zeros is None else torch.stack(zeros).cpu().numpy(),
            alignment,
            int(self._wanted.grams),
        )
        return statistics, rows, bandwidths or ()


def _count_zeros(feature: Tensor) -> Tensor:
    """How many values are 0, on the feature's device."""
    if feature.device.type == "cpu":
        # NumPy's comparison is three times faster than anything of torch's on a CPU.
        return torch.tensor(feature.numel() - np.count_nonzero(feature.numpy() != 0))
    return feature.numel() - torch.count_nonzero(feature)
