"""A curriculum before the main stage: the student learns the hint points one by one.

InDistill, Sarridis et al. 2022, arXiv 2205.10003.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.errors import InputError, nearest
from .hint_pair import HintPair

ORDERS = ("shallow_to_deep", "deep_to_shallow")


@dataclass(frozen=True)
class Lesson:
    """One part of a warm-up.

    Attributes:
        depth: of the hint point among all, from 1.
        pair: the layers; its loss is the warm-up's, its weight 1.
        epochs: how long.
    """

    depth: int
    pair: HintPair
    epochs: int


@dataclass(frozen=True)
class Warmup:
    """One hint pair after the other is learned by one loss alone, before the main stage.

    Attributes:
        loss: the hint loss.
        base_epochs: a; the i-th hint point by depth, from 1, gets a+i epochs.
        epochs: of the hint points by depth instead; further ones get the last number. Empty: by `base_epochs`.
        order: `shallow_to_deep` or `deep_to_shallow`.
        lr: learning rate; None: the recipe's.

    Raises:
        InputError: an unknown order, a number of epochs below 0 or 1.
    """

    loss: str = "strongest_channels"
    base_epochs: int = 2
    epochs: tuple[int, ...] = ()
    order: str = "shallow_to_deep"
    lr: float | None = None

    def __post_init__(self) -> None:
        # A list where it went through JSON or YAML.
        object.__setattr__(self, "epochs", tuple(self.epochs))
        if self.order not in ORDERS:
            raise InputError(f"warmup.order is {self.order!r}; {nearest(self.order, ORDERS)}")
        if self.base_epochs < 0:
            raise InputError(f"warmup.base_epochs is {self.base_epochs}, but must be at least 0; choose 2")
        for epochs in self.epochs:
            if epochs < 1:
                raise InputError(f"warmup.epochs has {epochs}, but each must be at least 1; choose 3")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"warmup.lr is {self.lr:g}, but must be above 0; choose 0.001, or leave it out")

    def curriculum(self, pairs: Sequence[HintPair]) -> tuple[Lesson, ...]:
        """What is learned, in order: each two layers of the pairs, which come by depth, once."""
        layers = dict.fromkeys((pair.teacher_layer, pair.student_layer) for pair in pairs)
        lessons = [
            Lesson(number, HintPair(theirs, ours, self.loss, 1.0), self._epochs_of(number))
            for number, (theirs, ours) in enumerate(layers, start=1)
        ]
        return tuple(lessons if self.order == "shallow_to_deep" else reversed(lessons))

    def total_epochs(self, points: int) -> int:
        """Epochs of a warm-up of that many hint points."""
        return sum(self._epochs_of(number) for number in range(1, points + 1))

    def _epochs_of(self, number: int) -> int:
        if not self.epochs:
            return self.base_epochs + number
        return self.epochs[min(number, len(self.epochs)) - 1]
