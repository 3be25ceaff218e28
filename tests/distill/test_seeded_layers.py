"""What a layer draws itself, as dropout does, follows the trial's seeds too."""

from pathlib import Path

import pytest
import torch
from hintsearch.distill.data import DataSpec, DataSplits, load_data
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, Trainer
from hintsearch.models.zoo import ModelSpec

FACTORY = """
from torch import nn

def build(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(in_channels * 64, num_classes))
"""


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    return load_data(DataSpec(train_fraction=0.1), tmp_path_factory.mktemp("data")).without_test()


@pytest.fixture
def student(tmp_path: Path) -> ModelSpec:
    (tmp_path / "net.py").write_text(FACTORY)
    return ModelSpec(f"{tmp_path / 'net.py'}:build", num_classes=10, in_channels=1)


def _trainer(student: ModelSpec, splits: DataSplits) -> Trainer:
    return Trainer(student, splits, Recipe(lr=0.1, batch_size=16, flip=False), (4,), Seeds(1, 2))


def _losses(trainer: Trainer) -> list[float]:
    return [result.metrics["train_loss"] for result in trainer.epochs()]


def test_a_student_with_dropout_repeats_itself(student: ModelSpec, splits: DataSplits) -> None:
    first = _losses(_trainer(student, splits))
    torch.rand(7)
    assert _losses(_trainer(student, splits)) == first


def test_a_student_with_dropout_resumes_exactly(student: ModelSpec, splits: DataSplits, tmp_path: Path) -> None:
    whole = _losses(_trainer(student, splits))
    started = _trainer(student, splits)
    epochs = started.epochs()
    begun = [next(epochs).metrics["train_loss"] for _ in range(2)]
    started.save_checkpoint(tmp_path / "c.pt")
    resumed = _trainer(student, splits)
    resumed.load_checkpoint(tmp_path / "c.pt")
    assert begun + _losses(resumed) == whole


def test_training_leaves_the_global_generator_as_it_was(student: ModelSpec, splits: DataSplits) -> None:
    before = torch.random.get_rng_state()
    _losses(_trainer(student, splits))
    assert torch.equal(torch.random.get_rng_state(), before)
