import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.taps import LayerTaps
from torch import Tensor, nn
from torch.nn import functional


class HalfUsed(nn.Module):
    """Runs `used.first` only."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.ModuleDict({"first": nn.Conv2d(2, 2, 1), "final": nn.Conv2d(2, 2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used["first"](x)
        return out


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def by_hand(network: nn.Sequential, images: Tensor) -> Tensor:
    """What the convolution gives, before the activation."""
    conv = network.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    return functional.conv2d(images, conv.weight, conv.bias, padding=1)


def test_in_place_activation_does_not_write_over_a_captured_tensor(
    small_network: nn.Sequential, images: Tensor
) -> None:
    with LayerTaps(small_network, ["conv"]) as taps:
        small_network(images)
        (captured,) = taps.take()
    expected = by_hand(small_network, images)
    assert (expected < 0).any()
    torch.testing.assert_close(captured, expected)


def test_taps_do_not_change_what_the_network_gives(small_network: nn.Sequential, images: Tensor) -> None:
    before = small_network(images)
    with LayerTaps(small_network, ["conv"]):
        torch.testing.assert_close(small_network(images), before, rtol=0, atol=0)


def test_features_come_in_the_order_of_the_paths(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["pool", "relu", "conv"]) as taps:
        small_network(images)
        pool, relu, conv = taps.take()
    torch.testing.assert_close(relu, conv.clamp(min=0))
    torch.testing.assert_close(pool, functional.max_pool2d(relu, 2))


def test_a_path_may_be_tapped_twice(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv", "conv"]) as taps:
        small_network(images)
        first, second = taps.take()
    assert first is second


def test_each_forward_pass_replaces_what_was_captured(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"]) as taps:
        small_network(images)
        small_network(images + 1)
        (captured,) = taps.take()
    torch.testing.assert_close(captured, by_hand(small_network, images + 1))


def test_gradients_flow_through_captured_features(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"]) as taps:
        small_network(images)
        torch.autograd.backward(taps.take()[0].sum())
    gradient = small_network.get_parameter("conv.bias").grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full((3,), 32.0))


def test_taken_features_are_no_longer_held(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"]) as taps:
        small_network(images)
        taps.take()
        with pytest.raises(InputError) as caught:
            taps.take()
    assert str(caught.value) == "the layer 'conv' did not run in the forward pass; there is nothing to choose from"


def test_layer_that_did_not_run_is_an_error_with_the_nearest_that_did(images: Tensor) -> None:
    network = HalfUsed()
    with LayerTaps(network, ["used.first", "used.final"]) as taps:
        network(images)
        with pytest.raises(InputError) as caught:
            taps.take()
    assert str(caught.value) == (
        "the layer 'used.final' did not run in the forward pass; did you mean 'used.first'? (used.first)"
    )


def test_unknown_path_is_an_error_with_the_nearest_name(small_network: nn.Sequential) -> None:
    with pytest.raises(InputError) as caught:
        LayerTaps(small_network, ["cnov"])
    assert str(caught.value) == "Sequential has no layer 'cnov'; did you mean 'conv'? (conv, pool, relu)"


def test_unknown_path_is_compared_with_paths_of_its_depth() -> None:
    network = nn.ModuleDict({"layer1": nn.Sequential(nn.ReLU(), nn.ReLU()), "layer2": nn.Sequential(nn.ReLU())})
    with pytest.raises(InputError) as caught:
        LayerTaps(network, ["layer1.2"])
    expected = "ModuleDict has no layer 'layer1.2'; did you mean 'layer1.1'? (layer1.0, layer1.1, layer2.0)"
    assert str(caught.value) == expected


def test_the_network_itself_is_no_layer(small_network: nn.Sequential) -> None:
    with pytest.raises(InputError, match=r"^Sequential has no layer ''"):
        LayerTaps(small_network, [""])


def test_unknown_path_leaves_the_network_as_it_was(small_network: nn.Sequential) -> None:
    with pytest.raises(InputError):
        LayerTaps(small_network, ["conv", "cnov"])
    assert small_network.get_submodule("relu").inplace


def test_close_gives_in_place_activations_back(small_network: nn.Sequential) -> None:
    taps = LayerTaps(small_network, ["conv"])
    assert not small_network.get_submodule("relu").inplace
    taps.close()
    assert small_network.get_submodule("relu").inplace


def test_close_leaves_other_activations_out_of_place() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=False))
    LayerTaps(network, ["0"]).close()
    assert not network.get_submodule("1").inplace


def test_an_exception_inside_gives_in_place_activations_back(small_network: nn.Sequential) -> None:
    with pytest.raises(KeyboardInterrupt), LayerTaps(small_network, ["conv"]):
        raise KeyboardInterrupt
    assert small_network.get_submodule("relu").inplace


def test_closed_taps_capture_nothing(small_network: nn.Sequential, images: Tensor) -> None:
    taps = LayerTaps(small_network, ["conv"])
    taps.close()
    small_network(images)
    with pytest.raises(InputError, match="did not run"):
        taps.take()


def test_closing_twice_does_not_undo_what_came_between(small_network: nn.Sequential) -> None:
    taps = LayerTaps(small_network, ["conv"])
    taps.close()
    other = LayerTaps(small_network, ["conv"])
    taps.close()
    assert not small_network.get_submodule("relu").inplace
    other.close()
