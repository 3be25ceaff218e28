"""What a student is trained with: hint pairs and loss weights. The exported file carries it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .dynamic_weights import DynamicWeights
from .hint_pair import HintPair
from .warmup import Lesson, Warmup

__all__ = ["HintConfiguration", "HintPair"]


@dataclass(frozen=True)
class HintConfiguration:
    """L = γ·L_classification + α·L_logit + Σ over the terms of β·L_hint/normaliser.

    A term is a pair, all pairs of one joint loss, or the penultimate features.

    Attributes:
        pairs: in the depth order of the teacher's hint points.
        classification_weight: γ, of the cross-entropy with the labels.
        logit_weight: α; 0 leaves the term out.
        logit_loss: name of the logit loss.
        temperature: τ of the logit loss.
        embedding_weight: β of a hint loss between the two penultimate features; 0 leaves the term out.
        embedding_loss: name of that hint loss.
        normalise: whether hint terms are divided by their size at the start; if not, their weights are raw ones.
        warmup: what the pairs' layers learn before the main stage, whatever the weights; None: nothing.
        dynamic_weights: how the weights of the distillation terms follow each image; None: they are fixed.
    """

    pairs: tuple[HintPair, ...] = ()
    classification_weight: float = 1.0
    logit_weight: float = 0.0
    logit_loss: str = "kd"
    temperature: float = 4.0
    embedding_weight: float = 0.0
    embedding_loss: str = "pkt_symmetric"
    normalise: bool = True
    warmup: Warmup | None = None
    dynamic_weights: DynamicWeights | None = None

    @property
    def active_pairs(self) -> tuple[HintPair, ...]:
        """The pairs with a weight above 0."""
        return tuple(pair for pair in self.pairs if pair.weight > 0)

    @property
    def has_hint_terms(self) -> bool:
        """Whether any term compares features."""
        return self.embedding_weight > 0 or bool(self.active_pairs)

    @property
    def curriculum(self) -> tuple[Lesson, ...]:
        """The parts of the warm-up, in order."""
        return self.warmup.curriculum(self.pairs) if self.warmup else ()

    @property
    def needs_teacher(self) -> bool:
        """Whether any term, or the warm-up, reads the teacher."""
        return self.logit_weight > 0 or self.has_hint_terms or bool(self.curriculum)

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for files and messages between processes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "HintConfiguration":
        """The inverse of `to_dict`."""
        warmup, dynamic = content.get("warmup"), content.get("dynamic_weights")
        return cls(
            **{
                **content,
                "pairs": tuple(HintPair(**pair) for pair in content["pairs"]),
                "warmup": Warmup(**warmup) if warmup else None,
                "dynamic_weights": DynamicWeights(**dynamic) if dynamic else None,
            }
        )
