"""What all hint losses have in common."""

import numpy as np
import pytest
import torch
from golden_losses import GOLDEN
from hint_cases import (
    LABELS,
    SHAPES,
    Array,
    Shape,
    features,
    is_joint,
    make_any_loss,
    make_loss,
    run,
    run_parts,
    samples_of,
    tensors,
    value,
)
from hintsearch.distill.losses import HINT_LOSSES, FeatureShape, JointHintLoss, Samples
from hypothesis import given, settings
from hypothesis import strategies as st

WITHOUT_PARAMETERS = ("strongest_channels", "at", "ft", "nst", "sp", "rkd", "pkt", "pkt_symmetric", "fsp")
# Zero where the student's features are the teacher's, without anything to train; but for rounding.
ZERO_AT_PERFECT = (*WITHOUT_PARAMETERS, "mse", "cosine", "hcl")
OF_A_BATCH = ("sp", "cc", "rkd", "pkt", "pkt_symmetric")
# Gives no loss of each image.
SCALAR = ("cc", "rkd")


def layers(name: str, shape: Shape, deeper: tuple[int, int, int], seed: int) -> list[Array]:
    """Of a joint loss two layers: of this shape, and a deeper one."""
    found = [features(shape, seed)]
    return [*found, features((shape[0], *deeper), seed + 100)] if is_joint(name) else found


def drawn(name: str, shapes: tuple[Shape, Shape], seed: int = 1) -> tuple[list[Array], list[Array]]:
    return layers(name, shapes[0], (4, 2, 2), seed), layers(name, shapes[1], (2, 3, 3), seed + 1)


def test_every_hint_loss_has_a_golden_value() -> None:
    assert set(HINT_LOSSES.names()) == set(GOLDEN)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_is_its_formula(name: str, shapes: tuple[Shape, Shape]) -> None:
    students, teachers = drawn(name, shapes)
    loss = make_any_loss(name, students, teachers)
    assert value(loss, students, teachers) == pytest.approx(GOLDEN[name](loss, students, teachers), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_of_the_smallest_batches_is_its_formula(name: str, batch: int) -> None:
    students, teachers = drawn(name, ((batch, 3, 4, 4), (batch, 2, 4, 4)))
    loss = make_any_loss(name, students, teachers)
    expected = pytest.approx(GOLDEN[name](loss, students, teachers), rel=1e-12, abs=1e-30)
    assert value(loss, students, teachers) == expected


@pytest.mark.parametrize(
    "shapes",
    [((4, 3, 6, 1), (4, 5, 4, 1)), ((4, 3, 1, 1), (4, 5, 1, 1)), ((1, 3, 1, 1), (1, 5, 1, 1))],
    ids=["tokens", "vectors", "one vector"],
)
@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_of_tokens_and_vectors_is_its_formula(name: str, shapes: tuple[Shape, Shape]) -> None:
    """A single vector has no variance: what normalises it must not fail."""
    students, teachers = drawn(name, shapes)
    if is_joint(name):
        students, teachers = ([side[0], features(side[0].shape, 7)] for side in (students, teachers))
    loss = make_any_loss(name, students, teachers)
    expected = pytest.approx(GOLDEN[name](loss, students, teachers), rel=1e-12, abs=1e-15)
    assert value(loss, students, teachers) == expected


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_gives_a_value_for_each_image_or_one_of_the_batch(name: str, shapes: tuple[Shape, Shape]) -> None:
    arrays = drawn(name, shapes)
    students, teachers = (tensors(side) for side in arrays)
    loss = make_any_loss(name, *arrays)
    parts = run_parts(loss, students, teachers)
    assert parts.shape == (() if name in SCALAR else (4,))
    assert run(loss, students, teachers).item() == parts.mean().item()


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", GOLDEN)
def test_gradient_of_hint_loss_is_that_of_its_values(name: str, shapes: tuple[Shape, Shape]) -> None:
    arrays = drawn(name, shapes, seed=3)
    students, teachers = (tensors(side) for side in arrays)
    loss = make_any_loss(name, *arrays)
    if name == "crd":
        # The first batch sets its constants, which no gradient flows to.
        loss.remembers = True
        run(loss, students, teachers)
        loss.remembers = False
    inputs = tuple(student.requires_grad_() for student in students)
    assert torch.autograd.gradcheck(lambda *x: run(loss, x, teachers), inputs, atol=1e-9, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", ZERO_AT_PERFECT)
def test_hint_loss_of_a_perfect_student_is_zero_and_its_gradient_too(name: str) -> None:
    teachers = layers(name, (4, 3, 5, 5), (4, 2, 2), 5)
    students = [teacher.clone().requires_grad_() for teacher in tensors(teachers)]
    loss = run(make_any_loss(name, teachers, teachers), students, tensors(teachers))
    gradients = torch.autograd.grad(loss, students)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-7


@pytest.mark.parametrize("name", WITHOUT_PARAMETERS)
def test_a_step_along_the_gradient_brings_the_student_nearer(name: str) -> None:
    wanted = 3 if name == "fsp" else 5
    students = [student.requires_grad_() for student in tensors(layers(name, (4, 3, 4, 4), (4, 2, 2), 6))]
    teachers = layers(name, (4, wanted, 4, 4), (4, 2, 2), 5)
    loss = make_any_loss(name, [student.detach().numpy() for student in students], teachers)
    before = run(loss, students, tensors(teachers))
    gradients = torch.autograd.grad(before, students)
    stepped = [student - 1e-3 * gradient for student, gradient in zip(students, gradients, strict=True)]
    assert run(loss, stepped, tensors(teachers)) < before


@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_waits_for_no_device(name: str) -> None:
    """Nothing on the meta device has a value: what would have to be read back fails there, on a GPU it would wait."""
    kind = HINT_LOSSES.get(name)
    ours, theirs = FeatureShape(3, 4, 4), FeatureShape(5, 2, 2)
    student = torch.empty(8, 3, 4, 4, device="meta", requires_grad=True)
    teacher = torch.empty(8, 5, 2, 2, device="meta")
    if issubclass(kind, JointHintLoss):
        joint = kind([ours, ours], [theirs, theirs]).to("meta")
        joint([student, student], [teacher, teacher]).backward()
    else:
        loss = kind(ours, theirs)
        # Before training, on the CPU.
        loss.read_training_set(LABELS)
        samples = samples_of(8)
        on_device = Samples(samples.indices.to("meta"), samples.labels.to("meta"))
        loss.to("meta")(student, teacher, on_device).backward()
    assert student.grad is not None


@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_of_bf16_features_is_near_that_of_float32(name: str) -> None:
    arrays = drawn(name, ((8, 3, 4, 4), (8, 3, 4, 4)))
    students, teachers = ([feature.bfloat16() for feature in tensors(side)] for side in arrays)
    loss = make_any_loss(name, *arrays).float()
    exact_students, exact_teachers = ([feature.float() for feature in side] for side in (students, teachers))
    exact = run_parts(loss, exact_students, exact_teachers).mean()
    rounded = run_parts(loss, students, exact_teachers, adapters=torch.bfloat16).mean()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", WITHOUT_PARAMETERS)
def test_hint_loss_has_nothing_to_train(name: str) -> None:
    wanted = 3 if name == "fsp" else 5
    loss = make_any_loss(name, [features((2, 3, 4, 4), 1)] * 2, [features((2, wanted, 4, 4), 2)] * 2)
    assert list(loss.parameters()) == []


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in (*WITHOUT_PARAMETERS, "mse", "cosine", "hcl")])
def test_what_hint_loss_trains_all_has_a_gradient(name: str) -> None:
    students, teachers = drawn(name, SHAPES["channels"])
    loss = make_any_loss(name, students, teachers)
    run(loss, tensors(students), tensors(teachers)).backward()
    gradients = [parameter.grad for parameter in loss.parameters()]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["at", "ft", "nst", "sp", "rkd", "pkt"])
