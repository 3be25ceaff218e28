from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hint_cases import Array, features, make_loss, run, value
from hintsearch.distill.adapters import BatchNorm, connector
from hintsearch.distill.boundary_losses import OverhauledFeatureDistillation
from hintsearch.distill.losses import FeatureShape, HintLoss, TeacherLayer
from scipy.stats import norm
from torch import Tensor, nn

IMAGE = (1, 4, 4)
# Of the batch norms below: shifts and scales of five channels, often, seldom and hardly ever negative.
SHIFTS = [-2.0, 0.0, 0.7, 3.08, 3.1]
SCALES = [0.5, 2.0, -1.5, 1.0, 1.0]


def batch_norm(affine: bool = True) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(SHIFTS), affine=affine)
    if affine:
        with torch.no_grad():
            layer.bias.copy_(torch.tensor(SHIFTS))
            layer.weight.copy_(torch.tensor(SCALES))
    return layer


def conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, len(SHIFTS), 3, padding=1)


def teacher_network(first: Callable[[], nn.Module]) -> nn.Module:
    """`first` (conv, norm, relu), then `second` (conv, relu) without batch norm, then a classifier `fc`."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Sequential(OrderedDict(conv=conv(1), norm=first(), relu=nn.ReLU(inplace=True))),
            second=nn.Sequential(OrderedDict(conv=conv(len(SHIFTS)), relu=nn.ReLU(inplace=True))),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(len(SHIFTS), 3),
        )
    )


def margins(path: str, norm_layer: Callable[[], nn.Module] = batch_norm) -> list[float]:
    shape = FeatureShape(len(SHIFTS), 4, 4)
    loss = OverhauledFeatureDistillation(shape, shape)
    loss.read_teacher(TeacherLayer(teacher_network(norm_layer), path, IMAGE))
    found: list[float] = loss.state_dict()["margin"].tolist()
    return found


def unconnected(name: str, student: Array, teacher: Array, margin: float = -np.inf) -> HintLoss:
    """The loss without its trained layers."""
    loss = make_loss(name, student, teacher)
    loss.set_submodule("connector", nn.Identity())
    if name == "ofd":
        loss.get_buffer("margin").fill_(margin)
    return loss


def pixels(*values: float) -> Array:
    return np.array(values).reshape(1, 1, 1, -1)


def test_ab_is_the_closed_form() -> None:
    teacher = pixels(2, -1, 0, 3, 5, -0.1, 0.1)
    student = pixels(0.25, 0.5, -3, 2, -1, -0.75, 1)
    # From +1 where the teacher is positive, else from -1; nothing beyond.
    expected = 3e-3 * (0.75**2 + 1.5**2 + 0 + 0 + 2**2 + 0.25**2 + 0)
    assert value(unconnected("ab", student, teacher), student, teacher) == pytest.approx(expected, rel=1e-12)


def test_ab_of_a_student_beyond_the_margin_on_the_right_side_is_zero_and_its_gradient_too() -> None:
    teacher = features((3, 2, 4, 4), 1)
    student = torch.from_numpy(np.sign(teacher) * (1 + np.abs(teacher))).requires_grad_()
    loss = run(unconnected("ab", teacher, teacher), [student], [torch.from_numpy(teacher)])
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_ab_does_not_see_how_active_the_teacher_is() -> None:
    student, teacher = features((3, 2, 4, 4), 1), features((3, 5, 4, 4), 2)
    loss = make_loss("ab", student, teacher)
    assert value(loss, student, 7 * teacher) == value(loss, student, teacher)


@pytest.mark.parametrize("margin", [-np.inf, -0.5])
def test_ofd_of_a_student_with_the_teachers_activations_is_zero_and_its_gradient_too(margin: float) -> None:
    teacher = features((3, 2, 4, 4), 1)
    wanted = np.maximum(teacher, margin)
    # Where those are negative, it may be as far below as it will.
    student = torch.from_numpy(np.where(wanted > 0, wanted, 3 * wanted)).requires_grad_()
    loss = run(unconnected("ofd", teacher, teacher, margin), [student], [torch.from_numpy(teacher)])
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_ofd_is_the_closed_form() -> None:
    teacher = pixels(2, 2, -0.25, -0.25, -0.25, -4, -4, -4)
    student = pixels(3, -1, 1, -0.2, -9, 1, -0.4, -0.6)
    # Both ways of a positive value; only from above of a negative one, which is at least the margin.
    expected = 1 + 9 + 1.25**2 + 0.05**2 + 0 + 1.5**2 + 0.1**2 + 0
    loss = unconnected("ofd", student, teacher, margin=-0.5)
    assert value(loss, student, teacher) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("path", ["first", "first.relu"])
def test_margins_of_ofd_are_the_mean_negative_values_of_the_batch_norm(path: str) -> None:
    means = [
        norm.expect(lambda x: x, loc=shift, scale=abs(scale), ub=0, conditional=True)
        for shift, scale in zip(SHIFTS, SCALES, strict=True)
    ]
    rarely = [norm.cdf(0, shift, abs(scale)) <= 1e-3 for shift, scale in zip(SHIFTS, SCALES, strict=True)]
    # The two last lie on both sides of the limit.
    assert rarely == [False, False, False, False, True]
    expected = [-3 * abs(s) if rare else mean for mean, rare, s in zip(means, rarely, SCALES, strict=True)]
    assert margins(path) == pytest.approx(expected, rel=1e-5)


def test_margin_of_ofd_is_the_mean_of_what_the_activation_will_cut_off() -> None:
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * SCALES[2] + SHIFTS[2]
    assert margins("first")[2] == pytest.approx(float(drawn[drawn < 0].mean()), rel=0.01)


def test_margins_of_ofd_are_finite_for_channels_without_variance() -> None:
    def flat() -> nn.BatchNorm2d:
        layer = batch_norm()
        nn.init.zeros_(layer.weight)
        return layer

    # A channel of one negative value; the others are never negative.
    assert margins("first", flat) == [-2.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("path", "norm_layer"),
    [
        ("second", batch_norm),
        ("first.norm", batch_norm),
        ("pool", batch_norm),
        ("fc:input", batch_norm),
        ("first", nn.Identity),
        ("first", lambda: batch_norm(affine=False)),
    ],
    ids=["convolution", "no activation", "pooled", "input", "no batch norm", "not affine"],
)
def test_ofd_has_no_margins_without_a_batch_norm_before_the_activation(
    path: str, norm_layer: Callable[[], nn.Module]
) -> None:
    assert margins(path, norm_layer) == [-np.inf] * len(SHIFTS)


def test_reading_margins_leaves_the_teacher_as_it_is() -> None:
    network = teacher_network(batch_norm).train()
    before = {name: values.clone() for name, values in network.state_dict().items()}
    shape = FeatureShape(len(SHIFTS), 4, 4)
    loss = OverhauledFeatureDistillation(shape, shape)
    loss.read_teacher(TeacherLayer(network, "first", IMAGE))
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())
    assert network.training


def test_connector_of_ofd_begins_with_the_deviation_of_the_paper() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = OverhauledFeatureDistillation(FeatureShape(200, 4, 4), FeatureShape(50, 4, 4))
    weight: Tensor = loss.get_parameter("connector.0.weight").detach()
    assert float(weight.std()) == pytest.approx((2 / 50) ** 0.5, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (2, 3, 1, 1), (4, 3, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_adapters_is_torchs_where_that_has_a_variance(
    training: bool, shape: tuple[int, int, int, int]
) -> None:
    ours, theirs = BatchNorm(3).train(training), nn.BatchNorm2d(3).train(training)
    given = torch.from_numpy(features(shape, 1)).float()
    assert torch.equal(ours(given), theirs(given))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_batch_norm_of_a_single_value_is_that_of_what_it_saw_before() -> None:
    layer = BatchNorm(3)
    layer(torch.from_numpy(features((8, 3, 4, 4), 1)).float() * 3 + 5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    given = torch.from_numpy(features((1, 3, 1, 1), 2)).float()
    found = layer(given)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(found, layer.eval()(given))


def test_connector_makes_the_wanted_channels_of_mean_zero_and_deviation_one() -> None:
    made = connector(3, 5)(torch.from_numpy(features((8, 3, 4, 4), 1)).float())
    assert made.shape == (8, 5, 4, 4)
    torch.testing.assert_close(made.mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std(dim=(0, 2, 3), correction=0), torch.ones(5), atol=1e-3, rtol=0)
