"""One student in its warm-up, step by step."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hintsearch.distill.batches import Batch
from hintsearch.distill.device_memory import Halving
from hintsearch.distill.execution import Execution
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.teacher_pass import TeacherPass
from hintsearch.distill.warmup import Warmup
from hintsearch.distill.warmup_training import WarmupTraining
from hintsearch.models.errors import InputError
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn
from torch.nn import functional

PlainNetwork = Callable[..., nn.Sequential]

IMAGE = (1, 8, 8)
RECIPE = Recipe(lr=0.05, weight_decay=1e-3)
STAGES = ("layer1.0", "layer2.0", "layer3.0")
PAIRS = tuple(HintPair(stage, stage, "at", 1.0) for stage in STAGES)
LABELS = torch.arange(60) % 3


def residual_student() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_model(ModelSpec("resnet8", 3, 1, width=0.25))


class Course:
    """A student, its teacher and its warm-up."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        warmup: Warmup,
        recipe: Recipe = RECIPE,
        pairs: tuple[HintPair, ...] = PAIRS,
        execution: Execution | None = None,
    ) -> None:
        execution = execution or Execution()
        hints = HintConfiguration(pairs=pairs, warmup=warmup)
        self.student = student
        self.halving = Halving("the warm-up", execution.place, fewest=2)
        self.training = WarmupTraining(
            student, hints, 5, teacher, IMAGE, IMAGE, recipe, execution, LABELS, self.halving
        )
        self._teacher = TeacherPass(teacher, self.training.teacher_layers, False, IMAGE, execution)

    def step(self, batch: Batch) -> float:
        return float(self.training.step(batch, self._teacher(batch.teacher_images)))

    def epoch(self, number: int, batches: list[Batch]) -> tuple[int, list[float]]:
        """The depth of the epoch's hint point, and the losses."""
        return self.training.begin_epoch(number), [self.step(batch) for batch in batches]

    def parameters(self) -> dict[str, Tensor]:
        """A copy of the student's."""
        return {name: parameter.detach().clone() for name, parameter in self.student.named_parameters()}


def parts_that_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The first segments of the paths of the parameters that changed; in one part either all do or none."""
    changes = defaultdict(set)
    for name, value in after.items():
        changes[name.split(".")[0]].add(not torch.equal(value, before[name]))
    assert all(len(found) == 1 for found in changes.values())
    return {part for part, found in changes.items() if found == {True}}


@pytest.mark.parametrize("loss", ["strongest_channels", "fitnet"])
@pytest.mark.parametrize("order", ["shallow_to_deep", "deep_to_shallow"])
def test_in_a_lesson_exactly_the_parameters_up_to_its_layer_change(
    teacher: nn.Module, batches: list[Batch], order: str, loss: str
) -> None:
    course = Course(residual_student(), teacher, Warmup(loss=loss, epochs=(1,), order=order))
    found = []
    for epoch in (1, 2, 3):
        before = course.parameters()
        depth, _ = course.epoch(epoch, batches)
        found.append((depth, parts_that_changed(before, course.parameters())))
    stem = {"conv1", "bn1"}
    reached = [(1, stem | {"layer1"}), (2, stem | {"layer1", "layer2"}), (3, stem | {"layer1", "layer2", "layer3"})]
    assert found == (reached if order == "shallow_to_deep" else reached[::-1])


@pytest.mark.parametrize("order", ["shallow_to_deep", "deep_to_shallow"])
def test_loss_of_each_lesson_falls(teacher: nn.Module, batches: list[Batch], order: str) -> None:
    course = Course(residual_student(), teacher, Warmup(epochs=(4,), order=order))
    losses = defaultdict(list)
    for epoch in range(1, 13):
        depth, found = course.epoch(epoch, batches)
        losses[depth].append(sum(found) / len(found))
    for depth in (1, 2, 3):
        assert losses[depth][-1] < 0.9 * losses[depth][0]


@pytest.mark.parametrize(
    ("order", "depths"), [("shallow_to_deep", [1, 1, 2, 3, 3, 3]), ("deep_to_shallow", [3, 3, 3, 2, 1, 1])]
)
def test_each_lesson_has_its_epochs(teacher: nn.Module, order: str, depths: list[int]) -> None:
    training = Course(residual_student(), teacher, Warmup(epochs=(2, 1, 3), order=order)).training
    assert training.epochs == 6
    assert [training.begin_epoch(epoch) for epoch in range(1, 7)] == depths


def squared_error_by_hand(student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """Between the first convolutions: the teacher's four filters with the largest L1 norm of six, in their order."""
    theirs = functional.conv2d(
        images, teacher.get_parameter("conv1.weight"), teacher.get_parameter("conv1.bias"), padding=1
    )
    norms = teacher.get_parameter("conv1.weight").detach().abs().sum((1, 2, 3)).tolist()
    strongest = sorted(sorted(range(6), key=lambda channel: norms[channel])[2:])
    ours = functional.conv2d(
        images, student.get_parameter("conv1.weight"), student.get_parameter("conv1.bias"), padding=1
    )
    return (ours - theirs[:, strongest].detach()).square().mean()


