import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hintsearch.distill.batches import Augmentation, DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hinted_student import HintedStudent
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.teacher_pass import TeacherPass
from hintsearch.distill.trainer import EpochResult, NonFiniteLossError, Seeds, TeacherNetwork, Trainer
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from torch import nn

STUDENT = ModelSpec("resnet8", 3, 1, width=0.25)
RECIPE = Recipe(lr=0.1, batch_size=16, crop_padding=1)
PAIRS = (HintPair("layer1.0", "layer1.0", "fitnet", 0.5), HintPair("layer3.0", "layer2.0", "at", 2.0))
HINTS = HintConfiguration(pairs=PAIRS, logit_weight=0.4)

# A network whose weights are all the same, without batch norm: a teacher of this kind equals its student.
CONSTANT_NETWORK = """
from torch import nn


def build(*, num_classes, in_channels):
    conv, linear = nn.Conv2d(in_channels, 4, 3), nn.Linear(4, num_classes)
    for parameter in (*conv.parameters(), *linear.parameters()):
        nn.init.constant_(parameter, 0.1)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
"""

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(splits: DataSplits, teacher: nn.Module) -> MakeTrainer:
    """Makes trainers of the small student, by default with hints over three epochs of one rung."""

    def make(**changes: Any) -> Trainer:
        arguments: dict[str, Any] = {
            "student": STUDENT,
            "splits": splits,
            "recipe": RECIPE,
            "rungs": (3,),
            "seeds": Seeds(1, 2),
            "hints": HINTS,
            "teacher": TeacherNetwork(teacher),
        }
        return Trainer(**(arguments | changes))

    return make


def figures(results: list[EpochResult]) -> list[dict[str, float]]:
    """All metrics but the speed, which no two runs share."""
    return [
        {name: value for name, value in result.metrics.items() if name != "images_per_second"} | {"n": result.epoch}
        for result in results
    ]


def trained(trainer: Trainer) -> tuple[list[dict[str, float]], str]:
    """The figures of all epochs and the hash of the trained weights."""
    results = figures(list(trainer.epochs()))
    return results, weights_sha256(trainer.student.state_dict())


def initial(trainer: Trainer) -> str:
    return weights_sha256(trainer.student.state_dict())


@pytest.mark.parametrize("with_hints", [True, False])
def test_two_runs_of_the_same_seeds_are_the_same(make_trainer: MakeTrainer, with_hints: bool) -> None:
    changes: dict[str, Any] = {} if with_hints else {"hints": None, "teacher": None}
    assert trained(make_trainer(**changes)) == trained(make_trainer(**changes))


@pytest.mark.parametrize("seeds", [Seeds(1, 3), Seeds(2, 2)], ids=["init_seed", "data_seed"])
def test_another_seed_changes_figures_and_weights(make_trainer: MakeTrainer, seeds: Seeds) -> None:
    one, other = trained(make_trainer(rungs=(1,))), trained(make_trainer(rungs=(1,), seeds=seeds))
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_student_starts_the_same_with_and_without_adapters(make_trainer: MakeTrainer) -> None:
    assert initial(make_trainer()) == initial(make_trainer(hints=None, teacher=None))


def test_student_starts_the_same_whatever_the_data_seed(make_trainer: MakeTrainer) -> None:
    assert initial(make_trainer(seeds=Seeds(5, 2))) == initial(make_trainer())


def test_student_starts_differently_for_another_init_seed(make_trainer: MakeTrainer) -> None:
    assert initial(make_trainer(seeds=Seeds(1, 3))) != initial(make_trainer())


def test_building_a_trainer_leaves_the_global_generator_as_it_was(make_trainer: MakeTrainer) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        make_trainer()
        assert torch.equal(torch.get_rng_state(), before)


