"""One student in its warm-up: lesson by lesson, each with one hint loss alone.

InDistill, Sarridis et al. 2022, arXiv 2205.10003.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..models.errors import InputError
from .batches import Batch
from .device_memory import Halving
from .execution import Execution
from .hint_configuration import HintConfiguration
from .hinted_student import HintedStudent
from .optimizers import descend, make_optimizer
from .parts import Part
from .recipe import Recipe
from .repeatable_step import RepeatableStep
from .teacher_pass import TeacherOutputs


class WarmupTraining:
    """What a student learns before its main stage.

    All of the student runs and learns as far as the lesson's layer; what lies behind has no gradient. Each lesson has
    an optimizer of its own, at a constant learning rate.

    Args:
        network: the student, which is changed.
        hints: the configuration, whose curriculum is learned.
        init_seed: of the warm-up's adapters, if its loss has any.
        teacher: the network that is taught from.
        student_shape: (channels, height, width) of one image as the student takes it.
        teacher_shape: the same for the teacher.
        recipe: optimizer and regularisation.
        execution: where and how it runs.
        labels: int64 [N] of all training images.
        halving: whether batches are computed in halves.

    Raises:
        InputError: layers that do not suit the warm-up's loss.
    """

    def __init__(
        self,
        network: nn.Module,
        hints: HintConfiguration,
        init_seed: int,
        teacher: nn.Module,
        student_shape: tuple[int, int, int],
        teacher_shape: tuple[int, int, int],
        recipe: Recipe,
        execution: Execution,
        labels: Tensor,
        halving: Halving,
    ) -> None:
        self._lessons = hints.curriculum
        pairs = tuple(lesson.pair for lesson in self._lessons)
        with torch.random.fork_rng():
            torch.manual_seed(init_seed)
            self._whole = HintedStudent(
                network,
                HintConfiguration(pairs, classification_weight=0.0, normalise=False),
                teacher,
                student_shape,
                teacher_shape,
                execution=execution,
                labels=labels,
                frozen_norms=recipe.batch_norm == "frozen",
            ).to(execution.place)
        if len(self._whole.hint_terms) != len(self._lessons):
            raise InputError(
                f"warmup.loss is {pairs[0].loss!r}, which is of all hint pairs together, but a warm-up learns one "
                "after the other; choose another"
            )
        self._repeatable = RepeatableStep(self._whole, halving)
        lr = hints.warmup.lr if hints.warmup else None
        self._recipe = recipe if lr is None else replace(recipe, lr=lr)
        self._optimizer: torch.optim.Optimizer | None = None
        self._number = -1

    @property
    def epochs(self) -> int:
        """Of all lessons."""
        return sum(lesson.epochs for lesson in self._lessons)

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """What is read of the teacher."""
        return self._whole.teacher_layers

    def begin_epoch(self, epoch: int) -> int:
        """Gets ready for an epoch, from 1 to `epochs`; gives the depth of its hint point among all, from 1."""
        ends = torch.tensor([lesson.epochs for lesson in self._lessons]).cumsum(0)
        number = int((ends < epoch).sum())
        if number != self._number:
            self._number = number
            term = self._whole.hint_terms[number]
            self._optimizer = make_optimizer(self._recipe, [*self._whole.student.parameters(), *term.parameters()])
        self._whole.train()
        return self._lessons[number].depth

    def step(self, batch: Batch, taught: TeacherOutputs) -> Tensor:
        """One step of the optimizer; the loss before it, scalar on the device."""
        assert self._optimizer is not None
        loss = self._repeatable.run(batch, taught, partial(self._descend, self._optimizer), self._optimizer)
        self._repeatable.keep()
        return loss

    def _descend(self, optimizer: torch.optim.Optimizer, parts: list[Part]) -> Tensor:
        values: list[Tensor] = []

        def losses() -> Iterator[Tensor]:
            for part in parts:
                assert part.taught is not None
                loss = self._whole.hint_loss(self._number, part.batch, part.taught)
                loss = loss if part.is_whole else part.images * loss
                values.append(loss.detach())
                yield loss

        descend(optimizer, self._whole, losses(), self._recipe.clip_norm, self._whole.execution.workers)
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def close(self) -> None:
        """Takes the taps off the student, and the gradients of the last step."""
        self._whole.close()
        self._whole.student.zero_grad(set_to_none=True)
