"""What has a state of its own beside the student, where a step runs out of memory and is repeated in halves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing_once import FailsOnce
from full_device import FullDevice
from halved import assert_alike, run
from hintsearch.distill import weight_network
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.dynamic_weights import DynamicWeights
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.losses import HINT_LOSSES, HintLoss
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import GroupTrainer, Seeds, TaughtStudent, TeacherNetwork, Trainer
from hintsearch.distill.warmup import Warmup
from hintsearch.models.weights import weights_sha256
from small_training import figures
from torch import Tensor, nn

# Of 45 images: two batches of 17 and one of 11.
RECIPE = Recipe(lr=0.1, batch_size=17, crop_padding=1)
ROOM = 9
PAIRS = (HintPair("layer1.0", "relu1", "fitnet", 0.5), HintPair("layer3.0", "relu2", "at", 2.0))
CRD = HintConfiguration((HintPair("layer3.0", "relu2", "crd", 1.0),))
WEIGHTS = DynamicWeights(hidden=20, lr=0.01, meta_images=15, meta_batch_size=11, warmup_fraction=0.0)
HKD = HintConfiguration(PAIRS, logit_weight=0.4, dynamic_weights=WEIGHTS)
WARMED_UP = HintConfiguration(PAIRS, logit_weight=0.4, warmup=Warmup(epochs=(1, 2)))

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def device(tmp_path: Path) -> FullDevice:
    return FullDevice(tmp_path / "device")


@pytest.fixture
def with_meta(splits: DataSplits) -> DataSplits:
    """45 of the training images to train on, 15 to learn weights on."""
    assert isinstance(splits.train, ImageSet)
    return replace(splits, train=splits.train.subset(np.arange(45)), meta=splits.train.subset(np.arange(45, 60)))


@pytest.fixture
def make_trainer(device: FullDevice, with_meta: DataSplits, teacher: nn.Module) -> MakeTrainer:
    """Makes trainers of a network without batch norm."""

    def make(hints: HintConfiguration, kind: str = "plain", **changes: Any) -> Trainer:
        arguments: dict[str, Any] = {"recipe": RECIPE, "rungs": (2,), "seeds": Seeds(1, 2)} | changes
        return Trainer(device.network(kind), with_meta, hints=hints, teacher=TeacherNetwork(teacher), **arguments)

    return make


def fails_in_backward(trainer: Trainer, at: int) -> None:
    """In the backward pass of the step that really moves the student, when almost all gradients are there."""
    trainer.student.get_parameter("conv1.weight").register_post_accumulate_grad_hook(FailsOnce(at))


def memories(trainer: Trainer) -> list[Tensor]:
    """Of CRD: the student's and the teacher's, and the partitions."""
    (training,) = trainer._group._trainings
    loss = training.whole.hint_terms[0].loss
    return [loss.get_buffer(name).clone() for name in ("student_memory", "teacher_memory", "partitions")]


def after_the_first_step(trainer: Trainer) -> list[Tensor]:
    """Of an epoch of one step."""
    next(trainer.epochs())
    return memories(trainer)


def test_images_of_the_repeated_step_are_remembered_once(make_trainer: MakeTrainer) -> None:
    recipe = replace(RECIPE, batch_size=45)
    before = memories(make_trainer(CRD, recipe=recipe))
    expected = after_the_first_step(make_trainer(CRD, recipe=recipe))
    failing = make_trainer(CRD, recipe=recipe)
    fails_in_backward(failing, 0)
    found = after_the_first_step(failing)
    for memory, other, at_the_start in zip(found[:2], expected[:2], before[:2], strict=True):
        # The embeddings were those before the step, in both.
        torch.testing.assert_close(memory, other, rtol=1e-4, atol=1e-6)
        assert (memory - at_the_start).abs().amax(dim=1).min() > 1e-3


def test_warmup_goes_on_in_halves_that_add_up(make_trainer: MakeTrainer, device: FullDevice) -> None:
    expected = run(make_trainer(WARMED_UP))
    trainer = make_trainer(WARMED_UP)
    device.holds(ROOM)
    found = run(trainer)
    assert_alike(found, expected)


def test_what_ran_out_in_the_warmup_is_in_halves_in_the_main_stage(
    make_trainer: MakeTrainer, device: FullDevice
) -> None:
    trainer = make_trainer(WARMED_UP)
    # The nine steps of the warm-up's three epochs, the first of them tried twice, with two halves each.
    device.holds(ROOM)
    step = type(trainer._group._stepping).epoch

    def epoch(self: Any, purpose: str, *rest: Any) -> Any:
        if purpose != "warmup":
            device.is_free()
        return step(self, purpose, *rest)

    trainer._group._stepping.epoch = epoch.__get__(trainer._group._stepping)  # type: ignore[method-assign]
    first = next(trainer.epochs())
    assert first.metrics["accumulation_steps"] == 2


@pytest.fixture
def each_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight network sees the losses as they are: standardised over a batch, a half has other values."""
    monkeypatch.setattr(weight_network, "_standardised", lambda losses: losses)


