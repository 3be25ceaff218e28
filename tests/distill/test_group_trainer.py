"""Several students on one stream of batches, each trained exactly as it would be alone."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from full_files import no_file_larger_than
from hintsearch.distill.data import DataSplits
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.losses import HINT_LOSSES
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import (
    EpochResult,
    GroupTrainer,
    NonFiniteLossError,
    Seeds,
    TaughtStudent,
    TeacherNetwork,
    Trainer,
)
from hintsearch.models.files import FULL_DISK
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

RECIPE = Recipe(lr=0.1, batch_size=16, crop_padding=1)
DATA_SEED = 1

FACTORIES = """
import torch
from torch import nn


def dropping(*, num_classes, in_channels):
    conv = nn.Sequential(nn.Conv2d(in_channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    return nn.Sequential(conv, nn.Dropout(0.3), nn.Flatten(), nn.Linear(54, num_classes))


class Breaking(nn.Module):
    '''Gives no numbers from some training step on; which one, its initial seed tells.'''

    STEPS = {13: 6, 14: 7}

    def __init__(self, inputs, classes):
        super().__init__()
        self.linear, self.step, self.seed = nn.Linear(inputs, classes), 0, torch.initial_seed()

    def forward(self, x):
        self.step += self.training
        logits = self.linear(x.flatten(1))
        return logits * float("nan") if self.step >= self.STEPS.get(self.seed, 99) else logits


def breaking(*, num_classes, in_channels):
    return Breaking(64 * in_channels, num_classes)
"""

RESNET = ModelSpec("resnet8", 3, 1, width=0.25)


def pairs(layer: str, *losses: str) -> tuple[HintPair, ...]:
    """The same teacher layers for every student."""
    points = [("layer1.0", layer), ("layer3.0", layer)]
    return tuple(HintPair(theirs, ours, loss, 0.5) for loss in losses for theirs, ours in points)


def four_students(layer: str) -> list[TaughtStudent]:
    """Two seeds, other weights on the same hint points, and one that reads less of the teacher."""
    hints = HintConfiguration(pairs=pairs(layer, "fitnet"), logit_weight=0.4)
    heavier = tuple(replace(pair, weight=3 * pair.weight) for pair in hints.pairs)
    return [
        TaughtStudent(hints, 2),
        TaughtStudent(hints, 3),
        TaughtStudent(replace(hints, pairs=heavier, logit_weight=0.1), 2),
        TaughtStudent(HintConfiguration(pairs=hints.pairs[:1]), 2),
    ]


@pytest.fixture
def networks(tmp_path: Path) -> Callable[[str], ModelSpec]:
    """The students of `FACTORIES`, and `resnet8`."""
    path = tmp_path / "networks.py"
    path.write_text(FACTORIES)
    return lambda name: RESNET if name == "resnet8" else ModelSpec(f"{path}:{name}", 3, 1)


@pytest.fixture
def make_group(splits: DataSplits, teacher: nn.Module) -> Callable[..., GroupTrainer]:
    """Makes groups, by default of four small resnets over two epochs."""

    def make(**changes: Any) -> GroupTrainer:
        arguments: dict[str, Any] = {
            "student": RESNET,
            "splits": splits,
            "recipe": RECIPE,
            "rungs": (2,),
            "students": four_students("layer1.0"),
            "data_seed": DATA_SEED,
            "teacher": TeacherNetwork(teacher),
        }
        return GroupTrainer(**(arguments | changes))

    return make


def figures(results: list[EpochResult]) -> list[dict[str, float]]:
    """All metrics but the speed, which no two runs share."""
    return [{**result.metrics, "images_per_second": 0.0, "epoch": result.epoch} for result in results]


def trained(group: GroupTrainer) -> list[tuple[list[dict[str, float]], str]]:
    """For each student the figures of all epochs and the hash of the trained weights."""
    of_students = list(zip(*group.epochs(), strict=True))
    return [
        (figures(list(results)), weights_sha256(network.state_dict()))
        for results, network in zip(of_students, group.networks, strict=True)
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("network", "layer"), [("resnet8", "layer1.0"), ("dropping", "0")])
def test_each_student_of_a_group_is_trained_as_it_would_be_alone(
    make_group: Callable[..., GroupTrainer],
    networks: Callable[[str], ModelSpec],
    splits: DataSplits,
    teacher: nn.Module,
    network: str,
    layer: str,
    precision: str,
) -> None:
    students, execution = four_students(layer), Execution(precision=precision)
    spec, recipe = networks(network), replace(RECIPE, ema_decay=0.9, clip_norm=1.0)
    group = make_group(student=spec, recipe=recipe, students=students, execution=execution)
    together = trained(group)
    for number, one in enumerate(students):
        alone = Trainer(
            spec,
            splits,
            recipe,
            (2,),
            Seeds(DATA_SEED, one.init_seed),
            hints=one.hints,
            teacher=TeacherNetwork(teacher),
            execution=execution,
        )
        found = figures(list(alone.epochs())), weights_sha256(alone.student.state_dict())
        assert together[number] == found
        assert group.normalisers[number] == alone.normalisers
    assert len({weights for _, weights in together}) == len(students)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("side_by_side", [2, 9])
@pytest.mark.parametrize(("network", "layer"), [("resnet8", "layer1.0"), ("dropping", "0")])
def test_students_side_by_side_are_trained_as_one_after_the_other(
    make_group: Callable[..., GroupTrainer],
    networks: Callable[[str], ModelSpec],
    network: str,
    layer: str,
    side_by_side: int,
    precision: str,
) -> None:
    changes: dict[str, Any] = {"student": networks(network), "students": four_students(layer), "rungs": (1,)}
    changes["execution"] = Execution(precision=precision)
    assert trained(make_group(**changes, side_by_side=side_by_side)) == trained(make_group(**changes))


def test_each_init_seed_has_dropout_of_its_own(
    make_group: Callable[..., GroupTrainer], networks: Callable[[str], ModelSpec]
) -> None:
    start = make_group(student=networks("dropping"), students=[TaughtStudent(HintConfiguration(), 1)]).networks[0]
    students = [TaughtStudent(HintConfiguration(), seed) for seed in (1, 2, 1)]
    group = make_group(student=networks("dropping"), students=students, start=start.state_dict(), rungs=(1,))
    first, second, third = (figures([result]) for result in next(group.epochs()))
    assert first == third != second


def test_normalisers_do_not_depend_on_the_global_generator(
    make_group: Callable[..., GroupTrainer], networks: Callable[[str], ModelSpec]
) -> None:
    found = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(make_group(student=networks("dropping"), students=four_students("1")).normalisers)
    assert found[0] == found[1]


def test_student_without_a_teacher_may_be_of_a_group(make_group: Callable[..., GroupTrainer]) -> None:
    unaided = TaughtStudent(HintConfiguration(), 2)
    alone = make_group(students=[unaided], teacher=None)
    assert trained(make_group(students=[*four_students("layer1.0")[:1], unaided]))[1] == trained(alone)[0]


def test_group_resumes_exactly(
    make_group: Callable[..., GroupTrainer], networks: Callable[[str], ModelSpec], tmp_path: Path
) -> None:
    changes = {"student": networks("dropping"), "students": four_students("0"), "rungs": (1, 3)}
    changes["recipe"] = replace(RECIPE, ema_decay=0.9)
    expected = trained(make_group(**changes))
    interrupted = make_group(**changes)
    before = next(interrupted.epochs())
    interrupted.save_checkpoint(tmp_path / "checkpoint.pt")
    resumed = make_group(**changes)
    resumed.load_checkpoint(tmp_path / "checkpoint.pt")
    after = trained(resumed)
    for first, (rest, weights), whole in zip(before, after, expected, strict=True):
        assert (figures([first]) + rest, weights) == whole


def test_checkpoint_that_finds_no_room_says_so_and_leaves_the_older_one(
    make_group: Callable[..., GroupTrainer], tmp_path: Path
) -> None:
    trainer, path = make_group(), tmp_path / "checkpoint.pt"
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    with no_file_larger_than(1 << 10), pytest.raises(OSError, match="too large") as raised:
        trainer.save_checkpoint(path)
    assert raised.value.errno in FULL_DISK
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class CountingTeacher(nn.Module):
    """Says how many images it was shown in each pass; all copies of it together."""

    shown: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        CountingTeacher.shown.append(len(x))
        logits: Tensor = self.fc(self.conv(x).mean((2, 3)))
        return logits


@pytest.fixture
def shown() -> Iterator[list[int]]:
    """Images a pass of `CountingTeacher`."""
    CountingTeacher.shown.clear()
    yield CountingTeacher.shown
    CountingTeacher.shown.clear()


def test_teacher_runs_once_a_batch_for_all(make_group: Callable[..., GroupTrainer], shown: list[int]) -> None:
    point = (HintPair("conv", "layer1.0", "at", 1.0),)
    students = [TaughtStudent(HintConfiguration(pairs=point, logit_weight=0.5), seed) for seed in (1, 2, 3)]
    group = make_group(students=students, teacher=TeacherNetwork(CountingTeacher()), rungs=(1,))
    # The normalisers of all students are measured on the same passes, of all 60 images here.
    assert sum(1 for count in shown if count > 1) == 4
    shown.clear()
    list(group.epochs())
    assert shown == [16, 16, 16, 12]


def test_teacher_does_not_run_where_nothing_is_read_of_it(
    make_group: Callable[..., GroupTrainer], shown: list[int]
) -> None:
    students = [TaughtStudent(HintConfiguration(), seed) for seed in (1, 2)]
    list(make_group(students=students, teacher=TeacherNetwork(CountingTeacher()), rungs=(1,)).epochs())
    assert shown == []


def error_of(group: GroupTrainer) -> str:
    with pytest.raises(NonFiniteLossError) as caught:
        list(group.epochs())
    return str(caught.value)


def test_loss_that_is_not_finite_is_an_error_naming_its_first_step(
    make_group: Callable[..., GroupTrainer], networks: Callable[[str], ModelSpec]
) -> None:
    students = [TaughtStudent(HintConfiguration(), seed) for seed in (12, 14, 13)]
    group = make_group(student=networks("breaking"), students=students, teacher=None)
    # The sixth step is the second of epoch 2: 5 of 8 steps along the cosine from 0.1, 0.1·(1 + cos(5π/8))/2.
    assert error_of(group) == (
        "the loss of the student with init_seed 13 is nan in step 2 of 4 of epoch 2 (classification nan, logit 0, "
        "hint 0) at a learning rate of 0.03087; lower lr or the weights, or set recipe.clip_norm"
    )
    assert group.epoch == 1


def test_loss_of_a_single_student_that_is_not_finite_needs_no_seed(
    make_group: Callable[..., GroupTrainer], networks: Callable[[str], ModelSpec]
) -> None:
    students = [TaughtStudent(HintConfiguration(), 14)]
    group = make_group(student=networks("breaking"), students=students, teacher=None)
    assert error_of(group).startswith("the loss is nan in step 3 of 4 of epoch 2 (classification nan, ")


def test_term_that_is_not_finite_is_seen_in_the_error(
    make_group: Callable[..., GroupTrainer], shown: list[int]
) -> None:
    teacher = CountingTeacher()
    nn.init.constant_(teacher.fc.bias, float("inf"))
    students = [TaughtStudent(HintConfiguration(logit_weight=1.0), 1)]
    message = error_of(make_group(students=students, teacher=TeacherNetwork(teacher), rungs=(1,)))
    assert message.startswith("the loss is nan in step 1 of 4 of epoch 1 (classification 1")
    assert "logit nan, hint 0) at a learning rate of 0.1; " in message


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose result's size or value the host has to know."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, name
        assert not (name.startswith("index") and _has_mask(args)), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


class CountedMoves(TorchFunctionMode):
    """Fails where values are given to Python; counts what goes from one device to another, if there are two."""

    READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
    MOVING = ("tensor", "as_tensor", "from_numpy", "cuda")

    def __init__(self) -> None:
        super().__init__()
        self.moves: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.READING, name
        wants = [*args[1:], *(kwargs or {}).values()]
        if name in self.MOVING or (name == "to" and any(isinstance(want, str | torch.device) for want in wants)):
            self.moves[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: bool(tensor.sum() > 0),
        lambda tensor: float(tensor.sum()),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
    ],
    ids=["item", "tolist", "bool", "float", "cpu", "numpy", "nonzero", "mask"],
)
def test_waiting_is_found(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError), NoWaiting(), CountedMoves():
        wait(torch.ones(3))


@pytest.fixture
def make_demanding(make_group: Callable[..., GroupTrainer]) -> Callable[..., GroupTrainer]:
    """Makes groups of two students with every hint loss, and all that a recipe may have."""
    hints = HintConfiguration(pairs=pairs("layer1.0", *HINT_LOSSES.names()), logit_weight=0.4)
    recipe = replace(RECIPE, ema_decay=0.9, clip_norm=1.0, label_smoothing=0.1, class_weights="balanced")
    students = [TaughtStudent(hints, 1), TaughtStudent(hints, 2)]

    def make(precision: str = "fp32", **changes: Any) -> GroupTrainer:
        execution = Execution(precision=precision)
        return make_group(recipe=replace(recipe, **changes), students=students, execution=execution)

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("augmentation", [{}, {"min_crop_area": 0.3}, {"crop_padding": 0, "flip": False}])
def test_nothing_waits_for_the_device_within_an_epoch(
    make_demanding: Callable[..., GroupTrainer], precision: str, augmentation: dict[str, Any]
) -> None:
    group = make_demanding(precision, **augmentation)
    with NoWaiting(), CountedMoves():
        history = group._train_epoch(1)
    assert history.shape == (2, 4, 4)
    assert history.isfinite().all()


def test_an_epoch_of_more_steps_moves_no_more_to_the_device(make_demanding: Callable[..., GroupTrainer]) -> None:
    moves = []
    for batch_size in (30, 6):
        # Clipping asks torch's own code to move what is there already.
        group = make_demanding(batch_size=batch_size, clip_norm=None)
        with CountedMoves() as counted:
            group._train_epoch(1)
        moves.append(counted.moves)
    assert moves[0] == moves[1]
    assert moves[0].keys() == {"to"}
