import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hintsearch.distill.logit_losses import LOGIT_LOSSES, LogitLoss, kd
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Golden = Callable[[Array, Array, NDArray[np.int64], float], float]
TEMPERATURES = [0.5, 1.0, 4.0]


def drawn_logits(batch: int, classes: int, seed: int) -> Array:
    values: Array = 3 * np.random.default_rng(seed).normal(size=(batch, classes))
    return values


def drawn_labels(batch: int, classes: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, classes, batch)


def softmax(logits: Array) -> Array:
    powers: Array = np.exp(logits)
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def golden_kd(student: Array, teacher: Array, _labels: NDArray[np.int64], temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean())


def golden_dkd(student: Array, teacher: Array, labels: NDArray[np.int64], temperature: float) -> float:
    losses = []
    for ours, theirs, label in zip(softmax(student / temperature), softmax(teacher / temperature), labels, strict=True):
        others = np.arange(len(ours)) != label
        p, q = theirs[label], ours[label]
        target = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        # Among the others, each part of their whole.
        p_others, q_others = theirs[others] / theirs[others].sum(), ours[others] / ours[others].sum()
        losses.append(target + 8 * (p_others * np.log(p_others / q_others)).sum())
    return float(temperature**2 * np.mean(losses))


def golden_wsl(student: Array, teacher: Array, labels: NDArray[np.int64], temperature: float) -> float:
    rows = np.arange(len(labels))
    ours, theirs = (-np.log(softmax(logits)[rows, labels]) for logits in (student, teacher))
    weight = 1 - np.exp(-ours / theirs)
    cross = -(softmax(teacher / temperature) * np.log(softmax(student / temperature))).sum(axis=1)
    return float(temperature**2 * (weight * cross).mean())


def golden_dist(student: Array, teacher: Array, _labels: NDArray[np.int64], temperature: float) -> float:
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    between = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    alone = len(q) == 1
    within = 0.0 if alone else np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return float(temperature**2 * (2 - between - within))


def golden_standardised(student: Array, teacher: Array, labels: NDArray[np.int64], temperature: float) -> float:
    scaled = [(x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, ddof=1, keepdims=True) for x in (student, teacher)]
    return golden_kd(scaled[0], scaled[1], labels, temperature)


GOLDEN: dict[str, Golden] = {
    "kd": golden_kd,
    "dkd": golden_dkd,
    "wsl": golden_wsl,
    "dist": golden_dist,
    "kd_standardised": golden_standardised,
}
# Least where the student's logits are the teacher's; `wsl` is a cross-entropy, whose least value is an entropy.
ZERO_AT_PERFECT = {"kd", "dkd", "dist", "kd_standardised"}


def value(loss: LogitLoss, student: Array, teacher: Array, labels: NDArray[np.int64], temperature: float) -> float:
    result = loss(torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels), temperature)
    assert result.shape in ((), (len(labels),))
    return float(result.mean())


def test_every_logit_loss_has_a_golden_value() -> None:
    assert set(LOGIT_LOSSES.names()) == set(GOLDEN)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", GOLDEN)
def test_logit_loss_is_its_formula(name: str, temperature: float, batch: int, classes: int) -> None:
    student, teacher = drawn_logits(batch, classes, 1), drawn_logits(batch, classes, 2)
    labels = drawn_labels(batch, classes)
    found = value(LOGIT_LOSSES.get(name), student, teacher, labels, temperature)
    # The small constants that keep divisions finite are of 1e-7 and less.
    assert found == pytest.approx(GOLDEN[name](student, teacher, labels, temperature), rel=1e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_gradient_of_logit_loss_is_that_of_its_values(name: str) -> None:
    loss, labels = LOGIT_LOSSES.get(name), torch.tensor([0, 4, 2])
    teacher = torch.from_numpy(drawn_logits(3, 5, 2))
    student = torch.from_numpy(drawn_logits(3, 5, 1)).requires_grad_()

    # Its weight is none of what is differentiated: held as it is here.
    weight = (loss(student, teacher, labels, 4.0) / cross(student, teacher)).detach()

    def of(logits: Tensor) -> Tensor:
        if name == "wsl":
            return (weight * cross(logits, teacher)).mean()
        return loss(logits, teacher, labels, 4.0).mean()

    assert torch.autograd.gradcheck(of, student, atol=1e-8, rtol=1e-5)
    (found,) = torch.autograd.grad(loss(student, teacher, labels, 4.0).mean(), student)
    (expected,) = torch.autograd.grad(of(student), student)
    torch.testing.assert_close(found, expected)


def cross(student: Tensor, teacher: Tensor) -> Tensor:
    """The cross-entropy of two softened outputs, [B]."""
    return -((teacher / 4).softmax(dim=1) * (student / 4).log_softmax(dim=1)).sum(dim=1)


@pytest.mark.parametrize("name", GOLDEN)
def test_gradient_of_logit_loss_is_zero_at_a_perfect_student(name: str) -> None:
    teacher, labels = torch.from_numpy(drawn_logits(4, 6, 3)), torch.tensor([1, 5, 0, 3])
    student = teacher.clone().requires_grad_()
    loss = LOGIT_LOSSES.get(name)(student, teacher, labels, 2.0).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-6
    if name in ZERO_AT_PERFECT:
        assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_step_along_the_gradient_brings_the_student_nearer(name: str) -> None:
    loss, labels = LOGIT_LOSSES.get(name), torch.tensor([0, 1, 2, 3])
    teacher = torch.from_numpy(drawn_logits(4, 4, 5))
    student = torch.from_numpy(drawn_logits(4, 4, 6)).requires_grad_()
    before = loss(student, teacher, labels, 4.0).mean()
    (gradient,) = torch.autograd.grad(before, student)
    assert loss(student - 1e-3 * gradient, teacher, labels, 4.0).mean() < before


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "kd_standardised"])
def test_logit_loss_does_not_see_what_is_added_to_all_logits(name: str) -> None:
    student, teacher, labels = drawn_logits(3, 5, 1), drawn_logits(3, 5, 2), drawn_labels(3, 5)
    loss = LOGIT_LOSSES.get(name)
    assert value(loss, student + 7, teacher - 2, labels, 4.0) == pytest.approx(
        value(loss, student, teacher, labels, 4.0), rel=1e-9
    )


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("logits", [[[1e4, -1e4, 0.0]], [[0.0, 0.0, 0.0]]], ids=["extreme", "undecided"])
def test_logit_loss_and_its_gradient_are_finite_for_extreme_logits(name: str, logits: list[list[float]]) -> None:
    student = torch.tensor(logits).requires_grad_()
    for teacher in (-student.detach(), student.detach() + 1, torch.tensor([[0.0, 1.0, 2.0]])):
        loss = LOGIT_LOSSES.get(name)(student, teacher, torch.tensor([0]), 1.0).mean()
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["kd", "dkd", "wsl", "kd_standardised"])
def test_logit_loss_of_single_images_is_told_for_each(name: str) -> None:
    student, teacher, labels = drawn_logits(3, 5, 1), drawn_logits(3, 5, 2), drawn_labels(3, 5)
    loss = LOGIT_LOSSES.get(name)
    together = loss(torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels), 4.0)
    alone = [value(loss, student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], 4.0) for i in range(3)]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