@given(scale=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=20)
def test_hint_loss_does_not_see_the_scale_of_the_features(name: str, scale: float) -> None:
    student, teacher = features((3, 2, 4, 4), 6), features((3, 2, 4, 4), 7)
    loss = make_loss(name, student, teacher)
    assert value(loss, scale * student, teacher) == pytest.approx(value(loss, student, teacher), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in (*OF_A_BATCH, "crd")])
def test_hint_loss_is_a_mean_over_the_batch(name: str) -> None:
    """In evaluation, where batch norms do not see the other images."""
    students, teachers = drawn(name, ((3, 2, 4, 4), (3, 2, 4, 4)), seed=8)
    loss = make_any_loss(name, students, teachers).eval()
    single = [value(loss, *([side[[i]] for side in sides] for sides in (students, teachers))) for i in range(3)]
    assert value(loss, students, teachers) == pytest.approx(np.mean(single), rel=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
def test_dead_student_has_a_finite_gradient(name: str) -> None:
    teachers = layers(name, (3, 2, 4, 4), (4, 2, 2), 1)
    students = [torch.zeros(teacher.shape, dtype=torch.float64, requires_grad=True) for teacher in teachers]
    run(make_any_loss(name, teachers, teachers), students, tensors(teachers)).backward()
    for student in students:
        assert student.grad is not None
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_that_draws_says_so(name: str) -> None:
    students, teachers = drawn(name, SHAPES["alike"])
    loss = make_any_loss(name, students, teachers)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        if isinstance(loss, JointHintLoss):
            loss(tensors(students), tensors(teachers))
        else:
            loss(*tensors(students), *tensors(teachers), samples_of(4))
        assert loss.draws != torch.equal(torch.get_rng_state(), before)


def test_hint_losses_of_features_before_the_activation_are_those_of_the_papers() -> None:
    read = {name: HINT_LOSSES.get(name).pre_activation for name in HINT_LOSSES.names()}
    both = ("student", "teacher")
    assert {name: whose for name, whose in read.items() if whose} == {"ab": both, "ofd": both, "reviewkd": ("teacher",)}
