import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hint_cases import features, make_loss, value
from hintsearch.distill.feature_losses import StrongestChannels, hierarchical_error
from hintsearch.distill.hint_loss import same_size
from hintsearch.distill.losses import FeatureShape, HintLoss, TeacherLayer
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

IMAGE = (1, 4, 4)


def filters_of_sums(sums: list[float]) -> nn.Conv2d:
    """A convolution whose filters have these sums of absolute values, spread over both signs."""
    conv = nn.Conv2d(1, len(sums), 3, padding=1)
    with torch.no_grad():
        signs = torch.tensor([1.0, -1.0, 1.0]).expand(3, 3)
        conv.weight.copy_(torch.tensor(sums)[:, None, None, None] / 9 * signs)
    return conv


def strongest(student_channels: int, network: nn.Module, path: str, channels: int) -> HintLoss:
    loss = StrongestChannels(FeatureShape(student_channels, 4, 4), FeatureShape(channels, 4, 4))
    loss.read_teacher(TeacherLayer(network, path, IMAGE))
    return loss


def compared(loss: HintLoss, student_channels: int, channels: int) -> tuple[list[float], list[float]]:
    """Which channels of the student are compared with which of the teacher."""
    pair = (
        torch.arange(float(count)).view(1, count, 1, 1).expand(1, count, 4, 4) for count in (student_channels, channels)
    )
    ours, theirs = loss.adapt(*pair)
    return ours[0, :, 0, 0].tolist(), theirs[0, :, 0, 0].tolist()


@pytest.mark.parametrize("name", ["fitnet", "fitnet_3x3"])
def test_fitnet_of_a_perfect_student_is_zero_with_an_identity_regressor(name: str) -> None:
    student = features((4, 3, 5, 5), 5)
    loss = make_loss(name, student, student)
    nn.init.dirac_(loss.get_parameter("regressor.weight"))
    nn.init.zeros_(loss.get_parameter("regressor.bias"))
    assert value(loss, student, student) == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize(("name", "side"), [("fitnet", 1), ("fitnet_3x3", 3)])
def test_fitnet_sees_as_much_around_a_pixel_as_its_regressor(name: str, side: int) -> None:
    student = torch.from_numpy(features((1, 2, 7, 7), 1)).requires_grad_()
    guess, _ = make_loss(name, student.detach().numpy(), features((1, 4, 7, 7), 2)).adapt(
        student, torch.zeros(1, 4, 7, 7)
    )
    guess[0, 0, 3, 3].backward()
    assert student.grad is not None
    seen = (student.grad[0, 0] != 0).nonzero()
    assert len(seen) == side**2
    assert (seen - 3).abs().max() == side // 2


def test_strongest_channels_are_those_of_the_filters_with_the_largest_sums() -> None:
    network = nn.Sequential(filters_of_sums([3.0, 9.0, 1.0, 8.0, 2.0]))
    loss = strongest(3, network, "0", 5)
    assert compared(loss, 3, 5) == ([0, 1, 2], [0, 1, 3])
    assert "channels" in loss.state_dict()


def test_strongest_channels_of_an_activation_are_those_of_the_convolution_before_it() -> None:
    parts = OrderedDict(conv=filters_of_sums([3.0, 9.0, 1.0, 8.0]), norm=nn.BatchNorm2d(4), relu=nn.ReLU(inplace=True))
    assert compared(strongest(2, nn.Sequential(parts), "relu", 4), 2, 4) == ([0, 1], [1, 3])


@pytest.mark.parametrize("channels", [2, 3])
def test_strongest_channels_of_a_wide_student_are_all_of_the_teacher_for_its_first(channels: int) -> None:
    """Nothing is chosen, so any layer will do: the images themselves have no filters."""
    loss = strongest(3, nn.Sequential(nn.Identity()), "0", channels)
    expected = [float(channel) for channel in range(channels)]
    assert compared(loss, 3, channels) == (expected, expected)


def test_strongest_channels_of_a_layer_without_filters_are_refused() -> None:
    with pytest.raises(InputError, match="no convolution"):
        strongest(1, nn.Sequential(nn.Conv2d(1, 2, 1), nn.PixelShuffle(1), nn.ChannelShuffle(2)), "2", 2)


def test_strongest_channels_of_what_a_layer_is_given_are_refused() -> None:
    with pytest.raises(InputError, match="'1:input' is what one is given"):
        strongest(1, nn.Sequential(filters_of_sums([1.0, 2.0]), nn.Conv2d(2, 3, 1)), "1:input", 2)


def test_strongest_channels_has_a_closed_form() -> None:
    loss = strongest(1, nn.Sequential(filters_of_sums([1.0, 2.0])), "0", 2)
    student, teacher = torch.full((2, 1, 4, 4), 3.0), torch.zeros(2, 2, 4, 4)
    teacher[0, 1], teacher[1, 1] = 1.0, 5.0
    assert loss.compare(*loss.adapt(student, teacher)).tolist() == [4.0, 4.0]


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


def test_at_of_attention_on_different_pixels_is_the_closed_form() -> None:
    student, teacher = np.zeros((1, 1, 1, 4)), np.zeros((1, 2, 1, 4))
    student[..., 0], teacher[..., 1] = 3.0, -2.0
    # Unit maps on two of four pixels: two differences of 1.
    assert value(make_loss("at", student, teacher), student, teacher) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (4, 4), (8, 8), (8, 1)])
def test_hierarchical_error_of_a_constant_difference_is_its_square(size: tuple[int, int]) -> None:
    """At every level, so whatever levels there are and however they count."""
    ours = torch.from_numpy(features((2, 3, *size), 1))
    shift = torch.tensor([2.0, -3.0], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(hierarchical_error(ours + shift, ours), shift.flatten().square())


@given(student=st.tuples(st.integers(1, 9), st.integers(1, 9)), teacher=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(deadline=None)
def test_same_size_takes_the_size_with_fewer_pixels(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    ours, theirs = same_size(torch.zeros(2, 3, *student), torch.zeros(2, 4, *teacher))
    assert ours.shape[2:] == theirs.shape[2:]
    assert ours.shape[2:].numel() == min(math.prod(student), math.prod(teacher))


def test_same_size_leaves_equal_sizes_alone() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    ours, theirs = same_size(student, teacher)
    assert ours is student
    assert theirs is teacher


def test_same_size_keeps_the_mean_of_a_map_it_pools() -> None:
    teacher: Tensor = torch.from_numpy(features((2, 3, 8, 8), 1))
    _, pooled_teacher = same_size(torch.zeros(2, 3, 4, 2), teacher)
    torch.testing.assert_close(pooled_teacher.mean((2, 3)), teacher.mean((2, 3)))