def test_training_does_not_depend_on_the_global_generator(make_trainer: MakeTrainer) -> None:
    results = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(trained(make_trainer(rungs=(1,))))
    assert results[0] == results[1]


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_sgd_by_hand(make_trainer: MakeTrainer, splits: DataSplits, nesterov: bool) -> None:
    recipe = Recipe(lr=0.2, momentum=0.8, nesterov=nesterov, weight_decay=0.01, batch_size=16, crop_padding=2)
    trainer = make_trainer(rungs=(2,), recipe=recipe, hints=None, teacher=None)
    by_hand = copy.deepcopy(trainer.student)
    list(trainer.epochs())

    data = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    weights = list(by_hand.parameters())
    velocities = [torch.zeros_like(weight) for weight in weights]
    steps = 0
    for epoch in (1, 2):
        for batch in data.epoch(epoch, 16, 1, Augmentation(crop_padding=2, flip=True)):
            lr = 0.2 * (1 + math.cos(math.pi * steps / 8)) / 2
            loss = nn.functional.cross_entropy(by_hand(batch.images), batch.labels)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
                    decayed = gradient + 0.01 * weight
                    velocity.mul_(0.8).add_(decayed)
                    step = decayed + 0.8 * velocity if nesterov else velocity
                    weight.sub_(lr * step)
            steps += 1
    assert steps == 8
    for ours, theirs in zip(trainer.student.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_student_trains_in_training_mode_even_if_the_caller_left_it_in_eval_mode(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    found = []
    for result in trainer.epochs():
        found.append(result)
        trainer.student.eval()
    assert figures(found) == trained(make_trainer())[0]


def test_student_learns_the_classes(make_trainer: MakeTrainer) -> None:
    results = list(make_trainer(rungs=(8,), recipe=replace(RECIPE, flip=False), hints=None, teacher=None).epochs())
    assert results[-1].metrics["val_accuracy"] > 0.9
    assert results[-1].metrics["train_loss"] < results[0].metrics["train_loss"] / 2


def test_hint_loss_falls_when_it_is_all_that_is_trained(make_trainer: MakeTrainer) -> None:
    hints = HintConfiguration(pairs=PAIRS[:1], classification_weight=0.0)
    results = list(make_trainer(rungs=(5,), hints=hints).epochs())
    assert results[-1].metrics["loss_hint"] < 0.8 * results[0].metrics["loss_hint"]


def test_epochs_are_numbered_from_one_to_the_last_rung(make_trainer: MakeTrainer) -> None:
    assert [result.epoch for result in make_trainer(rungs=(1, 3)).epochs()] == [1, 2, 3]


def test_metrics_are_those_that_are_promised(make_trainer: MakeTrainer) -> None:
    (result,) = make_trainer(rungs=(1,)).epochs()
    promised = ["val_accuracy", "val_macro_f1", "val_loss", "train_loss", "loss_classification", "loss_logit"]
    assert list(result.metrics) == [*promised, "loss_hint", "lr", "images_per_second"]
    assert all(type(value) is float for value in result.metrics.values())


def test_train_loss_is_the_weighted_sum_of_its_terms(make_trainer: MakeTrainer) -> None:
    hints = HintConfiguration(pairs=PAIRS[:1], classification_weight=0.6, logit_weight=0.4)
    (result,) = make_trainer(rungs=(1,), hints=hints).epochs()
    terms = {name: result.metrics[f"loss_{name}"] for name in ("classification", "logit", "hint")}
    expected = 0.6 * terms["classification"] + 0.4 * terms["logit"] + 0.5 * terms["hint"]
    assert result.metrics["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_hint_metric_is_the_normalised_loss_and_near_one_at_the_start(make_trainer: MakeTrainer) -> None:
    still = replace(RECIPE, lr=0.0, crop_padding=0, flip=False)
    (result,) = make_trainer(rungs=(1,), recipe=still).epochs()
    assert result.metrics["loss_hint"] == pytest.approx(len(PAIRS), rel=0.2)


def test_validation_figures_are_those_of_the_student_after_the_epoch(
    make_trainer: MakeTrainer, splits: DataSplits
) -> None:
    trainer = make_trainer(rungs=(2,))
    last = list(trainer.epochs())[-1]
    data = DeviceImages(splits.validation, splits.preprocessing, torch.device("cpu"))
    found = evaluate(trainer.student, data, 30)
    assert last.metrics["val_accuracy"] == found["accuracy"]
    assert last.metrics["val_macro_f1"] == found["macro_f1"]
    assert last.metrics["val_loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_normalisers_are_the_mean_raw_losses_over_eight_fixed_batches(
    make_trainer: MakeTrainer, splits: DataSplits, teacher: nn.Module
) -> None:
    # Attention transfer alone: another adapter would be initialised here.
    hints = replace(HINTS, pairs=PAIRS[1:])
    trainer = make_trainer(hints=hints, recipe=replace(RECIPE, batch_size=7))
    data = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu"))
    whole = HintedStudent(trainer.student, hints, teacher, splits.image_shape).train()
    taught = TeacherPass(teacher, whole.teacher_layers, True, splits.image_shape, Execution())
    with torch.no_grad():
        fixed = data.fixed_batches(8, 7, seed=1)
        raw = torch.stack([whole.terms(batch, taught(batch.teacher_images)).hints for batch in fixed])
    assert len(raw) == 8
    assert trainer.normalisers == pytest.approx(raw.mean(dim=0).tolist(), rel=1e-5)


def test_learning_rate_restarts_at_each_rung(make_trainer: MakeTrainer) -> None:
    found = [result.metrics["lr"] for result in make_trainer(rungs=(1, 3, 5)).epochs()]
    assert found == pytest.approx([0.1, 0.1, 0.05, 0.1, 0.05])


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_resumed_run_is_the_undisturbed_one(make_trainer: MakeTrainer, tmp_path: Path, done: int) -> None:
    undisturbed = make_trainer(rungs=(2, 5))
    expected = trained(undisturbed)

    interrupted = make_trainer(rungs=(2, 5))
    epochs = interrupted.epochs()
    before = [next(epochs) for _ in range(done)]
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")

    resumed = make_trainer(rungs=(2, 5))
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    after, weights = trained(resumed)
    assert (figures(before) + after, weights) == expected
    assert resumed.normalisers == undisturbed.normalisers


def test_checkpoint_does_not_disturb_the_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    found = []
    for result in trainer.epochs():
        trainer.save_checkpoint(tmp_path / "checkpoint.pt")
        found.append(result)
    assert figures(found) == trained(make_trainer())[0]


def test_checkpoint_goes_back_to_its_epoch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    epochs = trainer.epochs()
    next(epochs)
    trainer.save_checkpoint(tmp_path / "checkpoint.pt")
    first = [next(epochs)]
    trainer.load_checkpoint(tmp_path / "checkpoint.pt")
    assert trainer.epoch == 1
    assert figures([next(epochs)]) == figures(first)


def test_normalisers_come_from_the_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save_checkpoint(tmp_path / "checkpoint.pt")
    other = make_trainer(seeds=Seeds(7, 8))
    assert other.normalisers != trainer.normalisers
    other.load_checkpoint(tmp_path / "checkpoint.pt")
    assert other.normalisers == trainer.normalisers


def test_teacher_is_not_in_the_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer().save_checkpoint(tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {name.split(".")[0] for name in content["students"][0]["whole"]} == {"student", "hint_losses", "normalisers"}


def test_epoch_that_failed_is_not_counted(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(recipe=replace(RECIPE, lr=1e12, batch_size=4))
    with pytest.raises(NonFiniteLossError):
        list(trainer.epochs())
    assert trainer.epoch == 0


def test_momentum_zero_needs_no_change_of_nesterov(make_trainer: MakeTrainer) -> None:
    (result,) = make_trainer(rungs=(1,), recipe=replace(RECIPE, momentum=0.0)).epochs()
    assert math.isfinite(result.metrics["train_loss"])


def test_teacher_is_left_as_it_was(make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    before = weights_sha256(teacher.state_dict())
    list(make_trainer(rungs=(1,)).epochs())
    assert weights_sha256(teacher.state_dict()) == before
    assert teacher.get_submodule("relu").inplace
    assert all(module.training and not module._forward_hooks for module in teacher.modules())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_refused_configuration_is_an_error_naming_the_term(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "constant.py"
    path.write_text(CONSTANT_NETWORK)
    spec = ModelSpec(f"{path}:build", 3, 1)
    hints = HintConfiguration(pairs=(HintPair("0", "0", "at", 1.0),))
    with pytest.raises(InputError, match="the hint loss at of 0 → 0 is 0 at the start"):
        make_trainer(student=spec, hints=hints, teacher=TeacherNetwork(build_model(spec)))
