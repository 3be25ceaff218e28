"""The optimizers of recipes."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hintsearch.distill.batches import Augmentation, DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.optimizers import make_optimizer
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from small_training import HINTS, STUDENT, figures, trained
from torch import nn

ADAM = Recipe(lr=0.01, optimizer="adam", weight_decay=0.01, batch_size=16, crop_padding=2)


@pytest.fixture
def make_trainer(splits: DataSplits, teacher: nn.Module) -> Callable[..., Trainer]:
    """Makes trainers of the small student by Adam."""

    def make(**changes: Any) -> Trainer:
        arguments: dict[str, Any] = {"hints": HINTS, "teacher": TeacherNetwork(teacher), "rungs": (2,)} | changes
        return Trainer(STUDENT, splits, ADAM, seeds=Seeds(1, 2), **arguments)

    return make


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_those_of_adam_by_hand(weight_decay: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = make_optimizer(Recipe(lr=0.1, optimizer="adam", weight_decay=weight_decay), [weight])
    values = [1.0, -2.0, 0.5]
    first, second = [0.0] * 3, [0.0] * 3
    for step in range(1, 5):
        optimizer.zero_grad()
        torch.autograd.backward((weight - 3).square().sum())
        optimizer.step()
        for i, value in enumerate(values):
            gradient = 2 * (value - 3) + weight_decay * value
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            values[i] = value - 0.1 * mean / (math.sqrt(square) + 1e-8)
        assert weight.tolist() == pytest.approx(values, rel=1e-5)


def test_student_is_trained_by_torchs_adam_on_the_cosine(
    make_trainer: Callable[..., Trainer], splits: DataSplits
) -> None:
    trainer = make_trainer(hints=None, teacher=None)
    by_hand = copy.deepcopy(trainer.student)
    list(trainer.epochs())
    data = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01, weight_decay=0.01)
    steps = 0
    for epoch in (1, 2):
        for batch in data.epoch(epoch, 16, 1, Augmentation(crop_padding=2, flip=True)):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 + math.cos(math.pi * steps / 8)) / 2
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(by_hand(batch.images), batch.labels))
            optimizer.step()
            steps += 1
    assert steps == 8
    for ours, theirs in zip(trainer.student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_adam_resumes_exactly(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    expected = trained(make_trainer())
    interrupted = make_trainer()
    before = [next(interrupted.epochs())]
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")
    resumed = make_trainer()
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    after, weights = trained(resumed)
    assert (figures(before) + after, weights) == expected


@pytest.mark.parametrize(("momentum", "nesterov", "used"), [(0.9, True, True), (0.9, False, False), (0.0, True, False)])
def test_sgd_has_nesterovs_form_only_with_momentum(momentum: float, nesterov: bool, used: bool) -> None:
    recipe = Recipe(lr=0.2, momentum=momentum, nesterov=nesterov, weight_decay=0.03)
    optimizer = make_optimizer(recipe, [nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    found = {name: group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    assert found == {"lr": 0.2, "momentum": momentum, "nesterov": used, "weight_decay": 0.03}
