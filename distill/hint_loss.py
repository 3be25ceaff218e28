"""What a loss between the features of hint pairs is; the losses themselves are in the modules beside this one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor, nn

from ..models.registry import Registry
from .batches import Samples


@dataclass(frozen=True)
class FeatureShape:
    """The shape of one image's feature map, C×H×W."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class TeacherLayer:
    """A layer of the teacher, with the teacher's own parameters.

    Attributes:
        network: the teacher, not folded.
        path: of the layer in it.
        image_shape: (channels, height, width) of one image as the teacher takes it.
    """

    network: nn.Module
    path: str
    image_shape: tuple[int, int, int]


class _AnyHintLoss(nn.Module):
    """What all hint losses share.

    Attributes:
        pre_activation: of which networks, "student" and "teacher", it reads layers before the activation that ends
            them, where one does.
        draws: whether it reads torch's global generator; students with such a loss are trained one by one.
        couples: whether the loss of an image depends on the other images of its batch: of several workers each then
            compares the whole batch, whose features they send each other after the adapters.
        remembers: whether it may keep something of the batch it sees. Off while a batch may be looked at several
            times: of the passes over one batch, the same tensor of indices, the first is then what `catch_up` keeps.
        kept: names of its own buffers that no pass writes to while it does not remember; they may be large.
    """

    pre_activation: tuple[str, ...] = ()
    draws = False
    couples = False
    kept: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.remembers = True

    def catch_up(self) -> None:
        """Keeps what the passes without `remembers` would have kept, and has then nothing left to catch up with."""

    def forget(self) -> None:
        """Keeps nothing of these passes."""

    def read_training_set(self, labels: Tensor) -> None:
        """Reads what the loss needs to know of all training images, of which these are the labels int64 [N].

        Called once, before training; what it registers as buffers is checkpointed.
        """


class HintLoss(_AnyHintLoss):
    """A loss between a student's and a teacher's feature maps; it may own trained adapters.

    It is made of two parts, because a trainer runs adapters in the precision of the networks, which they are part of,
    but computes losses in float32. The teacher's features carry no gradient.

    Args:
        student: of the student's feature maps.
        teacher: of the teacher's.
    """

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__()

    def read_teacher(self, layer: TeacherLayer) -> None:
        """Reads what the loss needs of the teacher's own parameters, such as batch-norm scales or filter norms.

        Called once, before the teacher is folded: in the passes that follow these parameters are other ones.
        """

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared, of [B, C_S, H_S, W_S] and [B, C_T, H_T, W_T]: the features after the adapters."""
        return student, teacher

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of what `adapt` gives: of each image [B], or a scalar where it is one of the whole batch."""
        raise NotImplementedError

    def compare_samples(self, student: Tensor, teacher: Tensor, samples: Samples) -> Tensor:
        """The same for a loss that needs to know which images they are: it overrides this method instead."""
        return self.compare(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, samples: Samples) -> Tensor:
        """[B, C_S, H_S, W_S], [B, C_T, H_T, W_T] → scalar, a mean over the batch."""
        return self.compare_samples(*self.adapt(student, teacher), samples).mean()


class JointHintLoss(_AnyHintLoss):
    """A loss of all hint pairs that name it together, such as one between consecutive layers.

    Args:
        students: of the student's feature maps, in the depth order of the teacher's hint points.
        teachers: of the teacher's.

    Raises:
        InputError: layers that do not suit it.
    """

    def __init__(self, students: Sequence[FeatureShape], teachers: Sequence[FeatureShape]) -> None:
        super().__init__()

    def adapt(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What is compared, of [B, C_S, H_S, W_S] and [B, C_T, H_T, W_T], one a pair."""
        return students, teachers

    def compare(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """The loss of what `adapt` gives: of each image [B], or a scalar where it is one of the whole batch."""
        raise NotImplementedError

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        """[B, C_S, H_S, W_S] and [B, C_T, H_T, W_T], one a pair → scalar, a mean over the batch."""
        return self.compare(*self.adapt(students, teachers)).mean()


AnyHintLoss = HintLoss | JointHintLoss

HINT_LOSSES: Registry[type[HintLoss] | type[JointHintLoss]] = Registry("hint loss")


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pools the map with more pixels to the size of the other; [B, C, H, W] each."""
    student_size, teacher_size = (student.shape[2], student.shape[3]), (teacher.shape[2], teacher.shape[3])
    if student_size == teacher_size:
        return student, teacher
    if math.prod(student_size) > math.prod(teacher_size):
        return functional.adaptive_avg_pool2d(student, teacher_size), teacher
    return student, functional.adaptive_avg_pool2d(teacher, student_size)
