"""Every loss between a student and its teacher, by its registry."""

from . import feature_losses, relation_losses  # noqa: F401 (they register what they define)
from .hint_loss import HINT_LOSSES, FeatureShape, HintLoss
from .logit_losses import LOGIT_LOSSES, LogitLoss

__all__ = ["HINT_LOSSES", "LOGIT_LOSSES", "FeatureShape", "HintLoss", "LogitLoss"]
