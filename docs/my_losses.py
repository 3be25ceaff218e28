"""Losses of one's own: named in a study as `my_losses.py:FUNCTION`, or `my_losses.py:CLASS` if something is trained."""

import torch
from hintsearch.distill.losses import FeatureShape, HintLoss
from torch import Tensor, nn


def mean_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """A hint loss: [B, C_S, H_S, W_S] and [B, C_T, H_T, W_T] → [B], of each image.

    The squared difference of the mean activations. The teacher's features carry no gradient.
    """
    return (student.mean(dim=(1, 2, 3)) - teacher.mean(dim=(1, 2, 3))).square()


def squared_logits(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """A logit loss: [B, classes] each, labels [B] → [B]."""
    return (student / temperature - teacher / temperature).square().mean(dim=1)


class PooledRegression(HintLoss):
    """A hint loss with a trained layer: the teacher's pooled channels from the student's."""

    def __init__(self, student: FeatureShape, teacher: FeatureShape) -> None:
        super().__init__(student, teacher)
        self.regressor = nn.Linear(student.channels, teacher.channels)

    def adapt(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared, in the precision of the networks: [B, C_T] each."""
        return self.regressor(student.mean(dim=(2, 3))), teacher.mean(dim=(2, 3))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """In float32: [B, C_T] each → [B]."""
        return torch.nn.functional.smooth_l1_loss(student, teacher, reduction="none").mean(dim=1)
