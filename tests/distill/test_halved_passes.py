"""Passes without gradients that run out of memory: their results stay the same, in halves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_device import FullDevice
from halved import assert_alike, run
from hintsearch.distill import retrieval
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.device_memory import OutOfDeviceMemoryError
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.teacher_pass import TeacherPass
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.distill.warmup import Warmup
from hintsearch.models.zoo import build_model
from torch import nn

RECIPE = Recipe(lr=0.1, batch_size=7, crop_padding=1)
PAIRS = (HintPair("relu2", "relu1", "fitnet", 0.5),)
HINTS = HintConfiguration(PAIRS, logit_weight=0.4)
WARMED_UP = HintConfiguration(PAIRS, warmup=Warmup(epochs=(1,)))
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def students(tmp_path: Path) -> FullDevice:
    return FullDevice(tmp_path / "students")


@pytest.fixture
def teachers(tmp_path: Path) -> FullDevice:
    return FullDevice(tmp_path / "teachers")


@pytest.fixture
def taught_by(teachers: FullDevice) -> nn.Module:
    """A teacher whose passes fit only if its device has room for them."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build_model(teachers.network("normed")).eval()


@pytest.fixture
def make_trainer(students: FullDevice, splits: DataSplits, taught_by: nn.Module) -> MakeTrainer:
    def make(hints: HintConfiguration | None = HINTS, **changes: Any) -> Trainer:
        teacher = TeacherNetwork(taught_by) if hints else None
        network = students.network("normed")
        return Trainer(network, splits, RECIPE, (2,), Seeds(1, 2), hints=hints, teacher=teacher, **changes)

    return make


@pytest.mark.parametrize("logits", [True, False], ids=["to its end", "to its last layer that is read"])
def test_teacher_says_in_halves_what_it_says_of_the_whole(
    teachers: FullDevice, taught_by: nn.Module, splits: DataSplits, logits: bool
) -> None:
    data = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    (batch,) = data.fixed_batches(1, 7, 0)
    layers = ("relu1", "relu2")
    teacher_pass = TeacherPass(taught_by, layers, logits, splits.image_shape, Execution())
    whole = teacher_pass(batch.images)
    teachers.holds(4, "evaluation")
    halves = teacher_pass(batch.images)
    for layer in layers:
        torch.testing.assert_close(halves.features[layer], whole.features[layer], **ROUNDING)
    if logits:
        torch.testing.assert_close(halves.logits, whole.logits, **ROUNDING)
    assert (halves.logits is None) is not logits


@pytest.mark.parametrize("hints", [HINTS, WARMED_UP], ids=["main stage", "warm-up"])
def test_training_by_a_teacher_in_halves_is_the_same(
    make_trainer: MakeTrainer, teachers: FullDevice, hints: HintConfiguration
) -> None:
    expected = run(make_trainer(hints))
    trainer = make_trainer(hints)
    teachers.holds(4, "evaluation")
    found = run(trainer)
    assert_alike(found, expected)
    assert found[0][-1]["halved_passes"] == 1
    # The student itself goes on with whole batches.
    assert "accumulation_steps" not in found[0][-1]


def test_validation_in_halves_is_the_same(make_trainer: MakeTrainer, students: FullDevice) -> None:
    expected = run(make_trainer(None))
    trainer = make_trainer(None)
    # Of batches of 28.
    students.holds(14, "evaluation")
    found = run(trainer)
    assert_alike(found, expected)
    assert [metrics["halved_passes"] for metrics in found[0]] == [1, 1]


def test_rankings_in_halves_are_the_same(make_trainer: MakeTrainer, students: FullDevice) -> None:
    expected = run(make_trainer(None, rankings=True))
    trainer = make_trainer(None, rankings=True)
    students.holds(14, "evaluation")
    found = run(trainer)
    assert_alike(found, expected)
    assert [metrics["halved_passes"] for metrics in found[0]] == [1, 2]


def test_passes_of_a_resumed_training_are_in_halves(
    make_trainer: MakeTrainer, students: FullDevice, tmp_path: Path
) -> None:
    students.holds(14, "evaluation")
    expected = run(make_trainer(None))
    interrupted = make_trainer(None)
    next(interrupted.epochs())
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")
    students.is_free()
    resumed = make_trainer(None)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    assert run(resumed)[0] == expected[0][1:]


def test_passes_that_do_not_fit_in_halves_end_with_one_line(students: FullDevice, splits: DataSplits) -> None:
    data = DeviceImages(splits.validation, splits.preprocessing, torch.device("cpu"))
    network = build_model(students.network("plain"))
    students.holds(3, "evaluation")
    expected = r"^the evaluation ran out of device memory: a batch of 10 images does not fit in halves of 5 either \("
    with pytest.raises(OutOfDeviceMemoryError, match=expected):
        evaluate(network, data, 10)


def test_ranking_is_the_same_in_half_of_the_memory(
    splits: DataSplits, taught_by: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, queries = (
        DeviceImages(split, splits.preprocessing, torch.device("cpu")) for split in (splits.train, splits.validation)
    )

    def ranked() -> dict[str, float]:
        return retrieval.retrieval(taught_by, "fc", database, queries, 20, Execution())

    expected = ranked()
    given: list[int] = []
    chunks = retrieval._chunks

    def chunked(labels: torch.Tensor, asked: torch.Tensor, memory: int) -> Any:
        given.append(memory)
        if memory > 2**29:
            torch.empty(2**60, dtype=torch.uint8)
        return chunks(labels, asked, memory)

    monkeypatch.setattr(retrieval, "_chunks", chunked)
    assert ranked() == pytest.approx(expected)
    assert given == [2**30, 2**29, 2**29]
