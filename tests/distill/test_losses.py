import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill.losses import HINT_LOSSES, LOGIT_LOSSES, FeatureShape, HintLoss, kd, same_size
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]

# Student and teacher features [B, C, H, W]: alike, other channels, other sizes.
SHAPES = [
    ((4, 3, 6, 6), (4, 3, 6, 6)),
    ((4, 3, 6, 6), (4, 5, 6, 6)),
    ((4, 3, 6, 6), (4, 5, 3, 2)),
    ((4, 3, 2, 3), (4, 5, 6, 6)),
]


def features(shape: tuple[int, ...], seed: int) -> Array:
    values: Array = np.random.default_rng(seed).normal(size=shape)
    return values


def make_loss(name: str, student: Array, teacher: Array) -> HintLoss:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = HINT_LOSSES.get(name)(FeatureShape(*student.shape[1:]), FeatureShape(*teacher.shape[1:]))
    return loss.double()


def value(loss: HintLoss, student: Array, teacher: Array) -> float:
    result = loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert result.shape == ()
    return float(result.detach())


def pooled(feature: Array, height: int, width: int) -> Array:
    """Means over blocks; the size of the map is a multiple of the wanted one."""
    batch, channels, rows, columns = feature.shape
    blocks = feature.reshape(batch, channels, height, rows // height, width, columns // width)
    means: Array = blocks.mean(axis=(3, 5))
    return means


def to_smaller_map(student: Array, teacher: Array) -> tuple[Array, Array]:
    size = min(student.shape[2:], teacher.shape[2:], key=lambda shape: shape[0] * shape[1])
    return pooled(student, *size), pooled(teacher, *size)


def golden_fitnet(loss: HintLoss, student: Array, teacher: Array) -> float:
    regressor = loss.get_submodule("regressor")
    assert isinstance(regressor, nn.Conv2d)
    assert regressor.bias is not None
    student, teacher = to_smaller_map(student, teacher)
    weight, bias = regressor.weight.detach().numpy()[:, :, 0, 0], regressor.bias.detach().numpy()
    guess = np.einsum("ts,bshw->bthw", weight, student) + bias[:, None, None]
    return float(((guess - teacher) ** 2).mean())


def golden_at(_loss: HintLoss, student: Array, teacher: Array) -> float:
    maps = []
    for feature in to_smaller_map(student, teacher):
        energy = (feature**2).mean(axis=1).reshape(len(feature), -1)
        maps.append(energy / np.sqrt((energy**2).sum(axis=1, keepdims=True)))
    return float(((maps[0] - maps[1]) ** 2).mean())


def golden_sp(_loss: HintLoss, student: Array, teacher: Array) -> float:
    grams = []
    for feature in (student, teacher):
        flat = feature.reshape(len(feature), -1)
        gram = flat @ flat.T
        grams.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
    return float(np.linalg.norm(grams[0] - grams[1], "fro") ** 2 / len(student) ** 2)


GOLDEN: dict[str, Callable[[HintLoss, Array, Array], float]] = {
    "fitnet": golden_fitnet,
    "at": golden_at,
    "sp": golden_sp,
}


def test_every_hint_loss_has_a_golden_value() -> None:
    assert set(HINT_LOSSES.names()) == set(GOLDEN)


@pytest.mark.parametrize("shapes", SHAPES, ids=["alike", "channels", "larger student", "larger teacher"])
@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_is_its_formula(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    student, teacher = features(shapes[0], 1), features(shapes[1], 2)
    loss = make_loss(name, student, teacher)
    assert value(loss, student, teacher) == pytest.approx(GOLDEN[name](loss, student, teacher), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_of_the_smallest_batches_is_its_formula(name: str, batch: int) -> None:
    student, teacher = features((batch, 3, 4, 4), 1), features((batch, 2, 4, 4), 2)
    loss = make_loss(name, student, teacher)
    expected = pytest.approx(GOLDEN[name](loss, student, teacher), rel=1e-12, abs=1e-30)
    assert value(loss, student, teacher) == expected


@pytest.mark.parametrize("shapes", SHAPES, ids=["alike", "channels", "larger student", "larger teacher"])
@pytest.mark.parametrize("name", GOLDEN)
def test_gradient_of_hint_loss_is_that_of_its_values(
    name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    student, teacher = features(shapes[0], 3), features(shapes[1], 4)
    loss = make_loss(name, student, teacher)
    target = torch.from_numpy(teacher)
    inputs = torch.from_numpy(student).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target), inputs, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("name", ["at", "sp"])
def test_hint_loss_of_a_perfect_student_is_zero(name: str) -> None:
    student = features((4, 3, 5, 5), 5)
    assert value(make_loss(name, student, student), student, student) == 0


def test_fitnet_of_a_perfect_student_is_zero_with_an_identity_regressor() -> None:
    student = features((4, 3, 5, 5), 5)
    loss = make_loss("fitnet", student, student)
    nn.init.dirac_(loss.get_parameter("regressor.weight"))
    nn.init.zeros_(loss.get_parameter("regressor.bias"))
    assert value(loss, student, student) == pytest.approx(0, abs=1e-30)


def test_fitnet_trains_a_regressor_to_the_channels_of_the_teacher() -> None:
    student, teacher = features((2, 3, 4, 4), 1), features((2, 5, 4, 4), 2)
    loss = make_loss("fitnet", student, teacher)
    loss(torch.from_numpy(student), torch.from_numpy(teacher)).backward()
    gradient = loss.get_parameter("regressor.weight").grad
    assert gradient is not None
    assert gradient.shape == (5, 3, 1, 1)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["at", "sp"])
def test_hint_loss_has_nothing_to_train(name: str) -> None:
    assert list(make_loss(name, features((2, 3, 4, 4), 1), features((2, 5, 4, 4), 2)).parameters()) == []


@pytest.mark.parametrize("name", ["at", "sp"])
@given(scale=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=20)
def test_hint_loss_does_not_see_the_scale_of_the_features(name: str, scale: float) -> None:
    student, teacher = features((3, 2, 4, 4), 6), features((3, 2, 4, 4), 7)
    loss = make_loss(name, student, teacher)
    assert value(loss, scale * student, teacher) == pytest.approx(value(loss, student, teacher), rel=1e-9)


@pytest.mark.parametrize("name", ["at", "fitnet"])
def test_hint_loss_is_a_mean_over_the_batch(name: str) -> None:
    student, teacher = features((3, 2, 4, 4), 8), features((3, 2, 4, 4), 9)
    loss = make_loss(name, student, teacher)
    single = [value(loss, student[i : i + 1], teacher[i : i + 1]) for i in range(3)]
    assert value(loss, student, teacher) == pytest.approx(np.mean(single), rel=1e-12)


def test_sp_of_a_single_image_is_zero() -> None:
    student, teacher = features((1, 3, 4, 4), 1), features((1, 5, 2, 2), 2)
    assert value(make_loss("sp", student, teacher), student, teacher) == 0


def test_sp_of_two_images_alike_to_the_teacher_only_is_the_closed_form() -> None:
    student = np.eye(2).reshape(2, 2, 1, 1)
    teacher = np.ones((2, 1, 1, 1))
    # The rows of the student's similarities are (1, 0) and (0, 1), those of the teacher's (1, 1)/√2 twice.
    off = 1 / math.sqrt(2)
    expected = (2 * (1 - off) ** 2 + 2 * off**2) / 4
    assert value(make_loss("sp", student, teacher), student, teacher) == pytest.approx(expected, rel=1e-12)


def test_at_of_attention_on_different_pixels_is_the_closed_form() -> None:
    student, teacher = np.zeros((1, 1, 1, 4)), np.zeros((1, 2, 1, 4))
    student[..., 0], teacher[..., 1] = 3.0, -2.0
    # Unit maps on two of four pixels: two differences of 1.
    assert value(make_loss("at", student, teacher), student, teacher) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
def test_dead_student_has_a_finite_gradient(name: str) -> None:
    teacher = features((3, 2, 4, 4), 1)
    student = torch.zeros(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    make_loss(name, teacher, teacher)(student, torch.from_numpy(teacher)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def golden_kd(student: Array, teacher: Array, temperature: float) -> float:
    def soft(logits: Array) -> Array:
        powers: Array = np.exp(logits / temperature)
        shares: Array = powers / powers.sum(axis=1, keepdims=True)
        return shares

    p, q = soft(teacher), soft(student)
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_is_its_formula(batch: int, temperature: float) -> None:
    student, teacher = features((batch, 10), 1), features((batch, 10), 2)
    found = float(kd(torch.from_numpy(student), torch.from_numpy(teacher), temperature))
    assert found == pytest.approx(golden_kd(student, teacher, temperature), rel=1e-12)


def test_kd_of_an_undecided_student_is_the_closed_form() -> None:
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[4 * math.log(3), 0.0]], dtype=torch.float64)
    expected = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kd(student, teacher, 4.0)) == pytest.approx(expected, rel=1e-12)


def test_gradient_of_kd_is_that_of_its_values() -> None:
    teacher = torch.from_numpy(features((3, 5), 2))
    student = torch.from_numpy(features((3, 5), 1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kd(x, teacher, 4.0), student, atol=1e-9, rtol=1e-5)


def test_kd_of_a_perfect_student_is_zero_whatever_is_added_to_all_its_logits() -> None:
    teacher = torch.from_numpy(features((3, 5), 2))
    assert float(kd(teacher + 7, teacher, 4.0)) == pytest.approx(0, abs=1e-14)


def test_kd_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4]])
    assert kd(logits, -logits, 1.0).isfinite()


def test_kd_is_registered_under_its_name() -> None:
    assert LOGIT_LOSSES.get("kd") is kd


@given(student=st.tuples(st.integers(1, 9), st.integers(1, 9)), teacher=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(deadline=None)
def test_same_size_takes_the_size_with_fewer_pixels(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    ours, theirs = same_size(torch.zeros(2, 3, *student), torch.zeros(2, 4, *teacher))
    assert ours.shape[2:] == theirs.shape[2:]
    assert ours.shape[2:].numel() == min(math.prod(student), math.prod(teacher))


def test_same_size_leaves_equal_sizes_alone() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    pair: tuple[Any, Any] = same_size(student, teacher)
    assert pair[0] is student
    assert pair[1] is teacher


def test_same_size_keeps_the_mean_of_a_map_it_pools() -> None:
    teacher: Tensor = torch.from_numpy(features((2, 3, 8, 8), 1))
    _, pooled_teacher = same_size(torch.zeros(2, 3, 4, 2), teacher)
    torch.testing.assert_close(pooled_teacher.mean((2, 3)), teacher.mean((2, 3)))
