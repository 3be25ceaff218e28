"""The warm-ups of several students, on one stream of batches."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .device_memory import Halving
from .execution import Execution
from .recipe import Recipe
from .seeding import derived_seed
from .stepping import Given, NonFiniteLossError, Stepping
from .student_training import StudentTraining
from .teacher_pass import TeacherPass
from .warmup_training import WarmupTraining

PURPOSE = "warmup"


@dataclass(frozen=True)
class WarmupSetting:
    """What the warm-ups of a group share.

    Attributes:
        teacher: with its own parameters; it is copied.
        student_shape: (channels, height, width) of one image as the student takes it.
        teacher_shape: the same for the teacher.
        recipe: optimizer and regularisation.
        execution: where and how it runs.
        labels: int64 [N] of all training images.
        at_once: how many students learn at the same time.
        halving: whether the teacher computes batches in halves.
    """

    teacher: nn.Module
    student_shape: tuple[int, int, int]
    teacher_shape: tuple[int, int, int]
    recipe: Recipe
    execution: Execution
    labels: Tensor
    at_once: int
    halving: Halving


def warm_up(trainings: Sequence[StudentTraining], setting: WarmupSetting, stepping: Stepping) -> list[dict[str, float]]:
    """Trains each student by its curriculum; those with a shorter one wait at its end.

    Returns:
        For each student, empty without a curriculum: `warmup_loss_1`, ... by depth, the mean loss of the last epoch of
        each hint point's lesson, and `warmup_seconds` of them all.

    Raises:
        NonFiniteLossError: at the end of the first epoch with a loss that is not finite.
        InputError: layers that do not suit the warm-up's loss.
    """
    started = time.perf_counter()
    metrics: list[dict[str, float]] = [{} for _ in trainings]
    warmups: list[WarmupTraining | None] = []
    try:
        for training in trainings:
            warmups.append(_of_student(training, setting) if training.whole.hints.curriculum else None)
        layers = [layer for warmup in warmups if warmup for layer in warmup.teacher_layers]
        teacher = TeacherPass(
            setting.teacher,
            layers,
            False,
            setting.teacher_shape,
            setting.execution,
            setting.at_once,
            setting.halving,
        )
        for epoch in range(1, max(warmup.epochs for warmup in warmups if warmup) + 1):
            present = [warmup if warmup and epoch <= warmup.epochs else None for warmup in warmups]
            depths = [warmup.begin_epoch(epoch) if warmup else 0 for warmup in present]
            rows = stepping.epoch(PURPOSE, epoch, teacher, lambda _: 0.0, [partial(_step, one) for one in present])
            for found, depth, row in zip(metrics, depths, rows, strict=True):
                if depth:
                    losses = torch.stack(row)
                    setting.execution.workers.add([losses])
                    found[f"warmup_loss_{depth}"] = _mean(losses, depth)
    finally:
        for warmup in warmups:
            if warmup:
                warmup.close()
    seconds = time.perf_counter() - started
    for training, found in zip(trainings, metrics, strict=True):
        if found:
            training.end_epoch()
            training.begin_main_stage()
            found["warmup_seconds"] = seconds
    return metrics


def _of_student(training: StudentTraining, setting: WarmupSetting) -> WarmupTraining:
    return WarmupTraining(
        training.whole.student,
        training.whole.hints,
        derived_seed(PURPOSE, training.init_seed),
        setting.teacher,
        setting.student_shape,
        setting.teacher_shape,
        setting.recipe,
        setting.execution,
        setting.labels,
        training.halving,
    )


def _step(warmup: WarmupTraining | None, given: Given) -> Tensor:
    """The loss; zero for a student whose warm-up has ended."""
    if warmup is None:
        return torch.zeros((), device=given.batch.labels.device)
    assert given.taught is not None
    return warmup.step(given.batch, given.taught)


def _mean(losses: Tensor, depth: int) -> float:
    mean = losses.double().mean().item()
    if not math.isfinite(mean):
        raise NonFiniteLossError(
            f"the warm-up's loss of hint point {depth} is {mean:.4g}; lower warmup.lr, or set recipe.clip_norm"
        )
    return mean
