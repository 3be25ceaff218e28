"""Trainings that run out of memory: from then on a step adds up the gradients of two halves of its batch."""

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
from hintsearch.distill.batches import DeviceImages
from hintsearch.distill.data import DataSplits, ImageSet
from hintsearch.distill.device_memory import OutOfDeviceMemoryError
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.moving_average import MovingAverage
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from small_training import figures
from torch import Tensor, nn

# Of 60 images: three batches of 17 and one of 9, none of which has two halves of a size.
RECIPE = Recipe(lr=0.1, batch_size=17, crop_padding=1)
ROOM = 9
PAIRS = (HintPair("layer1.0", "relu1", "fitnet", 0.5), HintPair("layer3.0", "relu2", "vid", 2.0))
JOINT = tuple(replace(pair, loss="fsp", weight=1.0) for pair in PAIRS)
HINTS = HintConfiguration(PAIRS, logit_weight=0.4)

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def device(tmp_path: Path) -> FullDevice:
    return FullDevice(tmp_path / "device")


@pytest.fixture
def unbalanced(splits: DataSplits) -> DataSplits:
    """With 40, 15 and 5 training images of the classes."""
    assert isinstance(splits.train, ImageSet)
    labels = np.repeat(np.arange(3, dtype=np.int64), [40, 15, 5])
    return replace(splits, train=ImageSet(splits.train.images, labels))


@pytest.fixture
def make_trainer(device: FullDevice, unbalanced: DataSplits, teacher: nn.Module) -> MakeTrainer:
    """Makes trainers of a network without batch norm, so that halves add up to the whole."""

    def make(kind: str = "plain", hints: HintConfiguration | None = HINTS, **changes: Any) -> Trainer:
        arguments: dict[str, Any] = {"recipe": RECIPE, "rungs": (2,)} | changes
        taught_by = TeacherNetwork(teacher) if hints else None
        network = device.network(kind)
        return Trainer(network, unbalanced, seeds=Seeds(1, 2), hints=hints, teacher=taught_by, **arguments)

    return make


@pytest.mark.parametrize(
    ("hints", "changes"),
    [
        (None, {}),
        (None, {"class_weights": "balanced", "label_smoothing": 0.1}),
        (None, {"clip_norm": 0.05}),
        (HINTS, {"class_weights": "balanced", "ema_decay": 0.5}),
        (HintConfiguration(JOINT, logit_weight=0.4), {}),
    ],
    ids=["labels", "class weights", "clipping", "hints", "joint hints"],
)
def test_halves_add_up_to_the_whole_batch(
    make_trainer: MakeTrainer, device: FullDevice, hints: HintConfiguration | None, changes: dict[str, Any]
) -> None:
    recipe = replace(RECIPE, **changes)
    expected = run(make_trainer(hints=hints, recipe=recipe))
    device.holds(ROOM)
    found = run(make_trainer(hints=hints, recipe=recipe))
    assert found[0][0]["accumulation_steps"] == 2
    assert_alike(found, expected)


def test_it_goes_on_in_halves_and_says_so_in_every_epoch(make_trainer: MakeTrainer, device: FullDevice) -> None:
    trainer = make_trainer(rungs=(3,))
    device.holds(ROOM)
    epochs = trainer.epochs()
    first = next(epochs)
    device.is_free()
    assert [result.metrics["accumulation_steps"] for result in (first, *epochs)] == [2.0] * 3


def test_nothing_is_said_where_nothing_runs_out(make_trainer: MakeTrainer, device: FullDevice) -> None:
    device.holds(RECIPE.batch_size)
    found, _ = run(make_trainer())
    assert not {"accumulation_steps", "halved_passes"} & set(found[-1])


