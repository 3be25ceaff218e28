"""How a network is trained: optimizer, schedule, regularisation, augmentation; and the field's recipes as presets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..models.errors import InputError, nearest
from ..models.registry import Registry
from .batches import Augmentation

SCHEDULES = ("cosine", "step")
OPTIMIZERS = ("sgd", "adam")
CLASS_WEIGHTS = ("none", "balanced")
# Of each worker's share of the batch; of the whole batch; those that the network starts with.
BATCH_STATISTICS = ("share", "batch", "frozen")


def check_milestones(milestones: Sequence[float]) -> None:
    """Raises `InputError` unless they are shares of a rung, 0 .. 1, in increasing order."""
    for share in milestones:
        if not 0 < share < 1:
            raise InputError(
                f"{share:g} is no share of a rung; write each as a number between 0 and 1, such as 0.625 for epoch 150 "
                "of 240"
            )
    if list(milestones) != sorted(set(milestones)):
        raise InputError(f"milestones are {list(milestones)}, but must be increasing; sort them")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, with a schedule that ends at the end of every rung.

    Attributes:
        lr: learning rate at the start of each rung.
        optimizer: `sgd` or `adam`.
        momentum: of SGD.
        nesterov: Nesterov's form of momentum, of SGD.
        weight_decay: L2 penalty on all parameters.
        batch_size: images a step.
        crop_padding: zero pixels around the image before a random crop; 0: none.
        flip: mirror half of the images.
        min_crop_area: the least share of an image that a random resized crop keeps; None: padded crops instead.
        schedule: `cosine` to zero over a rung, or `step`.
        milestones: of `step`: shares of a rung after which the learning rate is multiplied by `decay`.
        decay: of `step`.
        clip_norm: the largest norm of all gradients together; larger ones are scaled down. None: no limit.
        label_smoothing: share of the target spread evenly over all classes.
        class_weights: `balanced` weighs an image by the inverse frequency of its class; `none`.
        ema_decay: of an exponential moving average of the weights over steps, which is then what is validated and
            exported; 0: none.
        batch_norm: which statistics batch norms use: of the `share` of a batch that one worker has, which with one
            worker is the batch; of the whole `batch` whoever has it, on GPUs only; `frozen`, those that the network
            starts with.

    Raises:
        InputError: an unknown schedule or class weighting, wrong milestones.
    """

    lr: float = 0.05
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    batch_size: int = 64
    crop_padding: int = 4
    flip: bool = True
    min_crop_area: float | None = None
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    decay: float = 0.1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    class_weights: str = "none"
    ema_decay: float = 0.0
    batch_norm: str = "share"

    def __post_init__(self) -> None:
        # A list where it went through JSON or YAML.
        object.__setattr__(self, "milestones", tuple(self.milestones))
        check_milestones(self.milestones)
        for key, value, options in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("class_weights", self.class_weights, CLASS_WEIGHTS),
            ("batch_norm", self.batch_norm, BATCH_STATISTICS),
        ):
            if value not in options:
                raise InputError(f"recipe.{key} is {value!r}; {nearest(value, options)}")

    @property
    def augmentation(self) -> Augmentation:
        """What happens to a training image."""
        return Augmentation(self.crop_padding, self.flip, self.min_crop_area)

    def learning_rate(self, rungs: tuple[int, ...], progress: float) -> float:
        """The learning rate at a moment of a training; each rung has a schedule of its own, from `lr` on.

        Args:
            rungs: epochs at which a rung ends, increasing.
            progress: epochs done, with the fraction of the present one.
        """
        start = max((end for end in rungs if end <= progress), default=0)
        stop = min((end for end in rungs if end > progress), default=rungs[-1])
        if stop == start:
            return 0.0
        if self.schedule == "cosine":
            return 0.5 * self.lr * (1 + math.cos(math.pi * (progress - start) / (stop - start)))
        # A hair of tolerance: 0.7 of 10 epochs is 7.
        passed = sum(progress - start >= share * (stop - start) - 1e-9 for share in self.milestones)
        return self.lr * self.decay**passed


@dataclass(frozen=True)
class Preset:
    """A published recipe.

    Attributes:
        recipe: how the network is trained.
        epochs: of one complete schedule.
        slow_models: networks that it trains with `slow_lr` instead.
        slow_lr: their learning rate.
    """

    recipe: Recipe
    epochs: int
    slow_models: tuple[str, ...] = ()
    slow_lr: float = 0.0

    def recipe_of(self, model: str) -> Recipe:
        """The recipe for a network of that name."""
        return replace(self.recipe, lr=self.slow_lr) if model in self.slow_models else self.recipe


PRESETS: Registry[Preset] = Registry("recipe preset")

PRESETS.register(
    "cifar_240",
    source="Tian et al. 2020, arXiv 1910.10699 (RepDistiller)",
    kind="recipe",
    epochs="240",
    schedule="×0.1 at 150, 180, 210",
    lr="0.05; 0.01 for MobileNetV2, ShuffleV1, ShuffleV2",
)(
    Preset(
        # 150, 180 and 210 of 240 epochs.
        Recipe(lr=0.05, nesterov=False, weight_decay=5e-4, batch_size=64, schedule="step"),
        epochs=240,
        slow_models=("MobileNetV2", "ShuffleV1", "ShuffleV2"),
        slow_lr=0.01,
    )
)
PRESETS.register(
    "imagenet_100",
    source="Keser et al. 2023, arXiv 2103.00053 (PURSUhInT); He et al. 2016, arXiv 1512.03385",
    kind="recipe",
    epochs="100",
    schedule="×0.1 every 30",
    lr="0.1 for 256 images a step",
)(
    Preset(
        Recipe(
            lr=0.1,
            nesterov=False,
            weight_decay=1e-4,
            batch_size=256,
            min_crop_area=0.08,
            schedule="step",
            milestones=(0.3, 0.6, 0.9),
        ),
        epochs=100,
    )
)
