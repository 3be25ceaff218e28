"""Rankings that a training tells of."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.retrieval import retrieval
from hintsearch.distill.trainer import GroupTrainer, Seeds, TaughtStudent, TeacherNetwork, Trainer
from small_training import HINTS, RECIPE, STUDENT, figures
from torch import nn

NAMES = {f"val_{name}_{distance}" for name in ("map", "map11", "precision_at_100") for distance in ("cosine", "l2")}


def make(splits: DataSplits, teacher: nn.Module, rankings: bool, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {"recipe": RECIPE, "rungs": (1, 3)} | changes
    network = TeacherNetwork(teacher)
    return Trainer(STUDENT, splits, seeds=Seeds(1, 2), hints=HINTS, teacher=network, rankings=rankings, **arguments)


def by_hand(splits: DataSplits, network: nn.Module) -> dict[str, float]:
    """Of the training images, whose order is their own, for the validation images."""
    train, validation = (
        DeviceImages(split, splits.preprocessing, torch.device("cpu"))  # type: ignore[arg-type]
        for split in (splits.train, splits.validation)
    )
    found = retrieval(network, "fc", train, validation, 60, Execution())
    return {f"val_{name}": value for name, value in found.items()}


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_rankings_are_those_of_the_exported_student_at_the_ends_of_rungs(
    splits: DataSplits, teacher: nn.Module, ema_decay: float
) -> None:
    trainer = make(splits, teacher, True, recipe=replace(RECIPE, ema_decay=ema_decay))
    told, expected = [], []
    for result in trainer.epochs():
        told.append({name: value for name, value in result.metrics.items() if name in NAMES})
        expected.append(by_hand(splits, trainer.student) if result.epoch in (1, 3) else {})
    assert set(told[0]) == set(told[2]) == NAMES
    for ours, theirs in zip(told, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert told[0] != told[2]


def test_rankings_are_told_only_if_they_are_wanted_and_change_nothing(splits: DataSplits, teacher: nn.Module) -> None:
    with_rankings, without = (figures(make(splits, teacher, wanted).epochs()) for wanted in (True, False))
    assert [{name: value for name, value in one.items() if name not in NAMES} for one in with_rankings] == without
    assert not any(NAMES & one.keys() for one in without)


def test_each_student_of_a_group_has_rankings_of_its_own(splits: DataSplits, teacher: nn.Module) -> None:
    students = [TaughtStudent(HINTS, 2), TaughtStudent(HintConfiguration(), 3)]
    network = TeacherNetwork(teacher)
    group = GroupTrainer(STUDENT, splits, RECIPE, (1,), students, 1, teacher=network, rankings=True)
    (results,) = group.epochs()
    for result, student in zip(results, group.networks, strict=True):
        told = {name: value for name, value in result.metrics.items() if name in NAMES}
        assert told == pytest.approx(by_hand(splits, student), rel=1e-6)
    assert results[0].metrics["val_map_l2"] != results[1].metrics["val_map_l2"]
