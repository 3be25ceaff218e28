import pytest
import torch
from hintsearch.models.resnet import BasicBlock, CifarResNet


@pytest.mark.parametrize("depth", [7, 18, 57])
def test_depth_that_is_not_six_n_plus_two_is_an_error(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^The value of `depth` is {depth}, but must be 6n\+2$"):
        CifarResNet(depth, (4, 4, 8, 16), 10, 3)


def test_convolutions_start_with_the_variance_of_he_by_outputs() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CifarResNet(8, (16, 16, 32, 64), 10, 3)
    weight = network.get_parameter("layer2.0.conv1.weight")
    assert weight.shape == (32, 16, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)


def test_block_of_zero_convolutions_is_its_shortcut_after_the_activation() -> None:
    block = BasicBlock(3, 3, 1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(images), images.clamp(min=0))


def test_block_with_a_stride_halves_the_map() -> None:
    assert BasicBlock(3, 6, 2).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 4, 4)