def weighting_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that HKD learned and remembers."""
    (training,) = trainer._group._trainings
    assert training._weighting is not None
    state = training._weighting.state_dict()
    tensors = {**state["network"], **state["history"], "steps": torch.tensor(state["step"])}
    for place, moments in state["optimizer"]["state"].items():
        tensors |= {f"{place}.{name}": value for name, value in moments.items()}
    return tensors


def assert_same_weighting(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=1e-6, msg=lambda text, of=name: f"{of}: {text}"
        )


@pytest.mark.usefixtures("each_image_alone")
@pytest.mark.parametrize("at", [0, 2])
def test_weights_learn_in_halves_what_they_learn_of_the_whole(make_trainer: MakeTrainer, at: int) -> None:
    """And learn it once in the repeated step, which fails when the weight network has already learned."""
    whole, failing = make_trainer(HKD), make_trainer(HKD)
    fails_in_backward(failing, at)
    expected, found = run(whole), run(failing)
    assert found[0][0]["accumulation_steps"] == 2
    assert_alike(found, expected)
    assert_same_weighting(weighting_of(failing), weighting_of(whole))
    # Otherwise there is nothing to see.
    assert max(abs(value - 1) for name, value in expected[0][-1].items() if name.startswith("hint_weight.")) > 1e-4


@pytest.mark.usefixtures("each_image_alone")
@pytest.mark.parametrize("state", ["gradients", "training"])
def test_no_pass_of_a_halved_step_with_weights_is_larger_than_a_half(
    make_trainer: MakeTrainer, device: FullDevice, state: str
) -> None:
    expected = run(make_trainer(HKD))
    device.holds(ROOM, state)
    assert_alike(run(make_trainer(HKD)), expected)


@pytest.mark.usefixtures("each_image_alone")
def test_meta_images_are_in_halves_beside_a_batch_that_is_too_small_for_it(
    make_trainer: MakeTrainer, device: FullDevice
) -> None:
    recipe = replace(RECIPE, batch_size=21)
    hints = replace(HKD, dynamic_weights=replace(WEIGHTS, meta_batch_size=15))
    expected = run(make_trainer(hints, recipe=recipe))
    # Of the batches of 21, 21 and 3 images the last is whole.
    device.holds(11)
    assert_alike(run(make_trainer(hints, recipe=recipe)), expected)


def test_batch_norm_of_a_halved_step_with_weights_sees_each_half_once(
    make_trainer: MakeTrainer, device: FullDevice
) -> None:
    trainer = make_trainer(HKD, "normed")
    device.holds(ROOM)
    run(trainer)
    # Two halves in each of the three steps of the two epochs.
    assert trainer.student.get_buffer("norm2.num_batches_tracked").item() == 12


def test_training_with_weights_is_resumed_in_halves_exactly(
    make_trainer: MakeTrainer, device: FullDevice, tmp_path: Path
) -> None:
    hints = HintConfiguration((*PAIRS, *CRD.pairs), logit_weight=0.4, dynamic_weights=WEIGHTS)
    device.holds(ROOM)
    expected = run(make_trainer(hints))
    interrupted = make_trainer(hints)
    before = figures([next(interrupted.epochs())])
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")
    device.is_free()
    resumed = make_trainer(hints)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    after, weights = run(resumed)
    assert before + after == expected[0]
    assert all(map(torch.equal, weights, expected[1]))


class Greedy(HintLoss):
    """Needs more memory than there is for more than nine images."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) > ROOM:
            torch.empty(2**60, dtype=torch.uint8)
        return student.square().mean(dim=(1, 2, 3))


GREEDY = HintConfiguration((HintPair("layer1.0", "relu1", "greedy", 1.0),), normalise=False)


@pytest.fixture
def _greedy_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HINT_LOSSES, "_entries", dict(HINT_LOSSES._entries))
    HINT_LOSSES.register("greedy", source="this test")(Greedy)


@pytest.mark.usefixtures("_greedy_loss")
@pytest.mark.parametrize("side_by_side", [1, 2])
def test_each_student_of_a_group_is_as_alone_whether_it_runs_out_or_not(
    make_trainer: MakeTrainer, device: FullDevice, with_meta: DataSplits, teacher: nn.Module, side_by_side: int
) -> None:
    plain = HintConfiguration(PAIRS, logit_weight=0.4)
    students = [TaughtStudent(plain, 2), TaughtStudent(GREEDY, 3), TaughtStudent(plain, 4)]
    group = GroupTrainer(
        device.network("normed"),
        with_meta,
        RECIPE,
        (2,),
        students,
        1,
        teacher=TeacherNetwork(teacher),
        side_by_side=side_by_side,
    )
    together = list(group.epochs())
    for number, student in enumerate(students):
        alone = make_trainer(student.hints, "normed", seeds=Seeds(1, student.init_seed))
        found = figures(alone.epochs())
        assert figures(results[number] for results in together) == found
        assert weights_sha256(group.networks[number].state_dict()) == weights_sha256(alone.student.state_dict())
        assert ("accumulation_steps" in found[-1]) is (student.hints == GREEDY)
