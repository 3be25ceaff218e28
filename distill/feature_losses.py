"""Hint losses that compare the feature maps of each image.

To add one, write a small class here with its registration and source on top; nothing else changes.
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..models.errors import InputError
from ..models.filter_norms import strongest_channels
from ..models.taps import INPUT
from .hint_loss import HINT_LOSSES, FeatureShape, HintLoss, TeacherLayer, same_size

# The hint loss of InDistill's warm-up.
STRONGEST_CHANNELS = "strongest_channels"


class _Regressed(HintLoss):
    """A loss after a trained 1×1 convolution from the student's to the teacher's channels."""

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.regressor: nn.Module = nn.Conv2d(student.channels, teacher.channels, 1)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, C_T, H, W] each."""
        student, teacher = same_size(student, teacher)
        return self.regressor(student), teacher


class _RegressedIfNeeded(_Regressed):
    """A loss on the features as they are; after a 1×1 convolution where the student has other channels."""

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        if student.channels == teacher.channels:
            self.regressor = nn.Identity()


@HINT_LOSSES.register("fitnet", source="Romero et al. 2015, arXiv 1412.6550", kind="hint", needs="1×1 convolution")
class FitNet(_Regressed):
    """Mean squared error after a trained 1×1 convolution from the student's to the teacher's channels."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        return _squared_error(student, teacher)


@HINT_LOSSES.register("fitnet_3x3", source="Romero et al. 2015, arXiv 1412.6550", kind="hint", needs="3×3 convolution")
class WideFitNet(FitNet):
    """`fitnet` with a 3×3 convolution, which sees the neighbours of a pixel, too; the map keeps its size."""

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.regressor = nn.Conv2d(student.channels, teacher.channels, 3, padding=1)


@HINT_LOSSES.register(
    STRONGEST_CHANNELS,
    source="Sarridis et al. 2022, arXiv 2205.10003 (the warm-up of InDistill)",
    kind="hint",
    needs="a convolution or linear layer that makes all channels of the teacher's layer",
)
class StrongestChannels(HintLoss):
    """Mean squared error with those channels of the teacher whose filters have the largest L1 norm, without adapters.

    As many as the student has, in their order. Of a student with more channels than the teacher, which the paper does
    not have, the first ones learn.
    """

    channels: Tensor

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.register_buffer("channels", torch.arange(min(student.channels, teacher.channels)))
        self._all = student.channels >= teacher.channels

    def read_teacher(self, layer: TeacherLayer) -> None:
        """Chooses the channels; of a teacher with no more than the student there is nothing to choose.

        Raises:
            InputError: no convolution or linear layer makes all channels of the layer.
        """
        if not self._all:
            if layer.path.endswith(INPUT):
                raise InputError(
                    f"strongest_channels scores the filters behind what a layer gives, but {layer.path!r} is what one "
                    "is given; choose another loss for it"
                )
            chosen = strongest_channels(layer.network, layer.path, layer.image_shape, len(self.channels))
            self.channels.copy_(chosen)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, min(C_S, C_T), H, W] each."""
        return same_size(student[:, : len(self.channels)], teacher[:, self.channels])

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C, H, W] each → [B]."""
        return _squared_error(student, teacher)


@HINT_LOSSES.register(
    "mse", source="the common baseline", kind="hint", needs="1×1 convolution where the channels differ"
)
class MeanSquaredError(_RegressedIfNeeded):
    """Mean squared error of the features as they are; after a 1×1 convolution where the channels differ."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        return _squared_error(student, teacher)


@HINT_LOSSES.register(
    "cosine", source="the common baseline", kind="hint", needs="1×1 convolution where the channels differ"
)
class Cosine(_RegressedIfNeeded):
    """1 − the cosine between the channels of a pixel, mean over the pixels."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        ours, theirs = functional.normalize(student, dim=1), functional.normalize(teacher, dim=1)
        return 1 - (ours * theirs).sum(dim=1).mean(dim=(1, 2))


@HINT_LOSSES.register("at", source="Zagoruyko & Komodakis 2017, arXiv 1612.03928", kind="hint", needs="feature maps")
class AttentionTransfer(HintLoss):
    """Mean squared difference of the L2-normalised maps of squared activations."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B]."""
        return _attention_difference(student, teacher).square().mean(dim=1)


