import pytest
import torch
from hintsearch.models.wide_resnet import PreActivationBlock, WideResNet


@pytest.mark.parametrize("depth", [8, 15, 20])
def test_depth_that_is_not_six_n_plus_four_is_an_error(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"^The value of `depth` is {depth}, but must be 6n\+4$"):
        WideResNet(depth, (4, 4, 8, 16), 10, 3)


def test_block_of_zero_convolutions_is_its_input() -> None:
    block = PreActivationBlock(3, 3, 1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(images), images)


def test_block_with_a_stride_halves_the_map() -> None:
    assert PreActivationBlock(3, 6, 2).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 4, 4)
