"""Training one network, with or without a teacher, epoch by epoch."""

import math
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.errors import InputError, reason
from ..models.files import replacing
from ..models.zoo import ModelSpec, build_model
from .batches import Augmentation, DeviceImages
from .data import DataSplits
from .evaluation import evaluate
from .hint_configuration import HintConfiguration
from .hinted_student import HintedStudent
from .seeding import derived_seed

NORMALISER_BATCHES = 8
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD, and a cosine schedule to zero at the end of every rung.

    Attributes:
        lr: learning rate at the start of each rung.
        momentum: of SGD.
        nesterov: Nesterov's form of momentum.
        weight_decay: L2 penalty on all parameters.
        batch_size: images a step.
        crop_padding: zero pixels around the image before a random crop; 0: none.
        flip: mirror half of the images.
    """

    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    batch_size: int = 64
    crop_padding: int = 4
    flip: bool = True


@dataclass(frozen=True)
class Seeds:
    """Where the randomness of a training comes from.

    Attributes:
        data_seed: order of the images and their augmentation.
        init_seed: initial weights of student and adapters.
    """

    data_seed: int = 0
    init_seed: int = 0


@dataclass(frozen=True)
class EpochResult:
    """One epoch's figures.

    Attributes:
        epoch: 1-based.
        metrics: `val_accuracy` (0..1), `val_loss`, `train_loss`, `loss_classification`, `loss_logit`, `loss_hint`
            (normalised, summed over the pairs, without weight), `lr` at the epoch's start, `images_per_second`.
    """

    epoch: int
    metrics: dict[str, float]


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number; the training cannot go on."""


