"""Every loss between a student and its teacher, by its registry."""

from . import (  # noqa: F401 (they register what they define)
    boundary_losses,
    contrastive_loss,
    feature_losses,
    joint_losses,
    relation_losses,
)
from .batches import Samples
from .hint_loss import HINT_LOSSES, AnyHintLoss, FeatureShape, HintLoss, JointHintLoss, TeacherLayer
from .logit_losses import LOGIT_LOSSES, LogitLoss

__all__ = [
    "HINT_LOSSES",
    "LOGIT_LOSSES",
    "AnyHintLoss",
    "FeatureShape",
    "HintLoss",
    "JointHintLoss",
    "LogitLoss",
    "Samples",
    "TeacherLayer",
]
