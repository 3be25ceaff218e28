import weakref
from collections.abc import Callable

import pytest
import torch
import torchvision
from hintsearch.models.candidates import repeated_blocks
from hintsearch.models.errors import InputError
from hintsearch.models.taps import LayerTaps
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.swin_transformer import SwinTransformerBlock


class HalfUsed(nn.Module):
    """Runs `used.first` only."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.ModuleDict({"first": nn.Conv2d(2, 2, 1), "final": nn.Conv2d(2, 2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used["first"](x)
        return out


class Residual(nn.Module):
    """Adds the shortcut in place by its own code, which no `inplace` switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        out += x
        return out


class Twice(nn.Module):
    """Runs its one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.conv(x))
        return out


class Attention(nn.Module):
    """Attends over the pixels; its layer gives (tokens, None)."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        out: Tensor = self.attend(tokens, tokens, tokens, need_weights=False)[0]
        return out


class Described(nn.Module):
    """Gives a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x}


def pooled(_path: str, feature: Tensor) -> Tensor:
    return feature.detach().mean(dim=(2, 3))


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


def test_forgotten_features_are_no_longer_held(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"]) as taps:
        small_network(images)
        taps.forget()
        with pytest.raises(InputError, match=r"the layer 'conv' did not run in the forward pass"):
            taps.take()


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


def test_close_gives_in_place_activations_back(small_network: nn.Sequential, images: Tensor) -> None:
    taps = LayerTaps(small_network, ["conv"])
    small_network(images)
    assert not small_network.get_submodule("relu").inplace
    taps.close()
    assert small_network.get_submodule("relu").inplace


def test_close_leaves_other_activations_out_of_place() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(inplace=False))
    LayerTaps(network, ["0"]).close()
    assert not network.get_submodule("1").inplace


def test_activations_that_spare_the_captured_tensors_stay_in_place(images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1)
    )
    with LayerTaps(network, ["1", "2"]) as taps:
        network(images)
        after_first, after_second = taps.take()
        assert [network.get_submodule(path).inplace for path in ("1", "3")] == [True, False]
    torch.testing.assert_close(after_first, network[:2](images))
    torch.testing.assert_close(after_second, network[:3](images))


def test_an_activation_spares_a_captured_tensor_of_which_it_is_given_a_view(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.ReLU(inplace=True))
    with LayerTaps(network, ["0"]) as taps:
        network(images)
        (captured,) = taps.take()
    assert (captured < 0).any()
    torch.testing.assert_close(captured, network[0](images))


def test_an_activation_that_runs_twice_spares_what_it_gave_first(images: Tensor) -> None:
    activation = nn.LeakyReLU(inplace=True)
    network = nn.Sequential(nn.Conv2d(2, 2, 1), activation, nn.Identity(), activation)
    for _ in range(2):
        with LayerTaps(network, ["2"]) as taps:
            network(images)
            (captured,) = taps.take()
        torch.testing.assert_close(captured, functional.leaky_relu(network[0](images)))


def test_an_exception_inside_gives_in_place_activations_back(small_network: nn.Sequential, images: Tensor) -> None:
    def interrupted(*_call: object) -> None:
        raise KeyboardInterrupt

    small_network.get_submodule("pool").register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt), LayerTaps(small_network, ["conv"]):
        small_network(images)
    assert small_network.get_submodule("relu").inplace


def test_closed_taps_capture_nothing(small_network: nn.Sequential, images: Tensor) -> None:
    taps = LayerTaps(small_network, ["conv"])
    taps.close()
    small_network(images)
    with pytest.raises(InputError, match="did not run"):
        taps.take()


def test_closing_twice_does_not_undo_what_came_between(small_network: nn.Sequential, images: Tensor) -> None:
    taps = LayerTaps(small_network, ["conv"])
    taps.close()
    other = LayerTaps(small_network, ["conv"])
    small_network(images)
    taps.close()
    assert not small_network.get_submodule("relu").inplace
    other.close()


@pytest.mark.parametrize("path", ["conv", "relu"])
def test_a_reader_reads_before_an_in_place_activation_writes(
    small_network: nn.Sequential, images: Tensor, path: str
) -> None:
    with LayerTaps(small_network, [path], read=pooled) as taps:
        small_network(images)
        (read,) = taps.take()
    before = by_hand(small_network, images)
    expected = before if path == "conv" else before.clamp(min=0)
    torch.testing.assert_close(read, expected.mean(dim=(2, 3)))


def test_a_reader_leaves_in_place_activations_alone(small_network: nn.Sequential) -> None:
    with LayerTaps(small_network, ["conv"], read=pooled):
        assert small_network.get_submodule("relu").inplace
    assert small_network.get_submodule("relu").inplace


def test_what_a_reader_makes_comes_in_the_order_of_the_paths(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["pool", "conv"], read=lambda path, feature: (path, feature.shape)) as taps:
        small_network(images)
        assert taps.take() == [("pool", (2, 3, 2, 2)), ("conv", (2, 3, 4, 4))]


def test_a_reader_is_called_once_for_a_path_that_is_tapped_twice(small_network: nn.Sequential, images: Tensor) -> None:
    called: list[str] = []
    with LayerTaps(small_network, ["conv", "conv"], read=lambda path, _feature: called.append(path)):
        small_network(images)
    assert called == ["conv"]


def test_with_a_reader_no_feature_map_is_held(small_network: nn.Sequential, images: Tensor) -> None:
    features: list[weakref.ref[Tensor]] = []

    def read(path: str, feature: Tensor) -> Tensor:
        features.append(weakref.ref(feature))
        return pooled(path, feature)

    with LayerTaps(small_network, ["conv"], read=read) as taps:
        small_network(images)
        assert [feature() for feature in features] == [None]
        assert len(taps.take()) == 1


def test_a_reader_may_keep_gradients(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"], read=lambda _path, feature: feature.sum()) as taps:
        small_network(images)
        torch.autograd.backward(taps.take()[0])
    gradient = small_network.get_parameter("conv.bias").grad
    assert gradient is not None
    torch.testing.assert_close(gradient, torch.full((3,), 32.0))


def test_with_a_reader_a_layer_that_did_not_run_is_an_error(images: Tensor) -> None:
    network = HalfUsed()
    with LayerTaps(network, ["used.first", "used.final"], read=pooled) as taps:
        network(images)
        with pytest.raises(InputError) as caught:
            taps.take()
    assert str(caught.value) == (
        "the layer 'used.final' did not run in the forward pass; did you mean 'used.first'? (used.first)"
    )


def test_what_a_reader_made_is_no_longer_held_once_taken(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"], read=pooled) as taps:
        small_network(images)
        taps.take()
        with pytest.raises(InputError, match="did not run"):
            taps.take()


def test_of_a_layer_that_runs_twice_the_last_run_counts(images: Tensor) -> None:
    network = Twice()
    with LayerTaps(network, ["conv"]) as taps:
        last = network(images)
        assert taps.take()[0] is last


def test_tokens_are_captured_as_a_feature_map(images: Tensor) -> None:
    network = Attention()
    with LayerTaps(network, ["attend"]) as taps:
        tokens = network(images)
        (captured,) = taps.take()
    assert tokens.shape == (2, 16, 2)
    torch.testing.assert_close(captured, tokens.transpose(1, 2).reshape(2, 2, 4, 4), rtol=0, atol=0)


@pytest.mark.parametrize("read", [None, pooled])
def test_a_layer_that_gives_no_feature_map_is_an_error(
    images: Tensor, read: Callable[[str, Tensor], Tensor] | None
) -> None:
    network = nn.Sequential(Described())
    taps = LayerTaps(network, ["0"], read=read) if read else LayerTaps(network, ["0"])
    with pytest.raises(InputError) as caught, taps:
        network(images)
    assert str(caught.value) == (
        "the layer '0' gives a dict, but a feature map is [B, C, H, W], tokens [B, T, D] or [B, C]; "
        "choose another layer"
    )


def test_a_layer_that_the_network_writes_over_is_an_error(images: Tensor) -> None:
    network = Residual()
    with LayerTaps(network, ["conv"]) as taps:
        network(images)
        with pytest.raises(InputError) as caught:
            taps.take()
    assert str(caught.value) == (
        "the network writes over what the layer 'conv' gives; choose the layer that contains it, or the one after it"
    )


def test_a_reader_reads_a_layer_before_the_network_writes_over_it(images: Tensor) -> None:
    network = Residual()
    with LayerTaps(network, ["conv"], read=pooled) as taps:
        network(images)
        (read,) = taps.take()
    expected = functional.conv2d(images, network.conv.weight, network.conv.bias)
    torch.testing.assert_close(read, expected.mean(dim=(2, 3)))


def test_inference_mode_can_be_tapped(small_network: nn.Sequential, images: Tensor) -> None:
    with LayerTaps(small_network, ["conv"]) as taps, torch.inference_mode():
        small_network(images)
        (captured,) = taps.take()
    torch.testing.assert_close(captured, by_hand(small_network, images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121"])
def test_with_and_without_a_reader_the_blocks_of_a_network_with_in_place_activations_are_the_same(name: str) -> None:
    network = torchvision.models.get_model(name).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    blocks = repeated_blocks(network)
    with torch.no_grad():
        with LayerTaps(network, blocks, read=lambda _path, feature: feature.clone()) as taps:
            network(images)
            read = taps.take()
        with LayerTaps(network, blocks) as taps:
            network(images)
            captured = taps.take()
    assert len(blocks) >= 4
    torch.testing.assert_close(captured, read, rtol=0, atol=0)


def test_a_tapped_layer_of_swin_has_its_channels_second() -> None:
    block = SwinTransformerBlock(8, 2, [2, 2], [0, 0])
    images = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    with LayerTaps(nn.Sequential(block), ["0"]) as taps:
        given = block.eval()(images)
        [feature] = taps.take()
    assert torch.equal(feature, given.permute(0, 3, 1, 2))
