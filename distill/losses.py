"""Losses between a student and its teacher: on logits, and on the features of hint pairs.

To add one, write a function or a small class here with its registration and source on top; nothing else changes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..models.registry import Registry


@dataclass(frozen=True)
class FeatureShape:
    """The shape of one image's feature map, C×H×W."""

    channels: int
    height: int
    width: int


class HintLoss(nn.Module):
    """A loss between a student's and a teacher's feature maps; it may own trained adapters.

    `forward(student, teacher)` takes [B, C_S, H_S, W_S] and [B, C_T, H_T, W_T] and returns a scalar, a mean over the
    batch. The teacher's features carry no gradient. It is made of two parts, because a trainer runs adapters in the
    precision of the networks, which they are part of, but computes losses in float32.
    """

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__()

    def read_teacher(self, layer: nn.Module) -> None:
        """Reads what the loss needs of the teacher layer's own parameters, such as batch-norm scales or filter norms.

        Called once, before the teacher is folded: in the passes that follow these parameters are other ones.
        """

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared, of [B, C_S, H_S, W_S] and [B, C_T, H_T, W_T]: the features after the adapters."""
        return student, teacher

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of what `adapt` gives, scalar."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → scalar."""
        return self.compare(*self.adapt(student, teacher))


LogitLoss = Callable[[Tensor, Tensor, float], Tensor]

LOGIT_LOSSES: Registry[LogitLoss] = Registry("logit loss")
HINT_LOSSES: Registry[type[HintLoss]] = Registry("hint loss")


@LOGIT_LOSSES.register("kd", source="Hinton et al. 2015, arXiv 1503.02531", kind="logits", needs="logits")
def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)), mean over the batch; logits [B, C] → scalar."""
    log_student = functional.log_softmax(student / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher / temperature, dim=1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


@HINT_LOSSES.register("fitnet", source="Romero et al. 2015, arXiv 1412.6550", kind="hint", needs="1×1 convolution")
class FitNet(HintLoss):
    """Mean squared error after a trained 1×1 convolution from the student's to the teacher's channels."""

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.regressor = nn.Conv2d(student.channels, teacher.channels, 1)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → [B, C_T, H, W] each."""
        student, teacher = same_size(student, teacher)
        return self.regressor(student), teacher

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_T, H, W] each → scalar."""
        return functional.mse_loss(student, teacher)


@HINT_LOSSES.register("at", source="Zagoruyko & Komodakis 2017, arXiv 1612.03928", kind="hint", needs="feature maps")
class AttentionTransfer(HintLoss):
    """Mean squared difference of the L2-normalised maps of squared activations."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → scalar."""
        student, teacher = same_size(student, teacher)
        return (_attention(student) - _attention(teacher)).square().mean()


@HINT_LOSSES.register("sp", source="Tung & Mori 2019, arXiv 1907.09682", kind="hint", needs="a batch of samples")
class SimilarityPreserving(HintLoss):
    """Mean squared difference of the row-normalised similarities between the samples of a batch."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → scalar."""
        return (_similarities(student) - _similarities(teacher)).square().mean()


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools the map with more pixels to the size of the other; [B, C, H, W] each."""
    student_size, teacher_size = (student.shape[2], student.shape[3]), (teacher.shape[2], teacher.shape[3])
    if student_size == teacher_size:
        return student, teacher
    if math.prod(student_size) > math.prod(teacher_size):
        return functional.adaptive_avg_pool2d(student, teacher_size), teacher
    return student, functional.adaptive_avg_pool2d(teacher, student_size)


def _attention(feature: Tensor) -> Tensor:
    return functional.normalize(feature.square().mean(dim=1).flatten(1), dim=1)


def _similarities(feature: Tensor) -> Tensor:
    flat = feature.flatten(1)
    return functional.normalize(torch.mm(flat, flat.t()), dim=1)