@pytest.mark.parametrize("fails_at", [0, 2, 5])
def test_with_batch_norm_it_is_accumulation_by_hand(
    make_trainer: MakeTrainer, device: FullDevice, unbalanced: DataSplits, fails_at: int
) -> None:
    """Batch norm's statistics included: the step that failed behind its first layer leaves none."""
    trainer = make_trainer("normed", hints=None)
    by_hand = trained_by_hand(make_trainer("normed", hints=None).student, unbalanced, fails_at)
    device.holds(ROOM, after=fails_at)
    _, found = run(trainer)
    for ours, theirs in zip(found, by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def trained_by_hand(network: nn.Module, splits: DataSplits, fails_at: int) -> nn.Module:
    """From the step that fails on each batch in two halves, of which the first has one more image if it is odd."""
    data = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    network.train()
    for epoch in (1, 2):
        for number, batch in enumerate(data.epoch(epoch, RECIPE.batch_size, 1, RECIPE.augmentation)):
            step = 4 * (epoch - 1) + number
            for group in optimizer.param_groups:
                group["lr"] = RECIPE.learning_rate((2,), step / 4)
            optimizer.zero_grad()
            images, labels = batch.images, batch.labels
            middle = (len(labels) + 1) // 2 if step >= fails_at else len(labels)
            for part in (slice(0, middle), slice(middle, None)):
                if len(labels[part]):
                    losses = nn.functional.cross_entropy(network(images[part]), labels[part], reduction="none")
                    (losses.sum() / len(labels)).backward()
            optimizer.step()
    return network


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_resumed_training_goes_on_in_halves_exactly(
    make_trainer: MakeTrainer, device: FullDevice, tmp_path: Path, kind: str
) -> None:
    device.holds(ROOM)
    expected = run(make_trainer(kind))
    interrupted = make_trainer(kind)
    before = figures([next(interrupted.epochs())])
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")
    # It would be computed whole, were it not for the checkpoint.
    device.is_free()
    resumed = make_trainer(kind)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    after, weights = run(resumed)
    assert before + after == expected[0]
    assert all(map(torch.equal, weights, expected[1]))


def test_halves_that_do_not_fit_either_end_the_training_with_one_line(
    make_trainer: MakeTrainer, device: FullDevice
) -> None:
    trainer = make_trainer()
    device.holds(8)
    with pytest.raises(
        OutOfDeviceMemoryError,
        match=r"^the training ran out of device memory: a batch of 17 images does not fit in halves of 9 either \(.*"
        r"can't allocate memory.*\); lower recipe\.batch_size, run fewer trials at a time .*, or compute in bf16$",
    ):
        run(trainer)


def test_batch_of_three_images_is_not_halved(make_trainer: MakeTrainer, device: FullDevice) -> None:
    trainer = make_trainer(recipe=replace(RECIPE, batch_size=3))
    device.holds(2)
    with pytest.raises(OutOfDeviceMemoryError, match=r"a batch of 3 images is too small to be halved"):
        run(trainer)


def test_last_batch_that_is_too_small_for_batch_norm_stays_whole(make_trainer: MakeTrainer, device: FullDevice) -> None:
    """Of 60 images in batches of 19 three are left; a half of one has no spread."""
    seen: list[int] = []
    trainer = make_trainer("normed", recipe=replace(RECIPE, batch_size=19), rungs=(1,))
    device.holds(10)
    trainer.student.get_submodule("fc").register_forward_pre_hook(
        lambda module, given: seen.append(len(given[0])) if module.training else None
    )
    run(trainer)
    assert seen == [10, 9, 10, 9, 10, 9, 3]


def test_error_of_anything_else_ends_the_training_as_it_is(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()

    def broken(*_call: Any) -> None:
        raise RuntimeError("of its own")

    trainer.student.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match=r"^of its own$"):
        run(trainer)


@pytest.mark.parametrize("at", [0, 2])
def test_gradients_of_a_backward_pass_that_fails_do_not_count(make_trainer: MakeTrainer, at: int) -> None:
    expected = run(make_trainer())
    trainer = make_trainer()
    # The layers behind it have their gradients then.
    weight = trainer.student.get_parameter("conv1.weight")
    weight.register_post_accumulate_grad_hook(FailsOnce(at))
    found = run(trainer)
    assert found[0][-1]["accumulation_steps"] == 2
    assert_alike(found, expected)


@pytest.mark.parametrize(
    ("recipe", "allocates"),
    [(RECIPE, "empty_like"), (replace(RECIPE, optimizer="adam", lr=0.01), "zeros_like")],
    ids=["sgd", "adam"],
)
def test_optimizer_that_cannot_allocate_its_state_has_not_stepped(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, allocates: str
) -> None:
    expected = run(make_trainer(hints=None, recipe=recipe))
    trainer = make_trainer(hints=None, recipe=recipe)
    allocate, failing = getattr(torch, allocates), FailsOnce(3)

    def allocated(*args: Any, **kwargs: Any) -> Tensor:
        failing()
        made: Tensor = allocate(*args, **kwargs)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(torch, allocates, allocated)
        found = run(trainer)
    assert failing.calls > 4
    assert found[0][-1]["accumulation_steps"] == 2
    assert_alike(found, expected)


def test_step_that_was_taken_is_not_repeated(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(recipe=replace(RECIPE, ema_decay=0.5))
    follow, failing = MovingAverage.follow, FailsOnce(1)

    def following(self: MovingAverage, network: nn.Module) -> None:
        failing()
        follow(self, network)

    monkeypatch.setattr(MovingAverage, "follow", following)
    with pytest.raises(OutOfDeviceMemoryError, match=r"^the training ran out of device memory \("):
        run(trainer)
    assert failing.calls == 2


def test_normalisers_are_those_of_whole_batches(make_trainer: MakeTrainer, device: FullDevice) -> None:
    expected = make_trainer().normalisers
    device.holds(ROOM, "training")
    trainer = make_trainer()
    assert trainer.normalisers == pytest.approx(expected, rel=1e-5)
    assert run(trainer)[0][0]["accumulation_steps"] == 2


def test_layers_draw_in_the_repeated_step_what_its_seed_says(
    make_trainer: MakeTrainer, device: FullDevice, tmp_path: Path
) -> None:
    """A training that was in halves from the start is the same as one that fails in its first step."""
    untrained = make_trainer("dropping")
    untrained.save_checkpoint(tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt")
    content["students"][0]["halved"] = True
    torch.save(content, tmp_path / "checkpoint.pt")
    halved = make_trainer("dropping")
    halved.load_checkpoint(tmp_path / "checkpoint.pt")
    expected = run(halved)
    failing = make_trainer("dropping")
    device.holds(ROOM)
    found = run(failing)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))
