import math

import numpy as np
import pytest
import torch
from hint_cases import features, make_loss, run, value

NAMES = ("sp", "cc", "rkd", "pkt", "pkt_symmetric")


def test_cc_of_embeddings_that_are_alike_is_zero() -> None:
    student = features((4, 3, 5, 5), 5)
    loss = make_loss("cc", student, student)
    loss.get_submodule("teacher_embedding").load_state_dict(loss.get_submodule("student_embedding").state_dict())
    assert value(loss, student, student) == 0


@pytest.mark.parametrize("name", NAMES)
def test_relation_loss_is_zero_for_a_single_image(name: str) -> None:
    student, teacher = features((1, 3, 4, 4), 1), features((1, 5, 2, 2), 2)
    assert value(make_loss(name, student, teacher), student, teacher) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", ["rkd", "pkt", "pkt_symmetric", "sp"])
def test_relation_loss_does_not_see_a_rotation_of_the_channels(name: str) -> None:
    student, teacher = features((5, 3, 2, 2), 1), features((5, 4, 2, 2), 2)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    rotated = np.einsum("ij,bjhw->bihw", rotation, student)
    loss = make_loss(name, student, teacher)
    assert value(loss, rotated, teacher) == pytest.approx(value(loss, student, teacher), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_moderate_where_all_images_are_the_same_to_the_student(name: str) -> None:
    teacher = torch.from_numpy(features((4, 3, 4, 4), 1))
    student = torch.ones(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    run(make_loss(name, teacher.numpy(), teacher.numpy()), [student], [teacher]).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e3


def test_sp_of_two_images_alike_to_the_teacher_only_is_the_closed_form() -> None:
    student = np.eye(2).reshape(2, 2, 1, 1)
    teacher = np.ones((2, 1, 1, 1))
    # The rows of the student's similarities are (1, 0) and (0, 1), those of the teacher's (1, 1)/√2 twice.
    off = 1 / math.sqrt(2)
    expected = (2 * (1 - off) ** 2 + 2 * off**2) / 4
    assert value(make_loss("sp", student, teacher), student, teacher) == pytest.approx(expected, rel=1e-12)
