import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill.hint_loss import FeatureShape, HintLoss, same_size
from hintsearch.distill.losses import HINT_LOSSES
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


def regressed(loss: HintLoss, student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both of one size, the student after the loss's 1×1 convolution if it has one."""
    student, teacher = to_smaller_map(student, teacher)
    regressor = loss.get_submodule("regressor")
    if not isinstance(regressor, nn.Conv2d):
        assert student.shape[1] == teacher.shape[1]
        return student, teacher
    assert regressor.bias is not None
    weight, bias = regressor.weight.detach().numpy()[:, :, 0, 0], regressor.bias.detach().numpy()
    guess: Array = np.einsum("ts,bshw->bthw", weight, student) + bias[:, None, None]
    return guess, teacher


def golden_fitnet(loss: HintLoss, student: Array, teacher: Array) -> float:
    assert isinstance(loss.get_submodule("regressor"), nn.Conv2d)
    return golden_mse(loss, student, teacher)


def attention_maps(student: Array, teacher: Array) -> tuple[Array, Array]:
    maps = []
    for feature in to_smaller_map(student, teacher):
        energy = (feature**2).mean(axis=1).reshape(len(feature), -1)
        maps.append(energy / np.sqrt((energy**2).sum(axis=1, keepdims=True)))
    return maps[0], maps[1]


def golden_at(_loss: HintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = attention_maps(student, teacher)
    return float(((ours - theirs) ** 2).mean())


def golden_sp(_loss: HintLoss, student: Array, teacher: Array) -> float:
    grams = []
    for feature in (student, teacher):
        flat = feature.reshape(len(feature), -1)
        gram = flat @ flat.T
        grams.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
    return float(np.linalg.norm(grams[0] - grams[1], "fro") ** 2 / len(student) ** 2)


def golden_mse(loss: HintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = regressed(loss, student, teacher)
    return float(((ours - theirs) ** 2).mean())


def golden_cosine(loss: HintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = regressed(loss, student, teacher)
    lengths = np.sqrt((ours**2).sum(axis=1) * (theirs**2).sum(axis=1))
    return float((1 - (ours * theirs).sum(axis=1) / lengths).mean())


def golden_ft(_loss: HintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = attention_maps(student, teacher)
    return float(np.abs(ours - theirs).mean())


def golden_nst(_loss: HintLoss, student: Array, teacher: Array) -> float:
    """Squared distance of the mean outer products of the channels' unit maps: the kernel's feature space, spelt out."""
    total = 0.0
    for ours, theirs in zip(*to_smaller_map(student, teacher), strict=True):
        means = []
        for maps in (ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)):
            units = maps / np.linalg.norm(maps, axis=1, keepdims=True)
            means.append(np.mean([np.outer(unit, unit) for unit in units], axis=0))
        total += ((means[0] - means[1]) ** 2).sum()
    return float(total / len(student))


def golden_hcl(loss: HintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = regressed(loss, student, teacher)
    height, width = ours.shape[2:]
    parts = [(1.0, ((ours - theirs) ** 2).mean())]
    for side, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        if side < height:
            # The larger of the sizes used here are multiples; others are averaged over overlapping blocks.
            rows, columns = (
                [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)] for size in (height, width)
            )
            difference = [[(ours - theirs)[:, :, a:b, c:d].mean(axis=(2, 3)) for c, d in columns] for a, b in rows]
            parts.append((weight * parts_left(side, height), (np.array(difference) ** 2).mean()))
    return float(sum(weight * error for weight, error in parts) / sum(weight for weight, _ in parts))


def parts_left(side: int, height: int) -> float:
    """Weights are halved at each level that is there: those of levels left out are made up for."""
    left_out = sum(1 for larger in (4, 2, 1) if larger > side and larger >= height)
    return float(2**left_out)


def golden_vid(loss: HintLoss, student: Array, teacher: Array) -> float:
    ours, theirs = to_smaller_map(student, teacher)
    for position in (0, 2, 4):
        weight = loss.get_parameter(f"regressor.{position}.weight").detach().numpy()[:, :, 0, 0]
        ours = np.einsum("ts,bshw->bthw", weight, ours)
        ours = np.maximum(ours, 0) if position < 4 else ours
    # Trained; 5 at the start.
    variance = np.log1p(np.exp(loss.get_parameter("raw_variance").detach().numpy())) + 1e-5
    variance = variance[:, None, None]
    return float((0.5 * ((ours - theirs) ** 2 / variance + np.log(variance))).mean())


def golden_cc(loss: HintLoss, student: Array, teacher: Array) -> float:
    embedded = []
    for name, feature in (("student", student), ("teacher", teacher)):
        weight, bias = (loss.get_parameter(f"{name}_embedding.{part}").detach().numpy() for part in ("weight", "bias"))
        embedded.append(feature.mean(axis=(2, 3)) @ weight.T + bias)
    error = np.abs(embedded[0] - embedded[1])
    products = [float(one @ other) for one, other in itertools.pairwise(error)]
    return float(np.mean(products)) if products else 0.0


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def golden_rkd(_loss: HintLoss, student: Array, teacher: Array) -> float:
    distances, angles = [], []
    for feature in (student, teacher):
        vectors = feature.mean(axis=(2, 3))
        between = np.array([[np.linalg.norm(a - b) for b in vectors] for a in vectors])
        distances.append(between / between[between > 0].mean() if len(vectors) > 1 else between)
        found = []
        for at, one, other in itertools.product(vectors, repeat=3):
            lengths = np.linalg.norm(one - at) * np.linalg.norm(other - at)
            found.append((one - at) @ (other - at) / lengths if lengths > 0 else 0.0)
        angles.append(np.array(found))
    means = [np.mean([huber(x) for x in (pair[0] - pair[1]).ravel()]) for pair in (distances, angles)]
    return float(25 * means[0] + 50 * means[1])


def affinities(feature: Array, kernel: str) -> Array:
    """Rows that sum to 1."""
    vectors = feature.mean(axis=(2, 3))
    found = np.empty((len(vectors), len(vectors)))
    for (i, one), (j, other) in itertools.product(enumerate(vectors), repeat=2):
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        found[i, j] = (cosine + 1) / 2 if kernel == "cosine" else 1 / (1 + np.linalg.norm(one - other))
    shares: Array = found / found.sum(axis=1, keepdims=True)
    return shares


def golden_pkt(_loss: HintLoss, student: Array, teacher: Array) -> float:
    q, p = affinities(student, "cosine"), affinities(teacher, "cosine")
    return float((p * np.log((p + 1e-7) / (q + 1e-7))).mean())


def golden_pkt_symmetric(_loss: HintLoss, student: Array, teacher: Array) -> float:
    total = 0.0
    for kernel in ("cosine", "distance"):
        q, p = affinities(student, kernel), affinities(teacher, kernel)
        # Jeffreys: both directions of the divergence.
        one, other = p * np.log((p + 1e-7) / (q + 1e-7)), q * np.log((q + 1e-7) / (p + 1e-7))
        total += float((one + other).mean())
    return total


GOLDEN: dict[str, Callable[[HintLoss, Array, Array], float]] = {
    "fitnet": golden_fitnet,
    "mse": golden_mse,
    "cosine": golden_cosine,
    "at": golden_at,
    "ft": golden_ft,
    "nst": golden_nst,
    "hcl": golden_hcl,
    "vid": golden_vid,
    "sp": golden_sp,
    "cc": golden_cc,
    "rkd": golden_rkd,
    "pkt": golden_pkt,
    "pkt_symmetric": golden_pkt_symmetric,
}
# Zero where the student's features are the teacher's, without anything to train; but for rounding.
ZERO_AT_PERFECT = ("mse", "cosine", "at", "ft", "nst", "hcl", "sp", "rkd", "pkt", "pkt_symmetric")
OF_A_BATCH = ("sp", "cc", "rkd", "pkt", "pkt_symmetric")


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


@pytest.mark.parametrize("name", ZERO_AT_PERFECT)
def test_hint_loss_of_a_perfect_student_is_zero_and_its_gradient_too(name: str) -> None:
    teacher = torch.from_numpy(features((4, 3, 5, 5), 5))
    student = teacher.clone().requires_grad_()
    loss = make_loss(name, teacher.numpy(), teacher.numpy())(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name", ["at", "ft", "nst", "sp", "rkd", "pkt", "pkt_symmetric"])
def test_a_step_along_the_gradient_brings_the_student_nearer(name: str) -> None:
    teacher = torch.from_numpy(features((4, 5, 4, 4), 5))
    student = torch.from_numpy(features((4, 3, 4, 4), 6)).requires_grad_()
    loss = make_loss(name, student.detach().numpy(), teacher.numpy())
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert loss(student - 1e-3 * gradient, teacher) < loss(student, teacher)


@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_waits_for_no_device(name: str) -> None:
    """Nothing on the meta device has a value: what would have to be read back fails there, on a GPU it would wait."""
    loss = HINT_LOSSES.get(name)(FeatureShape(3, 4, 4), FeatureShape(5, 2, 2)).to("meta")
    student = torch.empty(8, 3, 4, 4, device="meta", requires_grad=True)
    loss(student, torch.empty(8, 5, 2, 2, device="meta")).backward()
    assert student.grad is not None


def test_vid_is_least_where_its_variance_is_the_mean_squared_error() -> None:
    student, teacher = features((4, 3, 4, 4), 1), features((4, 1, 4, 4), 2)
    loss = make_loss("vid", student, teacher)
    guess, target = loss.adapt(torch.from_numpy(student), torch.from_numpy(teacher))
    error = (guess - target).square().mean().item()
    losses = {}
    for factor in (0.5, 0.9, 1.0, 1.1, 2.0):
        with torch.no_grad():
            loss.get_parameter("raw_variance").fill_(math.log(math.expm1(factor * error - 1e-5)))
        losses[factor] = value(loss, student, teacher)
    assert min(losses, key=losses.__getitem__) == 1.0


def test_vid_begins_with_a_variance_of_five() -> None:
    loss = make_loss("vid", features((2, 3, 4, 4), 1), features((2, 5, 4, 4), 2))
    teacher = torch.zeros(1, 5, 4, 4, dtype=torch.float64)
    assert float(loss.compare(teacher, teacher).detach()) == pytest.approx(math.log(5) / 2, rel=1e-6)


def test_cc_of_embeddings_that_are_alike_is_zero() -> None:
    student = features((4, 3, 5, 5), 5)
    loss = make_loss("cc", student, student)
    loss.get_submodule("teacher_embedding").load_state_dict(loss.get_submodule("student_embedding").state_dict())
    assert value(loss, student, student) == 0


@pytest.mark.parametrize("name", ["sp", "cc", "rkd", "pkt", "pkt_symmetric"])
def test_hint_loss_between_images_is_zero_for_a_single_one(name: str) -> None:
    student, teacher = features((1, 3, 4, 4), 1), features((1, 5, 2, 2), 2)
    assert value(make_loss(name, student, teacher), student, teacher) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", ["rkd", "pkt", "pkt_symmetric", "sp"])
def test_hint_loss_between_images_does_not_see_a_rotation_of_the_channels(name: str) -> None:
    student, teacher = features((5, 3, 2, 2), 1), features((5, 4, 2, 2), 2)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    rotated = np.einsum("ij,bjhw->bihw", rotation, student)
    loss = make_loss(name, student, teacher)
    assert value(loss, rotated, teacher) == pytest.approx(value(loss, student, teacher), rel=1e-9)


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_gradient_is_moderate_where_all_images_are_the_same_to_the_student(name: str) -> None:
    teacher = torch.from_numpy(features((4, 3, 4, 4), 1))
    student = torch.ones(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    make_loss(name, teacher.numpy(), teacher.numpy())(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("name", GOLDEN)
def test_hint_loss_of_bf16_features_is_near_that_of_float32(name: str) -> None:
    student, teacher = (torch.from_numpy(features((8, 3, 4, 4), seed)).float().bfloat16() for seed in (1, 2))
    loss = make_loss(name, *(feature.double().numpy() for feature in (student, teacher))).float()
    exact = loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        adapted = loss.adapt(student, teacher.float())
    rounded = loss.compare(*(feature.float() for feature in adapted)).mean()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


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


@pytest.mark.parametrize("name", ["at", "ft", "nst", "sp", "rkd", "pkt", "pkt_symmetric"])
def test_hint_loss_has_nothing_to_train(name: str) -> None:
    assert list(make_loss(name, features((2, 3, 4, 4), 1), features((2, 5, 4, 4), 2)).parameters()) == []


@pytest.mark.parametrize("name", ["at", "ft", "nst", "sp", "rkd", "pkt"])
@given(scale=st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=20)
def test_hint_loss_does_not_see_the_scale_of_the_features(name: str, scale: float) -> None:
    student, teacher = features((3, 2, 4, 4), 6), features((3, 2, 4, 4), 7)
    loss = make_loss(name, student, teacher)
    assert value(loss, scale * student, teacher) == pytest.approx(value(loss, student, teacher), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in OF_A_BATCH])
def test_hint_loss_is_a_mean_over_the_batch(name: str) -> None:
    student, teacher = features((3, 2, 4, 4), 8), features((3, 2, 4, 4), 9)
    loss = make_loss(name, student, teacher)
    single = [value(loss, student[i : i + 1], teacher[i : i + 1]) for i in range(3)]
    assert value(loss, student, teacher) == pytest.approx(np.mean(single), rel=1e-12)


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
