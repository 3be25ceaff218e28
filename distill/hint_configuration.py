"""What a student is trained with: hint pairs and loss weights. The exported file carries it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HintPair:
    """A teacher hint point and the student layer that learns from it.

    Attributes:
        teacher_layer: module path in the teacher.
        student_layer: module path in the student.
        loss: name of the hint loss.
        weight: β, its weight after normalisation.
    """

    teacher_layer: str
    student_layer: str
    loss: str
    weight: float


@dataclass(frozen=True)
class HintConfiguration:
    """L = γ·L_classification + α·L_logit + Σ over the pairs of β·L_hint/normaliser.

    Attributes:
        pairs: in the depth order of the teacher's hint points.
        classification_weight: γ, of the cross-entropy with the labels.
        logit_weight: α; 0 leaves the term out.
        logit_loss: name of the logit loss.
        temperature: τ of the logit loss.
    """

    pairs: tuple[HintPair, ...] = ()
    classification_weight: float = 1.0
    logit_weight: float = 0.0
    logit_loss: str = "kd"
    temperature: float = 4.0

    @property
    def active_pairs(self) -> tuple[HintPair, ...]:
        """The pairs with a weight above 0."""
        return tuple(pair for pair in self.pairs if pair.weight > 0)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher."""
        return self.logit_weight > 0 or bool(self.active_pairs)

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for files and messages between processes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "HintConfiguration":
        """The inverse of `to_dict`."""
        return cls(**{**content, "pairs": tuple(HintPair(**pair) for pair in content["pairs"])})
