"""Hint losses of all hint pairs together.

To add one, write a small class here with its registration and source on top; nothing else changes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .adapters import connector
from .feature_losses import hierarchical_error
from .hint_loss import HINT_LOSSES, FeatureShape, JointHintLoss, same_size

# Of the features that are handed from deep to shallow layers, as published.
_MOST_CHANNELS = 512


@HINT_LOSSES.register(
    "fsp",
    source="Yim et al. 2017, CVPR, pp. 7130-7138",
    kind="hints jointly",
    needs="1×1 convolutions where the channels differ; of a single pair, the layer's flow to itself",
)
class FlowOfSolutionProcedure(JointHintLoss):
    """Squared difference of the flows between consecutive layers, mean over a flow's entries, summed over the flows.

    A flow is the mean over the pixels of the products of each two channels, the larger map pooled to the smaller one.
    RepDistiller, whose form this is, trains the student by it before, not beside, the other losses.
    """

    def __init__(self, students: Sequence[FeatureShape], teachers: Sequence[FeatureShape]) -> None:
        super().__init__(students, teachers)
        self.regressors = nn.ModuleList(
            nn.Identity() if ours.channels == theirs.channels else nn.Conv2d(ours.channels, theirs.channels, 1)
            for ours, theirs in zip(students, teachers, strict=True)
        )

    def adapt(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T], one a pair → [B, C_T, H_S, W_S], [B, C_T, H_T, W_T]."""
        return [regress(feature) for regress, feature in zip(self.regressors, students, strict=True)], teachers

    def compare(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """[B, C_T, H, W], one a pair → [B]."""
        return torch.stack(
            [
                (ours - theirs).square().mean(dim=(1, 2))
                for ours, theirs in zip(_flows(students), _flows(teachers), strict=True)
            ]
        ).sum(dim=0)


@HINT_LOSSES.register(
    "reviewkd",
    source="Chen et al. 2021, arXiv 2104.09044",
    kind="hints jointly",
    needs="attention-based fusion: convolutions and batch norms; the teacher's features before the activation",
)
class ReviewKD(JointHintLoss):
    """`hcl` of each pair, summed, with what the student's layer and all deeper ones make together."""

    pre_activation = ("teacher",)

    def __init__(self, students: Sequence[FeatureShape], teachers: Sequence[FeatureShape]) -> None:
        super().__init__(students, teachers)
        channels = min(_MOST_CHANNELS, students[-1].channels)
        deepest = len(students) - 1
        self.fusions = nn.ModuleList(
            _Fusion(ours.channels, channels, theirs.channels, fuses=depth < deepest)
            for depth, (ours, theirs) in enumerate(zip(students, teachers, strict=True))
        )

    def adapt(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T], one a pair → [B, C_T, H_T, W_T] each."""
        reviewed: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, ours, theirs in zip(
            reversed(list(self.fusions)), reversed(students), reversed(teachers), strict=True
        ):
            output, deeper = fusion(ours, deeper, (theirs.shape[2], theirs.shape[3]))
            reviewed.insert(0, output)
        return reviewed, teachers

    def compare(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """[B, C_T, H_T, W_T] each, one a pair → [B]."""
        return torch.stack([hierarchical_error(*pair) for pair in zip(students, teachers, strict=True)]).sum(dim=0)


class _Fusion(nn.Module):
    """Attention-based fusion of a layer's features with what comes from the deeper ones."""

    def __init__(self, channels: int, inner: int, wanted: int, fuses: bool) -> None:
        super().__init__()
        self.enter = connector(channels, inner)
        self.leave = connector(inner, wanted)
        self.leave[0] = nn.Conv2d(inner, wanted, 3, padding=1, bias=False)
        self.attention = nn.Sequential(nn.Conv2d(2 * inner, 2, 1), nn.Sigmoid()) if fuses else None
        for convolution in (self.enter[0], self.leave[0]):
            nn.init.kaiming_uniform_(convolution.get_parameter("weight"), a=1)

    def forward(self, features: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """[B, C, H, W], what the deeper fusion handed on, (H', W') → [B, wanted, H', W'], and what is handed on."""
        fused: Tensor = self.enter(features)
        if self.attention is not None:
            assert deeper is not None
            deeper = functional.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = self.attention(torch.cat([fused, deeper], dim=1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != size:
            fused = functional.interpolate(fused, size, mode="nearest")
        return self.leave(fused), fused


def _flows(features: list[Tensor]) -> list[Tensor]:
    """Between consecutive maps [B, C, H, W] and [B, D, H', W'] → [B, C, D]; of a single one, to itself."""
    following = features[1:] or features
    return [_flow(*same_size(one, other)) for one, other in zip(features, following, strict=False)]


def _flow(one: Tensor, other: Tensor) -> Tensor:
    return torch.bmm(one.flatten(2), other.flatten(2).transpose(1, 2)) / one[0, 0].numel()
