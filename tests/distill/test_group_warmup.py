"""Trainings that begin with a warm-up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hintsearch.distill import trainer as trainer_module
from hintsearch.distill.batches import Batch
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration
from hintsearch.distill.stepping import NonFiniteLossError
from hintsearch.distill.student_training import StudentTraining
from hintsearch.distill.teacher_pass import TeacherOutputs
from hintsearch.distill.trainer import GroupTrainer, Seeds, TaughtStudent, TeacherNetwork, Trainer
from hintsearch.distill.warmup import Warmup
from hintsearch.distill.warmup_training import WarmupTraining
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from small_training import HINTS, PAIRS, RECIPE, STUDENT, figures, trained
from torch import Tensor, nn

WARM = replace(HINTS, warmup=Warmup(epochs=(1, 2)))
STEPS = 4

MakeTrainer = Callable[..., Trainer]
MakeGroup = Callable[..., GroupTrainer]


@pytest.fixture
def make_trainer(splits: DataSplits, teacher: nn.Module) -> MakeTrainer:
    """Makes trainers of the small student, by default with a warm-up of 1 and 2 epochs before one rung of two."""

    def make(hints: HintConfiguration = WARM, **changes: Any) -> Trainer:
        arguments: dict[str, Any] = {"rungs": (2,), "recipe": RECIPE, "seeds": Seeds(1, 2)} | changes
        return Trainer(STUDENT, splits, hints=hints, teacher=TeacherNetwork(teacher), **arguments)

    return make


@pytest.fixture
def make_group(splits: DataSplits, teacher: nn.Module) -> MakeGroup:
    """Makes groups of one rung of one epoch, the init seeds from 2 on."""

    def make(configurations: list[HintConfiguration], **changes: Any) -> GroupTrainer:
        students = [TaughtStudent(hints, seed) for seed, hints in enumerate(configurations, start=2)]
        return GroupTrainer(STUDENT, splits, RECIPE, (1,), students, 1, teacher=TeacherNetwork(teacher), **changes)

    return make


def parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def group_trained(group: GroupTrainer) -> list[tuple[list[dict[str, float]], str]]:
    of_students = list(zip(*group.epochs(), strict=True))
    return [
        (figures(results), weights_sha256(network.state_dict()))
        for results, network in zip(of_students, group.networks, strict=True)
    ]


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[float]]]:
    """Of each epoch of a warm-up, as it happens: the depth of its hint point, and its losses."""
    seen: list[tuple[int, list[float]]] = []
    begin, step = WarmupTraining.begin_epoch, WarmupTraining.step

    def noted_begin(self: WarmupTraining, epoch: int) -> int:
        seen.append((begin(self, epoch), []))
        return seen[-1][0]

    def noted_step(self: WarmupTraining, batch: Batch, taught: TeacherOutputs) -> Tensor:
        loss = step(self, batch, taught)
        seen[-1][1].append(float(loss))
        return loss

    monkeypatch.setattr(WarmupTraining, "begin_epoch", noted_begin)
    monkeypatch.setattr(WarmupTraining, "step", noted_step)
    return seen


@pytest.mark.parametrize(("order", "depths"), [("shallow_to_deep", [1, 2, 2]), ("deep_to_shallow", [2, 2, 1])])
def test_each_lesson_has_its_epochs_and_tells_the_mean_loss_of_its_last(
    make_trainer: MakeTrainer, lessons: list[tuple[int, list[float]]], order: str, depths: list[int]
) -> None:
    hints = replace(HINTS, warmup=Warmup(epochs=(1, 2), order=order))
    result = next(make_trainer(hints, rungs=(1,)).epochs())
    assert [(depth, len(losses)) for depth, losses in lessons] == [(depth, STEPS) for depth in depths]
    means = {depth: sum(losses) / STEPS for depth, losses in lessons}
    assert result.metrics["warmup_loss_1"] == pytest.approx(means[1], rel=1e-6)
    assert result.metrics["warmup_loss_2"] == pytest.approx(means[2], rel=1e-6)


def test_epochs_of_the_warmup_have_another_order_than_those_of_the_main_stage(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: dict[type, list[int]] = {WarmupTraining: [], StudentTraining: []}
    for kind in orders:

        def noted(self: Any, batch: Batch, *rest: Any, kind: type = kind, step: Any = kind.step) -> Tensor:
            orders[kind] += batch.indices.tolist()
            result: Tensor = step(self, batch, *rest)
            return result

        monkeypatch.setattr(kind, "step", noted)
    list(make_trainer(replace(HINTS, pairs=PAIRS[:1], warmup=Warmup(epochs=(1,))), rungs=(1,)).epochs())
    warmup, main = orders.values()
    assert sorted(warmup) == sorted(main) == list(range(60))
    assert warmup != main


def test_figures_of_the_warmup_are_in_epoch_one_only(make_trainer: MakeTrainer) -> None:
    first, second = make_trainer().epochs()
    own = ["warmup_loss_1", "warmup_loss_2", "warmup_seconds"]
    assert [name for name in first.metrics if name.startswith("warmup")] == own
    assert not any(name.startswith("warmup") for name in second.metrics)
    assert all(type(first.metrics[name]) is float and first.metrics[name] > 0 for name in own)
    assert (first.epoch, second.epoch) == (1, 2)


def test_training_without_a_warmup_tells_nothing_of_one(make_trainer: MakeTrainer) -> None:
    assert not any("warmup" in name for result in make_trainer(HINTS).epochs() for name in result.metrics)


def test_main_stage_is_the_training_that_starts_from_the_warmed_up_weights(make_trainer: MakeTrainer) -> None:
    # In the main stage of the first one nothing moves, so it gives the weights after the warm-up.
    hints = replace(WARM, warmup=Warmup(epochs=(1, 2), lr=RECIPE.lr), normalise=False)
    still = make_trainer(hints, recipe=replace(RECIPE, lr=0.0), rungs=(1,))
    initial = parameters(still.student)
    list(still.epochs())
    warmed_up = parameters(still.student)
    assert not torch.equal(warmed_up["conv1.weight"], initial["conv1.weight"])

    at_once = make_trainer(hints)
    after = make_trainer(replace(hints, warmup=None), start={**still.student.state_dict()})
    list(at_once.epochs())
    list(after.epochs())
    assert_same(parameters(at_once.student), parameters(after.student))


def test_normalisers_are_those_of_the_student_before_any_warmup(make_trainer: MakeTrainer) -> None:
    warm, cold = make_trainer(), make_trainer(HINTS)
    assert warm.normalisers == cold.normalisers
    list(warm.epochs())
    assert warm.normalisers == cold.normalisers


def curricula() -> list[HintConfiguration]:
    """Of different length, order and loss, and none."""
    return [
        replace(HINTS, warmup=Warmup(epochs=(1,))),
        replace(HINTS, warmup=Warmup(loss="fitnet", epochs=(1, 2), order="deep_to_shallow")),
        replace(HINTS, pairs=PAIRS[:1], warmup=Warmup(epochs=(1,))),
        HINTS,
    ]


def test_each_student_of_a_group_is_warmed_up_as_it_would_be_alone(
    make_group: MakeGroup, make_trainer: MakeTrainer
) -> None:
    alone = [
        trained(make_trainer(hints, rungs=(1,), seeds=Seeds(1, 2 + number))) for number, hints in enumerate(curricula())
    ]
    for side_by_side in (1, 2):
        assert group_trained(make_group(curricula(), side_by_side=side_by_side)) == alone


def test_students_whose_warmup_draws_random_numbers_are_the_same_side_by_side(make_group: MakeGroup) -> None:
    drawing = [replace(HINTS, warmup=Warmup(loss="crd", epochs=(1,)))] * 2
    assert group_trained(make_group(drawing, side_by_side=2)) == group_trained(make_group(drawing))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_run_is_the_undisturbed_one_and_has_no_second_warmup(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = replace(RECIPE, ema_decay=0.9, optimizer=optimizer, lr=0.01)
    expected = trained(make_trainer(recipe=recipe))
    interrupted = make_trainer(recipe=recipe)
    before = [next(interrupted.epochs())]
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")

    def again(*_arguments: object) -> None:
        raise AssertionError("a second warm-up")

    resumed = make_trainer(recipe=recipe)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    monkeypatch.setattr(trainer_module, "warm_up", again)
    after, weights = trained(resumed)
    assert (figures(before) + after, weights) == expected
    assert resumed.normalisers == interrupted.normalisers


def test_moving_average_begins_with_the_warmed_up_weights(make_trainer: MakeTrainer) -> None:
    # In the main stage nothing moves, so whatever follows the weights has to be there already.
    still = replace(RECIPE, lr=0.0)
    hints = replace(HINTS, warmup=Warmup(epochs=(1,), lr=0.1))
    plain, averaged = (make_trainer(hints, recipe=replace(still, ema_decay=decay), rungs=(1,)) for decay in (0.0, 0.9))
    list(plain.epochs())
    list(averaged.epochs())
    assert_same(parameters(averaged.student), parameters(plain.student))


@pytest.mark.parametrize(
    "hints",
    [
        HintConfiguration(),
        HintConfiguration(logit_weight=0.5),
        HintConfiguration(embedding_weight=1.0, classification_weight=0.0),
    ],
    ids=["labels", "logits", "embedding"],
)
def test_pairs_of_weight_zero_are_learned_in_the_warmup(make_trainer: MakeTrainer, hints: HintConfiguration) -> None:
    off = tuple(replace(pair, weight=0.0) for pair in PAIRS)
    with_pairs = replace(hints, pairs=off)
    results, weights = trained(make_trainer(replace(with_pairs, warmup=WARM.warmup), rungs=(1,)))
    assert {"warmup_loss_1", "warmup_loss_2"} <= results[0].keys()
    assert weights != trained(make_trainer(with_pairs, rungs=(1,)))[1]


def test_loss_that_is_not_finite_is_an_error_naming_the_hint_point(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(replace(HINTS, warmup=Warmup(epochs=(1,), lr=1e30)))
    with pytest.raises(NonFiniteLossError) as caught:
        list(trainer.epochs())
    assert str(caught.value) in {
        f"the warm-up's loss of hint point 1 is {value}; lower warmup.lr, or set recipe.clip_norm"
        for value in ("nan", "inf")
    }
    assert trainer.epoch == 0


def test_loss_of_all_pairs_together_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(replace(HINTS, warmup=Warmup(loss="fsp")))
    with pytest.raises(InputError, match=r"warmup\.loss is 'fsp', which is of all hint pairs together"):
        next(trainer.epochs())


def test_warmup_without_a_teacher_is_an_error(splits: DataSplits) -> None:
    off = tuple(replace(pair, weight=0.0) for pair in PAIRS)
    with pytest.raises(InputError, match="but there is no teacher"):
        Trainer(STUDENT, splits, RECIPE, (1,), Seeds(), hints=HintConfiguration(pairs=off, warmup=Warmup()))


def test_warmup_runs_in_bf16(make_trainer: MakeTrainer) -> None:
    exact, rounded = (
        figures(make_trainer(rungs=(1,), execution=Execution(precision=precision)).epochs())[0]
        for precision in ("fp32", "bf16")
    )
    assert exact != rounded
    for name in ("warmup_loss_1", "warmup_loss_2"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.2)


def test_taps_of_the_warmup_are_taken_off_the_student(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(HintConfiguration(pairs=PAIRS[:1], warmup=Warmup(epochs=(1,))))
    next(trainer.epochs())
    hooked = [name for name, module in trainer.student.named_modules() if module._forward_hooks]
    assert hooked == []
    assert trainer.student.get_submodule("relu").inplace


def test_teacher_is_left_as_it_was(make_trainer: MakeTrainer, teacher: nn.Module) -> None:
    before = weights_sha256(teacher.state_dict())
    next(make_trainer().epochs())
    assert weights_sha256(teacher.state_dict()) == before
    assert all(module.training and not module._forward_hooks for module in teacher.modules())
