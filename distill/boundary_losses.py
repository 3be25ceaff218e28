"""Hint losses that compare features before their activation, and count what the activation will keep.

To add one, write a small class here with its registration and source on top; nothing else changes.
"""

import math

import torch
from torch import Tensor, nn

from ..models.end_activation import end_activation, preceding_batch_norm
from ..models.taps import INPUT
from .adapters import connector
from .hint_loss import HINT_LOSSES, FeatureShape, HintLoss, TeacherLayer, same_size

_NEEDS = "1×1 convolution and batch norm; features before the activation, where one ends the layer"


class _Connected(HintLoss):
    """A loss of features before the activation, after a trained 1×1 convolution with batch norm."""

    pre_activation = ("student", "teacher")

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.connector = connector(student.channels, teacher.channels)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, C_T, H, W] each."""
        student, teacher = same_size(student, teacher)
        return self.connector(student), teacher


@HINT_LOSSES.register("ab", source="Heo et al. 2019, arXiv 1811.03233", kind="hint", needs=_NEEDS)
class ActivationBoundaries(_Connected):
    """Squared distance from a margin of 1 on the teacher's side of zero; 3/1000 of its sum over an image.

    The reduction is RepDistiller's, where the loss trains the student before, not beside, the other losses.
    """

    MARGIN, SCALE = 1.0, 3e-3

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        side = torch.where(teacher > 0, 1.0, -1.0)
        return self.SCALE * (self.MARGIN - side * student).relu().square().sum(dim=(1, 2, 3))


@HINT_LOSSES.register("ofd", source="Heo et al. 2019, arXiv 1904.01866", kind="hint", needs=_NEEDS)
class OverhauledFeatureDistillation(_Connected):
    """Squared error with the teacher's features, summed over an image, those below a margin lifted to it.

    Where the teacher's are negative, only a student above them errs. The margin of a channel is its mean negative
    value, by the teacher's batch norm before the activation; without one there is no margin.
    """

    margin: Tensor
    # Below that probability of a negative value the margin is -3 standard deviations, as published.
    RARE = 1e-3

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        nn.init.normal_(self.connector.get_parameter("0.weight"), 0, math.sqrt(2 / teacher.channels))
        self.register_buffer("margin", torch.full((teacher.channels,), -math.inf))

    def read_teacher(self, layer: TeacherLayer) -> None:
        """Computes the margins of the channels; what a module is given, such as `fc:input`, has none."""
        if layer.path.endswith(INPUT):
            return
        activation = end_activation(layer.network, layer.path, layer.image_shape)
        norm = preceding_batch_norm(layer.network, activation, layer.image_shape) if activation else None
        if norm is not None and norm.affine:
            mean, deviation = norm.bias.detach().double().cpu(), norm.weight.detach().double().abs().cpu()
            self.margin.copy_(_mean_negative(mean, deviation, self.RARE))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → [B]."""
        wanted = torch.maximum(teacher, self.margin[:, None, None])
        counts = (student > wanted) | (wanted > 0)
        return ((student - wanted).square() * counts).sum(dim=(1, 2, 3))


def _mean_negative(mean: Tensor, deviation: Tensor, rare: float) -> Tensor:
    """E[x | x < 0] of normal distributions, [C] each → [C]; -3 deviations where x is hardly ever negative."""
    ratio = mean / deviation
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(below > rare, mean - deviation * density / below, -3 * deviation)
