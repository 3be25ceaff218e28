"""A network that is trained outside of Tune goes on where an interrupt cut it off."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hintsearch.distill.data import DataSplits
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import EpochResult, Seeds
from hintsearch.models.zoo import ModelSpec
from hintsearch.search import training
from hintsearch.search.study import Study
from hintsearch.search.training import TrainingTask

EPOCHS = 4
Train = Callable[[TrainingTask], Iterator[Any]]


@pytest.fixture
def task(tmp_path: Path) -> TrainingTask:
    recipe = Recipe(lr=0.1, batch_size=32, crop_padding=1)
    return TrainingTask(
        ModelSpec("resnet8", 3, 1, width=0.25), recipe, (EPOCHS,), Seeds(1, 2), checkpoint=tmp_path / "unfinished.pt"
    )


@pytest.fixture
def train(splits: DataSplits, digits: Study, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains as a worker does, and saves after every epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    return lambda task: training._train(task, splits, digits.resources, on_gpu=False)


def figures(items: list[Any]) -> list[tuple[int, float] | None]:
    return [(i.epoch, i.metrics["train_loss"]) if isinstance(i, EpochResult) else None for i in items]


def test_training_that_was_cut_off_goes_on_to_the_same_weights(task: TrainingTask, train: Train) -> None:
    precision, *epochs, weights = train(replace(task, checkpoint=None))
    cut_off = train(task)
    # The precision and three epochs; the third is saved before the fourth is begun.
    before = [next(cut_off) for _ in range(4)]
    cut_off.close()
    again, *rest, same = train(task)
    assert again == before[0] == precision
    assert figures(rest) == [None, None, None, *figures(epochs)[3:]]
    assert all(np.array_equal(same[name], array) for name, array in weights.items())


def test_damaged_checkpoint_is_as_good_as_none(task: TrainingTask, train: Train) -> None:
    assert task.checkpoint
    _, *epochs, _ = train(replace(task, checkpoint=None))
    task.checkpoint.write_bytes(b"no checkpoint")
    _, *anew, _ = train(task)
    assert figures(anew) == figures(epochs)


def test_training_without_room_for_a_checkpoint_goes_on(task: TrainingTask, train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _, *epochs, _ = train(replace(task, checkpoint=tmp_path / "file" / "unfinished.pt"))
    assert len(epochs) == EPOCHS