class Trainer:
    """Trains a freshly initialised network and yields its figures epoch by epoch.

    Args:
        student: what to train.
        splits: training and validation images.
        recipe: optimizer, schedule and augmentation.
        rungs: epochs at which a complete annealed schedule ends, increasing; the last one ends the training.
        seeds: of data order and initialisation.
        hints: what the student learns from the teacher; None: labels only.
        teacher: the frozen teacher; its mode is set to eval and its gradients are switched off.
        device: where to train.

    Raises:
        InputError: a hint configuration that does not fit the two networks.
    """

    def __init__(
        self,
        student: ModelSpec,
        splits: DataSplits,
        recipe: Recipe,
        rungs: tuple[int, ...],
        seeds: Seeds,
        *,
        hints: HintConfiguration | None = None,
        teacher: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rungs = rungs
        self.epoch = 0
        self._recipe, self._seeds = recipe, seeds
        place = torch.device(device)
        self._train = DeviceImages(splits.train, splits.mean, splits.sd, place)
        self._validation = DeviceImages(splits.validation, splits.mean, splits.sd, place)
        with torch.random.fork_rng():
            # The student first: its initial weights are then the same whatever adapters follow.
            torch.manual_seed(seeds.init_seed)
            network = build_model(student)
            whole = HintedStudent(
                network, hints or HintConfiguration(), teacher.to(place) if teacher else None, splits.image_shape
            )
        self._whole = whole.to(place)
        fixed = self._train.fixed_batches(NORMALISER_BATCHES, recipe.batch_size, seeds.data_seed)
        try:
            with _seeded_layers("normalisers", seeds, 0, place):
                self._whole.set_normalisers(fixed)
        except InputError:
            # The teacher outlives a refused configuration, and must not keep its taps.
            self._whole.close()
            raise
        self._optimizer = torch.optim.SGD(
            self._whole.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )

    @property
    def student(self) -> nn.Module:
        """The network being trained."""
        return self._whole.student

    @property
    def normalisers(self) -> tuple[float, ...]:
        """One constant a hint pair, by which its loss is divided."""
        return tuple(self._whole.normalisers.tolist())

    def epochs(self) -> Iterator[EpochResult]:
        """Trains on from the present epoch to the last; takes the taps off the networks at the end.

        Raises:
            NonFiniteLossError: at the end of the first epoch whose loss is not finite.
        """
        try:
            while self.epoch < self.rungs[-1]:
                yield self._run_epoch()
        finally:
            self._whole.close()

    def _run_epoch(self) -> EpochResult:
        epoch = self.epoch + 1
        started = time.perf_counter()
        lr = learning_rate(self._recipe.lr, self.rungs, epoch - 1)
        batches = self._batches_per_epoch
        # `tolist` waits for the device, so the time is taken after it.
        total, classification, logit, hint = (value / batches for value in self._train_epoch(epoch).tolist())
        seconds = time.perf_counter() - started
        if not math.isfinite(total):
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {epoch} (classification {classification:.4g}, logit {logit:.4g}, "
                f"hint {hint:.4g}) at a learning rate of {lr:.4g}; lower lr or the weights"
            )
        validation = evaluate(self.student, self._validation, self._recipe.batch_size * 4)
        self.epoch = epoch
        return EpochResult(
            epoch,
            {
                "val_accuracy": validation["accuracy"],
                "val_loss": validation["loss"],
                "train_loss": total,
                "loss_classification": classification,
                "loss_logit": logit,
                "loss_hint": hint,
                "lr": lr,
                "images_per_second": len(self._train) / seconds,
            },
        )

    def _train_epoch(self, epoch: int) -> Tensor:
        """Sums over the batches of [total, classification, logit, hint], on the device: no synchronisation inside."""
        self._whole.train()
        augmentation = Augmentation(self._recipe.crop_padding, self._recipe.flip)
        batches = self._train.epoch(epoch, self._recipe.batch_size, self._seeds.data_seed, augmentation)
        sums = torch.zeros(4, device=self._train.labels.device)
        steps = self._batches_per_epoch
        with _seeded_layers("epoch", self._seeds, epoch, self._train.labels.device):
            for step, batch in enumerate(batches):
                lr = learning_rate(self._recipe.lr, self.rungs, epoch - 1 + step / steps)
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
                terms = self._whole.terms(batch)
                total = self._whole.total(terms)
                self._optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(total)
                self._optimizer.step()
                normalised = (terms.hints / self._whole.normalisers).sum()
                sums += torch.stack([total, terms.classification, terms.logit, normalised]).detach()
        return sums

    @property
    def _batches_per_epoch(self) -> int:
        return self._train.batch_count(self._recipe.batch_size)

    def save_checkpoint(self, path: Path) -> None:
        """Writes all that a later `load_checkpoint` needs to go on exactly as if never interrupted."""
        content = {
            "version": CHECKPOINT_VERSION,
            "epoch": self.epoch,
            "whole": self._whole.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(content, temporary)

    def load_checkpoint(self, path: Path) -> None:
        """Goes back to the end of the epoch at which `save_checkpoint` was called; the arguments must be the same.

        Raises:
            InputError: the file is damaged, or of another version.
        """
        try:
            content: dict[str, Any] = torch.load(path, map_location=self._train.labels.device, weights_only=True)
            version = content["version"]
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{path} cannot be read as a checkpoint ({reason(error)}); start the training anew"
            ) from error
        if version != CHECKPOINT_VERSION:
            raise InputError(
                f"{path} has version {version}, but must have {CHECKPOINT_VERSION}; start the training anew"
            )
        self._whole.load_state_dict(content["whole"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.epoch = content["epoch"]


@contextmanager
def _seeded_layers(purpose: str, seeds: Seeds, epoch: int, device: torch.device) -> Iterator[None]:
    """Seeds what layers draw themselves (dropout) from the trial's seeds, and gives the global generators back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(purpose, seeds.data_seed, seeds.init_seed, epoch))
        yield


def learning_rate(initial: float, rungs: tuple[int, ...], progress: float) -> float:
    """Cosine from `initial` to zero over each rung, restarted at the next.

    Args:
        initial: learning rate at the start of a rung.
        rungs: epochs at which a rung ends, increasing.
        progress: epochs done, with the fraction of the present one.
    """
    start = max((end for end in rungs if end <= progress), default=0)
    stop = min((end for end in rungs if end > progress), default=rungs[-1])
    if stop == start:
        return 0.0
    return 0.5 * initial * (1 + math.cos(math.pi * (progress - start) / (stop - start)))
