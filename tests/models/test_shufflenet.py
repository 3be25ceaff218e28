import pytest
import torch
from hintsearch.models.shufflenet import ChannelShuffle, DownUnit, GroupedUnit, ShuffleNetV1, ShuffleNetV2, SplitUnit


def test_shuffle_deals_the_channels_of_the_groups_in_turn() -> None:
    channels = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 2)
    assert ChannelShuffle(2)(channels)[1, :, 0, 0].tolist() == [0, 3, 1, 4, 2, 5]


def test_unit_of_v1_with_a_stride_appends_its_averaged_input() -> None:
    images = torch.ones(2, 12, 5, 5)
    out = GroupedUnit(12, 36, 2, in_groups=1).eval()(images)
    assert out.shape == (2, 36, 3, 3)
    assert torch.equal(out[:, 24:, 1, 1], torch.ones(2, 12))


def test_split_unit_leaves_the_first_half_and_deals_it_to_the_even_channels() -> None:
    images = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SplitUnit(8).eval()(images)[:, ::2], images[:, :4])


def test_down_unit_halves_the_map() -> None:
    assert DownUnit(3, 8).eval()(torch.zeros(1, 3, 7, 8)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("width", [0.01, 0.1, 0.3, 0.77, 1.5])
def test_narrow_v1_grows_from_stage_to_stage_in_multiples_of_12(width: float) -> None:
    network = ShuffleNetV1((240, 480, 960), (1, 1, 1), width, 10, 3)
    sizes = [network.bn1.num_features, network.layer2[0].conv1.in_channels, network.layer3[0].conv1.in_channels]
    sizes.append(network.linear.in_features)
    assert all(size % 12 == 0 for size in sizes)
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("width", [0.01, 0.37, 1.3])
def test_stages_of_v2_have_even_channel_counts_at_every_width(width: float) -> None:
    network = ShuffleNetV2((116, 232, 464, 1024), (1, 1, 1), width, 10, 3)
    assert network.conv2.in_channels % 2 == 0
    assert network.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