def test_logit_loss_waits_for_no_device(name: str) -> None:
    """Nothing on the meta device has a value: what would have to be read back fails there, on a GPU it would wait."""
    student = torch.empty(8, 5, device="meta", requires_grad=True)
    labels = torch.empty(8, dtype=torch.long, device="meta")
    LOGIT_LOSSES.get(name)(student, torch.empty(8, 5, device="meta"), labels, 4.0).mean().backward()
    assert student.grad is not None


def test_kd_of_an_undecided_student_is_the_closed_form() -> None:
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[4 * math.log(3), 0.0]], dtype=torch.float64)
    expected = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kd(student, teacher, torch.tensor([0]), 4.0)) == pytest.approx(expected, rel=1e-12)


def test_kd_is_the_two_parts_of_dkd_with_the_teachers_doubt_before_the_second() -> None:
    student, teacher = drawn_logits(1, 6, 1), drawn_logits(1, 6, 2)
    label = np.array([2])
    whole = value(kd, student, teacher, label, 1.0)
    decoupled = value(LOGIT_LOSSES.get("dkd"), student, teacher, label, 1.0)
    others = np.delete(softmax(teacher)[0], 2), np.delete(softmax(student)[0], 2)
    p, q = (part / part.sum() for part in others)
    among_others = float((p * np.log(p / q)).sum())
    # Zhao et al., equation 7.
    doubt = 1 - softmax(teacher)[0, 2]
    assert decoupled - whole == pytest.approx((8 - doubt) * among_others, rel=1e-9)


def test_wsl_leaves_out_an_image_that_the_student_knows_far_better_than_the_teacher() -> None:
    teacher = np.array([[0.0, 6.0, 1.0]])
    sure, unsure = np.array([[30.0, 0.0, 1.0]]), np.array([[0.0, 9.0, 1.0]])
    weights = []
    for student in (sure, unsure):
        q, p = softmax(student / 2), softmax(teacher / 2)
        cross_entropy = float(-(p * np.log(q)).sum())
        weights.append(value(LOGIT_LOSSES.get("wsl"), student, teacher, np.array([0]), 2.0) / (4 * cross_entropy))
    assert weights[0] == pytest.approx(0, abs=1e-9)
    assert weights[1] > 0.6


def test_dist_does_not_see_how_decided_the_student_is() -> None:
    """Probabilities of the student that are those of the teacher, drawn towards the mean of each row and column."""
    teacher = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]]))
    student = np.log(0.4 * np.exp(teacher) + 0.6 / 3)
    assert value(LOGIT_LOSSES.get("dist"), student, teacher, np.arange(3), 1.0) == pytest.approx(0, abs=1e-6)


def test_standardised_kd_does_not_see_the_scale_of_the_logits() -> None:
    student, teacher, labels = drawn_logits(3, 5, 1), drawn_logits(3, 5, 2), drawn_labels(3, 5)
    loss = LOGIT_LOSSES.get("kd_standardised")
    scaled = value(loss, 20 * student, 0.1 * teacher, labels, 2.0)
    assert scaled == pytest.approx(value(loss, student, teacher, labels, 2.0), rel=1e-5)
