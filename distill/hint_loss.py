"""What a loss between the features of a hint pair is; the losses themselves are in the modules beside this one."""

import math
from dataclasses import dataclass

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

    It is made of two parts, because a trainer runs adapters in the precision of the networks, which they are part of,
    but computes losses in float32. The teacher's features carry no gradient.

    Args:
        student: of the student's feature maps.
        teacher: of the teacher's.
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
        """The loss of what `adapt` gives: of each image [B], or a scalar where it is one of the whole batch."""
        raise NotImplementedError

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → scalar, a mean over the batch."""
        return self.compare(*self.adapt(student, teacher)).mean()


HINT_LOSSES: Registry[type[HintLoss]] = Registry("hint loss")


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools the map with more pixels to the size of the other; [B, C, H, W] each."""
    student_size, teacher_size = (student.shape[2], student.shape[3]), (teacher.shape[2], teacher.shape[3])
    if student_size == teacher_size:
        return student, teacher
    if math.prod(student_size) > math.prod(teacher_size):
        return functional.adaptive_avg_pool2d(student, teacher_size), teacher
    return student, functional.adaptive_avg_pool2d(teacher, student_size)
