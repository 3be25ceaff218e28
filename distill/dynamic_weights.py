"""Settings of the dynamic hint weights: one weight for each image and hint, learned while the student trains.

After Liu et al. 2023, arXiv 2211.17059 (HKD), of which no code was published. The defaults are this project's, on the
scheme of Meta-Weight-Net (Shu et al. 2019, arXiv 1902.07379).
"""

import math
from dataclasses import dataclass

from ..models.errors import InputError


@dataclass(frozen=True)
class DynamicWeights:
    """How the weights of the hints are learned.

    Attributes:
        hidden: units of the weight network's hidden layer.
        lr: learning rate of the weight network.
        weight_decay: of the weight network.
        momentum: m of an image's history of weights, which becomes m·history + (1−m)·present; 0: no history.
        ensemble: train with the history's weights. Off, an ablation: with the present ones.
        meta: learn the weight network. Off, an ablation: all weights stay 1, on the same training images.
        meta_every: steps of the student from one update of the weight network to the next.
        meta_images: training images set aside for the weight network to learn on, as many of each class.
        meta_batch_size: of them, images an update.
        warmup_fraction: share of the first rung's epochs with uniform weights, before any is learned; 0.1 is no
            paper's choice.

    Raises:
        InputError: a value outside its range.
    """

    hidden: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    ensemble: bool = True
    meta: bool = True
    meta_every: int = 1
    meta_images: int = 1000
    meta_batch_size: int = 64
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        for key, value, fits, rule, mend in (
            ("hidden", self.hidden, self.hidden >= 1, "at least 1", "100"),
            ("lr", self.lr, 0 < self.lr < math.inf, "above 0", "0.001"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0", "0.0001"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1", "0.9"),
            ("meta_every", self.meta_every, self.meta_every >= 1, "at least 1", "1, or 5 to save time"),
            # Batch norm knows no spread of a single image.
            ("meta_batch_size", self.meta_batch_size, self.meta_batch_size >= 2, "at least 2", "64"),
            (
                "meta_images",
                self.meta_images,
                self.meta_images >= self.meta_batch_size,
                f"at least meta_batch_size, {self.meta_batch_size}",
                "1000, or a smaller meta_batch_size",
            ),
            ("warmup_fraction", self.warmup_fraction, 0 <= self.warmup_fraction < 1, "at least 0 and below 1", "0.1"),
        ):
            if not fits:
                raise InputError(f"dynamic_weights.{key} is {value:g}, but must be {rule}; choose {mend}")

    @property
    def history_momentum(self) -> float:
        """`momentum`, or 0 without `ensemble`: the history then gives back the present weights."""
        return self.momentum if self.ensemble else 0.0

    def warmup_epochs(self, first_rung: int) -> int:
        """Whole epochs of a first rung of that many with uniform weights; always fewer than it has."""
        # A hair of tolerance: 0.1 of 30 epochs is 3.
        return min(math.floor(self.warmup_fraction * first_rung + 1e-9), first_rung - 1)

    def updates_at(self, step: int) -> bool:
        """Whether the weight network learns in that step; steps are counted from 0 at the end of the warm-up."""
        return self.meta and step % self.meta_every == 0
