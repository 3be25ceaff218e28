"""Epochs of batches for several students at once, with all that is random in them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .batches import Batch, Batches
from .recipe import Recipe
from .seeding import derived_seed
from .side_by_side import for_all
from .teacher_pass import TeacherOutputs, TeacherPass
from .workers import ALONE, Workers

# The purpose of the epochs of the main stage, whose order is that of the data seed itself.
MAIN = "step"


@dataclass(frozen=True)
class Given:
    """What all students of a group are given in one step.

    Attributes:
        step: of the epoch, from 0.
        batch: images and labels.
        taught: what the teacher says of them; None without a teacher.
        lr: learning rate.
    """

    step: int
    batch: Batch
    taught: TeacherOutputs | None
    lr: float


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number; the training cannot go on."""


class Stepping:
    """Reads the training images epoch by epoch, and hands each batch to all students.

    Args:
        train: the images.
        recipe: batch size and augmentation.
        data_seed: order and augmentation of the images.
        init_seeds: of each student; what its layers draw in a step depends on it.
        at_once: how many students learn at the same time; with one, what layers draw is seeded for each.
        workers: each reads its share of every batch. All draw the same, so that losses which draw see the same.
    """

    def __init__(
        self,
        train: Batches,
        recipe: Recipe,
        data_seed: int,
        init_seeds: Sequence[int],
        at_once: int,
        workers: Workers = ALONE,
    ) -> None:
        self._train, self._recipe, self._data_seed = train, recipe, data_seed
        self._init_seeds, self._at_once, self._workers = tuple(init_seeds), at_once, workers

    @property
    def steps(self) -> int:
        """Of an epoch, if every image can be read."""
        return self._train.batch_count(self._recipe.batch_size, self._workers)

    def epoch(
        self,
        purpose: str,
        epoch: int,
        teacher: TeacherPass | None,
        lr_of: Callable[[int], float],
        learners: Sequence[Callable[[Given], Tensor]],
    ) -> list[list[Tensor]]:
        """One epoch.

        Args:
            purpose: `MAIN`, or what else the epochs are for: their order is another one.
            epoch: 1-based.
            teacher: runs on each batch, once for all; None: there is none.
            lr_of: learning rate by the number of the step, from 0.
            learners: what each student does with a batch.

        Returns:
            What each student's learner gave, step by step.
        """
        data_seed = self._data_seed if purpose == MAIN else derived_seed(purpose, self._data_seed)
        batches = self._train.epoch(epoch, self._recipe.batch_size, data_seed, self._recipe.augmentation, self._workers)
        rows: list[list[Tensor]] = [[] for _ in learners]

        def given(item: tuple[int, Batch]) -> Given:
            step, batch = item
            return Given(step, batch, teacher(batch.teacher_images) if teacher else None, lr_of(step))

        def teach(numbers: Sequence[int], what: Given) -> None:
            for number in numbers:
                if self._at_once == 1:
                    # What layers draw themselves (dropout) is each student's own, whoever is trained beside it.
                    seed_layers(
                        self._train.device, purpose, self._data_seed, self._init_seeds[number], epoch, what.step
                    )
                rows[number].append(learners[number](what))

        shares = [range(first, len(rows), self._at_once) for first in range(self._at_once)]
        with own_generators(self._train.device):
            for_all(enumerate(batches), given, [partial(teach, share) for share in shares])
        return rows


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Gives the global generators, which layers draw from, back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_layers(device: torch.device, purpose: str, *numbers: int) -> None:
    """Seeds the generator that layers on a device draw from: `torch.manual_seed`, which seeds all, takes 0.1 ms."""
    if device.type == "cuda":
        torch.cuda.manual_seed(derived_seed(purpose, *numbers))
    torch.default_generator.manual_seed(derived_seed(purpose, *numbers))
