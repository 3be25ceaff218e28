import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill.batches import Augmentation, DeviceImages
from hintsearch.distill.data import DataSplits
from hintsearch.distill.evaluation import evaluate
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.hinted_student import HintedStudent
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.stepping import NonFiniteLossError
from hintsearch.distill.teacher_pass import TeacherPass
from hintsearch.distill.trainer import EpochResult, Seeds, TeacherNetwork, Trainer
from hintsearch.models.errors import InputError
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

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
    assert list(result.metrics) == [*promised, "loss_hint", "lr", "images_per_second", "adapter_parameters"]
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


def test_everything_that_a_recipe_has_resumes_exactly(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    recipe = replace(RECIPE, ema_decay=0.9, clip_norm=0.5, label_smoothing=0.1, class_weights="balanced")
    changes = {"recipe": recipe, "execution": Execution(precision="bf16")}
    expected = trained(make_trainer(**changes))
    interrupted = make_trainer(**changes)
    before = [next(interrupted.epochs())]
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")
    resumed = make_trainer(**changes)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    after, weights = trained(resumed)
    assert (figures(before) + after, weights) == expected


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04"])
def test_damaged_checkpoint_is_an_error_naming_it(make_trainer: MakeTrainer, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"checkpoint.pt cannot be read as a checkpoint \(.+\); start the training anew"
    ):
        make_trainer().load_checkpoint(path)


def test_checkpoint_of_another_version_is_an_error(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    torch.save({"version": 1, "epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint.pt has version 1, but must have 4; start the training anew"):
        make_trainer().load_checkpoint(tmp_path / "checkpoint.pt")


def test_checkpoint_of_another_number_of_students_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    make_trainer().save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "students": content["students"] * 3}, path)
    with pytest.raises(InputError, match="holds 3 students, but there are 1 here"):
        make_trainer().load_checkpoint(path)


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
    assert {name.split(".")[0] for name in content["students"][0]["whole"]} == {"student", "_terms", "normalisers"}


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


def test_student_begins_from_given_weights(make_trainer: MakeTrainer) -> None:
    start = make_trainer(seeds=Seeds(1, 9)).student.state_dict()
    for changes in ({}, {"hints": None, "teacher": None}, {"recipe": replace(RECIPE, ema_decay=0.5)}):
        assert initial(make_trainer(start=start, **changes)) == weights_sha256(start)


def test_start_decides_the_student_and_the_init_seed_its_adapters(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    adapters = []
    for number, start in enumerate((None, make_trainer(seeds=Seeds(1, 9)).student.state_dict())):
        make_trainer(start=start).save_checkpoint(tmp_path / f"{number}.pt")
        whole = torch.load(tmp_path / f"{number}.pt", weights_only=True)["students"][0]["whole"]
        adapters.append(whole["_terms.0.loss.regressor.weight"])
    assert torch.equal(adapters[0], adapters[1])


def test_start_that_does_not_fit_is_an_error(make_trainer: MakeTrainer) -> None:
    start = build_model(replace(STUDENT, width=0.5)).state_dict()
    with pytest.raises(
        InputError, match=r"the weights of the start of resnet8 do not fit CifarResNet: conv1.weight is"
    ):
        make_trainer(start=start)


def step_by_step(make_trainer: MakeTrainer, steps: int, **recipe: Any) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """A trainer of one step an epoch without a teacher, and what it would export before and after each step."""
    one_step = Recipe(lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=60, schedule="step", milestones=())
    trainer = make_trainer(rungs=(steps,), recipe=replace(one_step, **recipe), hints=None, teacher=None)
    states = [copy.deepcopy(trainer.student.state_dict())]
    states += [copy.deepcopy(trainer.student.state_dict()) for _ in trainer.epochs()]
    return trainer, states


def test_moving_average_of_the_steps_is_what_is_exported(make_trainer: MakeTrainer) -> None:
    _, states = step_by_step(make_trainer, 3)
    _, averages = step_by_step(make_trainer, 3, ema_decay=0.75)
    for name, average in averages[-1].items():
        if average.is_floating_point():
            expected = sum(share * state[name] for share, state in zip((27, 9, 12, 16), states, strict=True)) / 64
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


def test_moving_average_is_what_is_validated(make_trainer: MakeTrainer, splits: DataSplits) -> None:
    trainer = make_trainer(rungs=(1,), recipe=replace(RECIPE, ema_decay=0.9))
    (result,) = trainer.epochs()
    data = DeviceImages(splits.validation, splits.preprocessing, torch.device("cpu"))
    assert result.metrics["val_loss"] == pytest.approx(evaluate(trainer.student, data, 30)["loss"], rel=1e-5)


def test_step_is_no_longer_than_the_clipped_gradient(make_trainer: MakeTrainer) -> None:
    trainer, (before, after) = step_by_step(make_trainer, 1, clip_norm=0.01)
    names = [name for name, _ in trainer.student.named_parameters()]
    step = torch.cat([(after[name] - before[name]).double().flatten() for name in names])
    # The learning rate is 0.1, and the gradient of a network that has learned nothing is longer.
    assert float(step.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_limit_above_every_gradient_changes_nothing(make_trainer: MakeTrainer) -> None:
    assert trained(make_trainer(recipe=replace(RECIPE, clip_norm=1e6))) == trained(make_trainer())


def test_adapters_count_for_the_clipped_norm(make_trainer: MakeTrainer) -> None:
    hints = HintConfiguration(pairs=PAIRS[:1], classification_weight=0.0)
    recipe = Recipe(lr=1.0, momentum=0.0, weight_decay=0.0, batch_size=60, clip_norm=0.01)
    trainer = make_trainer(rungs=(1,), hints=hints, recipe=recipe)
    before = copy.deepcopy(list(trainer.student.parameters()))
    list(trainer.epochs())
    steps = [
        (ours - theirs).double().flatten() for ours, theirs in zip(trainer.student.parameters(), before, strict=True)
    ]
    # The rest of the gradient is the adapter's.
    assert 0.0001 < torch.cat(steps).norm().item() < 0.0099


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("balanced", [True, False])
def test_classes_are_weighted_and_labels_smoothed_as_the_recipe_says(
    make_trainer: MakeTrainer, splits: DataSplits, smoothing: float, balanced: bool
) -> None:
    train = splits.train.subset(np.flatnonzero((splits.train.labels < 2) | (np.arange(60) < 12)))
    recipe = Recipe(lr=0.0, batch_size=60, crop_padding=0, flip=False, label_smoothing=smoothing)
    recipe = replace(recipe, class_weights="balanced" if balanced else "none")
    changes: dict[str, Any] = {"splits": replace(splits, train=train), "recipe": recipe, "rungs": (1,)}
    trainer = make_trainer(**changes, hints=None, teacher=None)
    (result,) = trainer.epochs()
    weights = compute_class_weight("balanced", classes=np.arange(3), y=train.labels) if balanced else np.ones(3)
    (batch,) = DeviceImages(train, splits.preprocessing, torch.device("cpu")).in_order(60)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(
            trainer.student.train()(batch.images),
            batch.labels,
            torch.tensor(weights).float(),
            label_smoothing=smoothing,
        )
    assert result.metrics["loss_classification"] == pytest.approx(expected.item(), rel=1e-4)


def test_teacher_may_take_images_of_another_size(
    make_trainer: MakeTrainer, splits: DataSplits, teacher: nn.Module
) -> None:
    hints = replace(HINTS, pairs=PAIRS[1:])
    preprocessing = Preprocessing((0.2,), (0.5,), (16, 16))
    trainer = make_trainer(
        hints=hints, recipe=replace(RECIPE, batch_size=60), teacher=TeacherNetwork(teacher, preprocessing)
    )
    whole = HintedStudent(trainer.student, hints, teacher, splits.image_shape).train()
    taught = TeacherPass(teacher, whole.teacher_layers, True, (1, 16, 16), Execution())
    (batch,) = DeviceImages(splits.train, splits.preprocessing, torch.device("cpu")).in_order(60)
    pixels = torch.from_numpy(splits.train.read(np.arange(60))).float()
    larger = nn.functional.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = whole.terms(batch, taught((larger / 255 - 0.2) / 0.5)).hints
    assert trainer.normalisers == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(math.isfinite(result.metrics["train_loss"]) for result in trainer.epochs())


def test_teacher_may_take_images_of_its_own_size_only(make_trainer: MakeTrainer) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 3))
    hints = HintConfiguration(pairs=(HintPair("0", "layer1.0", "at", 1.0),), logit_weight=1.0)
    teacher = TeacherNetwork(network, Preprocessing((0.5,), (0.25,), (16, 16)))
    (result,) = make_trainer(hints=hints, teacher=teacher, rungs=(1,)).epochs()
    assert math.isfinite(result.metrics["train_loss"])


def test_student_may_take_images_of_another_size(make_trainer: MakeTrainer, splits: DataSplits) -> None:
    preprocessing = Preprocessing((0.2,), (0.5,), (4, 6))
    trainer = make_trainer(student=replace(STUDENT, preprocessing=preprocessing), rungs=(1,))
    sizes: set[tuple[int, ...]] = set()
    trainer.student.register_forward_pre_hook(lambda _module, inputs: sizes.add(tuple(inputs[0].shape[1:])))
    (result,) = trainer.epochs()
    assert sizes == {(1, 4, 6)}
    data = DeviceImages(splits.validation, preprocessing, torch.device("cpu"))
    assert result.metrics["val_loss"] == pytest.approx(evaluate(trainer.student, data, 30)["loss"], rel=1e-5)


@pytest.mark.parametrize("fold", [True, False])
def test_hint_loss_reads_the_teacher_before_it_is_folded(
    make_trainer: MakeTrainer, teacher: nn.Module, scales_loss: str, fold: bool
) -> None:
    hints = HintConfiguration(pairs=(HintPair("layer1.0", "layer1.0", scales_loss, 1.0),))
    normalisers = []
    for factor in (1.0, 3.0):
        for norm in ("bn1", "bn2"):
            nn.init.constant_(teacher.get_parameter(f"layer1.0.{norm}.weight"), factor)
        trainer = make_trainer(hints=hints, execution=Execution(fold_teacher=fold))
        normalisers.append(trainer.normalisers[0])
    assert normalisers[1] == pytest.approx(3 * normalisers[0])