@HINT_LOSSES.register("ft", source="Kim et al. 2018, arXiv 1802.04977", kind="hint", needs="feature maps")
class FactorTransfer(HintLoss):
    """Mean absolute difference of the L2-normalised maps of squared activations.

    The form of RepDistiller, whose published figures are of it: without the paper's paraphraser and translator.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B]."""
        return _attention_difference(student, teacher).abs().mean(dim=1)


@HINT_LOSSES.register("nst", source="Huang & Wang 2017, arXiv 1707.01219", kind="hint", needs="feature maps")
class NeuronSelectivityTransfer(HintLoss):
    """Maximum mean discrepancy of the channels' L2-normalised maps, with the kernel (a·b)²."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B]."""
        ours, theirs = (functional.normalize(f.flatten(2), dim=2) for f in same_size(student, teacher))
        return _kernel(theirs, theirs) + _kernel(ours, ours) - 2 * _kernel(ours, theirs)


@HINT_LOSSES.register(
    "hcl",
    source="Chen et al. 2021, arXiv 2104.09044 (its hierarchical context loss)",
    kind="hint",
    needs="1×1 convolution where the channels differ",
)
class HierarchicalContextLoss(_RegressedIfNeeded):
    """Mean squared errors of the maps and of their averages on 4×4, 2×2 and 1×1 pixels, each counting half as much."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        return hierarchical_error(student, teacher)


@HINT_LOSSES.register(
    "vid", source="Ahn et al. 2019, arXiv 1904.05835", kind="hint", needs="three 1×1 convolutions, channel variances"
)
class VariationalInformationDistillation(HintLoss):
    """Mean negative log-likelihood of the teacher's features, less its constant, given the student's.

    A Gaussian whose mean is regressed from the student by three 1×1 convolutions and whose variance is trained, one for
    each channel. It may become negative.
    """

    START_VARIANCE, SMALLEST_VARIANCE = 5.0, 1e-5

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.regressor = nn.Sequential(
            nn.Conv2d(student.channels, teacher.channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher.channels, teacher.channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher.channels, teacher.channels, 1, bias=False),
        )
        raw = math.log(math.exp(self.START_VARIANCE - self.SMALLEST_VARIANCE) - 1)
        self.raw_variance = nn.Parameter(torch.full((teacher.channels,), raw))

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, C_T, H, W] each."""
        student, teacher = same_size(student, teacher)
        return self.regressor(student), teacher

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        variance = (functional.softplus(self.raw_variance) + self.SMALLEST_VARIANCE)[:, None, None]
        return ((student - teacher).square() / variance + variance.log()).mean(dim=(1, 2, 3)) / 2


def hierarchical_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared errors of the maps and of their averages on 4×4, 2×2 and 1×1 pixels; [B, C, H, W] each → [B]."""
    error, weight, total = _squared_error(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        # As published: by the height.
        if side >= student.shape[2]:
            continue
        weight /= 2
        total += weight
        pooled = [functional.adaptive_avg_pool2d(feature, side) for feature in (student, teacher)]
        error = error + weight * _squared_error(*pooled)
    return error / total


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all but the images, [B, C, H, W] each → [B]."""
    return functional.mse_loss(student, teacher, reduction="none").mean(dim=(1, 2, 3))


def _attention_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Between the L2-normalised maps of squared activations, [B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, pixels]."""
    ours, theirs = (
        functional.normalize(feature.square().mean(dim=1).flatten(1), dim=1) for feature in same_size(student, teacher)
    )
    return ours - theirs


def _kernel(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean of (a·b)² over all pairs of channels, [B, C, P] and [B, D, P] → [B]."""
    return torch.bmm(ours, theirs.transpose(1, 2)).square().mean(dim=(1, 2))