@pytest.mark.parametrize(("lr", "used"), [(None, 0.05), (0.2, 0.2)])
def test_steps_are_those_of_sgd_by_hand_at_a_constant_learning_rate(
    plain_network: PlainNetwork, batches: list[Batch], lr: float | None, used: float
) -> None:
    teacher, by_hand = plain_network(6, seed=1), plain_network(4)
    pairs = (HintPair("conv1", "conv1", "at", 1.0),)
    course = Course(plain_network(4), teacher, Warmup(base_epochs=1, lr=lr), RECIPE, pairs)
    weights = [by_hand.get_parameter("conv1.weight"), by_hand.get_parameter("conv1.bias")]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for epoch in (1, 2):
        _, losses = course.epoch(epoch, batches)
        for batch, found in zip(batches, losses, strict=True):
            loss = squared_error_by_hand(by_hand, teacher, batch.images)
            assert found == pytest.approx(loss.item(), rel=1e-4)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
                    decayed = gradient + 1e-3 * weight
                    velocity.mul_(0.9).add_(decayed)
                    weight.sub_(used * (decayed + 0.9 * velocity))
    for name, weight in by_hand.named_parameters():
        torch.testing.assert_close(course.student.get_parameter(name), weight, rtol=1e-3, atol=1e-5)


def test_a_lesson_begins_without_the_momentum_of_the_one_before(teacher: nn.Module, batches: list[Batch]) -> None:
    # The second epoch of one course is the first of another, from the same weights.
    pairs = PAIRS[:2]
    going_on = Course(residual_student(), teacher, Warmup(epochs=(1,)), pairs=pairs)
    going_on.epoch(1, batches)
    fresh = Course(residual_student(), teacher, Warmup(epochs=(1,)), pairs=pairs[1:])
    fresh.student.load_state_dict(going_on.student.state_dict())
    going_on.epoch(2, batches)
    fresh.epoch(1, batches)
    assert all(torch.equal(value, fresh.parameters()[name]) for name, value in going_on.parameters().items())


@pytest.mark.parametrize("lesson", [1, 2])
def test_step_is_no_longer_than_the_clipped_gradient_of_its_own_lesson(
    teacher: nn.Module, batches: list[Batch], lesson: int
) -> None:
    recipe = Recipe(lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=1e-3)
    course = Course(residual_student(), teacher, Warmup(loss="fitnet", epochs=(1,)), recipe)
    whole = course.training._whole
    for epoch in range(1, lesson):
        course.epoch(epoch, batches)
        # What the last step of the lesson before left behind, made long.
        for parameter in whole.hint_terms[epoch - 1].parameters():
            parameter.grad = torch.full_like(parameter, 1e6)
    course.training.begin_epoch(lesson)
    before = [parameter.detach().clone() for parameter in whole.parameters()]
    course.step(batches[0])
    moved = [(now - then).double().flatten() for now, then in zip(whole.parameters(), before, strict=True)]
    assert float(torch.cat(moved).norm().detach()) == pytest.approx(1e-3, rel=1e-3)


def test_adapters_of_a_warmup_learn_with_the_student(teacher: nn.Module, batches: list[Batch]) -> None:
    course = Course(residual_student(), teacher, Warmup(loss="fitnet", epochs=(1,)))
    adapters = [term.loss.get_parameter("regressor.weight") for term in course.training._whole.hint_terms]
    for epoch, learning in enumerate(adapters, start=1):
        before = [adapter.detach().clone() for adapter in adapters]
        course.epoch(epoch, batches)
        changed = [not torch.equal(adapter, was) for adapter, was in zip(adapters, before, strict=True)]
        assert changed == [adapter is learning for adapter in adapters]


def test_building_a_warmup_leaves_the_global_generator_as_it_was(teacher: nn.Module) -> None:
    student, before = residual_student(), torch.get_rng_state()
    Course(student, teacher, Warmup(loss="fitnet"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("loss", ["fsp", "reviewkd"])
def test_loss_of_all_pairs_together_is_refused(teacher: nn.Module, loss: str) -> None:
    with pytest.raises(InputError) as caught:
        Course(residual_student(), teacher, Warmup(loss=loss))
    assert str(caught.value) == (
        f"warmup.loss is {loss!r}, which is of all hint pairs together, but a warm-up learns one after the other; "
        "choose another"
    )


def test_unknown_loss_is_an_error_with_the_nearest_name(teacher: nn.Module) -> None:
    with pytest.raises(InputError, match="unknown hint loss 'fitnt'; did you mean 'fitnet'"):
        Course(residual_student(), teacher, Warmup(loss="fitnt"))


def test_close_gives_the_student_back_without_taps_and_gradients(teacher: nn.Module, batches: list[Batch]) -> None:
    course = Course(residual_student(), teacher, Warmup())
    course.epoch(1, batches)
    course.training.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in course.student.modules())
    assert all(parameter.grad is None for parameter in course.student.parameters())
    assert course.student.get_submodule("relu").inplace


def test_warmup_in_bf16_is_near_the_one_in_float32(teacher: nn.Module, batches: list[Batch]) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        course = Course(residual_student(), teacher, Warmup(), execution=Execution(precision=precision))
        losses.append(course.epoch(1, batches)[1])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_recipe_with_adam_has_adam_in_the_warmup_too(teacher: nn.Module, batches: list[Batch]) -> None:
    recipe = replace(RECIPE, optimizer="adam", lr=1e-3, weight_decay=0.0)
    course = Course(residual_student(), teacher, Warmup(), recipe)
    before = course.parameters()
    course.epoch(1, batches[:1])
    # Adam's first step is the learning rate in each direction.
    moved = course.parameters()["conv1.weight"] - before["conv1.weight"]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-3), rtol=1e-2, atol=0)
