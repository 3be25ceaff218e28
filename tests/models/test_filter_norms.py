from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hintsearch.models.errors import InputError
from hintsearch.models.filter_norms import filter_norms, strongest_channels
from hintsearch.models.shufflenet import ChannelShuffle
from hintsearch.models.taps import LayerTaps
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn

IMAGE = (3, 16, 16)


def zoo(name: str, width: float = 1.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_model(ModelSpec(name, 3, 3, width=width))


def norms_of(module: Any) -> Tensor:
    """L1 norm of each filter, by NumPy."""
    weight = module.weight.detach().numpy().astype(np.float64)
    return torch.from_numpy(np.abs(weight).reshape(len(weight), -1).sum(axis=1))


def assert_scored_by(network: nn.Module, path: str, expected: str, image: tuple[int, int, int] = IMAGE) -> None:
    """The norms are those of one convolution, and of no other, for no two have equal weights."""
    torch.testing.assert_close(
        filter_norms(network, path, image), norms_of(network.get_submodule(expected)), rtol=1e-12, atol=0
    )


def plain() -> nn.Sequential:
    """Two units convolution, norm, activation, pooling: modules 0 to 3 and 4 to 7, of equal width."""
    units: list[nn.Module] = []
    for channels in (3, 4):
        units += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*units)


class Residual(nn.Module):
    """Block with a convolution as shortcut; what is defined, what runs and what is added first can be chosen."""

    def __init__(self, order: str) -> None:
        super().__init__()
        defined, self.runs, self.added = order.split()
        if defined == "shortcut":
            self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        if defined == "main":
            self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def _main(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.runs == "shortcut":
            shortcut, out = self.shortcut(x), self._main(x)
        else:
            out, shortcut = self._main(x), self.shortcut(x)
        if self.added == "shortcut":
            shortcut += out
            out = shortcut
        else:
            out += shortcut
        activated: Tensor = self.relu(out)
        return activated


class Gated(nn.Module):
    """Residual block with a squeeze-and-excitation gate on its main branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.excite = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(out.mean((2, 3), keepdim=True)))))
        return torch.relu(x + gate * out)


class Context(nn.Module):
    """Adds what two layers make of each channel's mean to every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        context: Tensor = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x + context


class LightMain(nn.Module):
    """Two small convolutions on the main branch, one with more weights as the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1)
        self.shortcut = nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.conv2(self.conv1(x))
        return out


class Swapped(nn.Module):
    """Swaps two channels in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[:, [0, 1]] = x[:, [1, 0]]
        return out


class Transposed(nn.Module):
    """Rows for channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class TwoKernels(nn.Module):
    """A 1×1 and a 3×3 convolution of the same input, added."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.small(x) + self.large(x)
        return out


class Tokens(nn.Module):
    """The left half of the patches as tokens [B, 32, D], copied to be dense; as many rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        grid: Tensor = self.patches(x)[..., :4]
        return grid.permute(0, 2, 3, 1).reshape(len(x), -1, 8)


class Twice(nn.Module):
    """One block run on two convolutions' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.second(self.relu(self.first(x))))
        return out


class Joined(nn.Module):
    """Two convolutions' outputs as one map; the convolution inside one of them has as many channels as the map."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.inner, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(self.inner(x))], 1)


@pytest.mark.parametrize("path", ["4", "5", "6", "7"])
def test_norm_activation_and_pooling_are_scored_by_the_convolution_before_them(path: str) -> None:
    assert_scored_by(plain(), path, "4")


def test_layer_in_the_middle_is_not_scored_by_a_later_convolution() -> None:
    assert_scored_by(plain(), "2", "0")


@pytest.mark.parametrize("added", ["main", "shortcut"])
@pytest.mark.parametrize("runs", ["main", "shortcut"])
@pytest.mark.parametrize("defined", ["main", "shortcut"])
def test_residual_block_is_scored_by_the_last_convolution_of_its_main_branch(
    defined: str, runs: str, added: str
) -> None:
    network = nn.Sequential(Residual(f"{defined} {runs} {added}"))
    assert_scored_by(network, "0", "0.conv2")
    assert_scored_by(network, "0.relu", "0.conv2")


def test_shortcut_itself_is_scored_by_its_own_convolution() -> None:
    network = nn.Sequential(Residual("main shortcut main"))
    assert_scored_by(network, "0.shortcut", "0.shortcut.0")


def test_gate_does_not_count() -> None:
    assert_scored_by(nn.Sequential(nn.Conv2d(3, 4, 1), Gated()), "1", "1.conv")


def test_gate_does_not_count_for_a_map_of_one_pixel() -> None:
    assert_scored_by(nn.Sequential(nn.Conv2d(3, 4, 1), Gated()), "1", "1.conv", (3, 1, 1))


def test_what_is_added_to_every_pixel_does_not_count() -> None:
    assert_scored_by(nn.Sequential(nn.Conv2d(3, 4, 1), Context()), "1", "0")


def test_main_branch_is_the_one_with_most_layers() -> None:
    assert_scored_by(nn.Sequential(LightMain()), "0", "0.conv2")


def test_of_branches_of_as_many_layers_the_one_with_most_weights_counts() -> None:
    assert_scored_by(nn.Sequential(TwoKernels()), "0", "0.large")


def test_layer_that_runs_twice_counts_by_its_last_run() -> None:
    network = nn.Sequential(Twice(), nn.ReLU())
    assert_scored_by(network, "0.relu", "0.second")


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution_is_scored(groups: int) -> None:
    assert_scored_by(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=groups)), "1", "1")


def test_vector_is_scored_by_a_linear_layer() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5), nn.ReLU(inplace=True))
    assert_scored_by(network, "2", "1")


def test_tokens_are_scored_by_the_convolution_that_makes_them() -> None:
    assert_scored_by(nn.Sequential(Tokens(), nn.LayerNorm(8)), "1", "0.patches")


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_block_is_scored_by_its_last_linear_layer(norm_first: bool) -> None:
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True, norm_first=norm_first)
    assert_scored_by(nn.Sequential(Tokens(), block), "1", "1.linear2")


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("resnet20", "layer2.0", "layer2.0.conv2"),
        ("resnet20", "layer3", "layer3.2.conv2"),
        ("resnet20", "bn1", "conv1"),
        ("resnet8x4", "layer2.0", "layer2.0.conv2"),
        ("resnet8x4", "layer3", "layer3.0.conv2"),
        ("wrn_16_2", "block1.layer.0", "block1.layer.0.conv2"),
        ("wrn_16_2", "block3.layer.1", "block3.layer.1.conv2"),
        ("wrn_16_2", "block3.layer.1.bn1", "block3.layer.0.conv2"),
        ("vgg8", "block2.2", "block2.0"),
        ("vgg8", "block4", "block4.0"),
        ("MobileNetV2", "blocks.2.0", "blocks.2.0.conv.6"),
        ("MobileNetV2", "blocks.2.1", "blocks.2.1.conv.6"),
        ("MobileNetV2", "blocks.2.1.conv.5", "blocks.2.1.conv.3"),
        ("MobileNetV2", "conv2", "conv2.0"),
        ("ResNet50", "layer2.0", "layer2.0.conv3"),
        ("ResNet50", "layer4", "layer4.2.conv3"),
        ("ResNet50", "avgpool", "layer4.2.conv3"),
        ("ShuffleV1", "layer2.1", "layer2.1.conv3"),
    ],
)
def test_networks_of_the_zoo(name: str, path: str, expected: str) -> None:
    assert_scored_by(zoo(name, 0.5), path, expected)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_pooling_of_indistills_network_is_scored_by_its_convolution(index: int) -> None:
    assert_scored_by(zoo("Cnn32"), f"pool{index}", f"conv{index}", (3, 32, 32))


@pytest.mark.parametrize(
    ("path", "expected"),
    [("relu", "conv1"), ("maxpool", "conv1"), ("layer2.0", "layer2.0.conv2"), ("layer4.1.relu", "layer4.1.conv2")],
)
def test_network_of_torchvision(path: str, expected: str) -> None:
    assert_scored_by(torchvision.models.resnet18(weights=None), path, expected, (3, 32, 32))


@pytest.mark.parametrize("path", ["layer1.0", "layer2.1", "layer3"])
def test_shuffled_halves_are_refused(path: str) -> None:
    network = zoo("ShuffleV2", 0.5)
    with LayerTaps(network, [path]) as taps:
        network.eval()(torch.zeros(1, *IMAGE))
        channels = taps.take()[0].shape[1]
    with pytest.raises(InputError) as caught:
        filter_norms(network, path, IMAGE)
    assert str(caught.value) == (
        f"the layer {path!r} of ShuffleNetV2 gives {channels} channels, but no convolution makes them all in this "
        "order, so InDistill cannot score them; choose another layer or network"
    )


@pytest.mark.parametrize(
    "layer",
    [ChannelShuffle(2), nn.ChannelShuffle(2), nn.PixelShuffle(2), nn.Flatten(), Joined(), Swapped(), Transposed()],
    ids=["shuffle by views", "shuffle", "pixel shuffle", "flatten", "concatenation", "swapped", "transposed"],
)
def test_channels_that_no_convolution_makes_in_their_order_are_refused(layer: nn.Module) -> None:
    before = nn.Conv2d(3, 3 if isinstance(layer, Joined) else 4, 1)
    with pytest.raises(InputError, match=r"^the layer '1' of Sequential gives \d+ channels, but no convolution"):
        filter_norms(nn.Sequential(before, layer), "1", IMAGE)


def test_image_itself_is_refused() -> None:
    with pytest.raises(InputError, match="gives 3 channels, but no convolution"):
        filter_norms(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 3, 1)), "0", IMAGE)


def chosen(weights: list[float], count: int) -> list[int]:
    network = nn.Sequential(nn.Conv2d(3, len(weights), 1), nn.ReLU())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(weights)[:, None, None, None].expand(-1, 3, 1, 1))
    found = strongest_channels(network, "1", IMAGE, count)
    assert found.dtype == torch.int64
    return found.tolist()


def test_strongest_channels_come_in_their_order() -> None:
    assert chosen([0.1, -5.0, 3.0, 0.2, 4.0], 3) == [1, 2, 4]


def test_of_equal_channels_the_lower_index_is_kept() -> None:
    # More than sixteen, for shorter lists are sorted stably whether asked to be or not.
    assert chosen([1.0] * 40 + [2.0, -2.0, 2.0] + [1.0] * 40, 5) == [0, 1, 40, 41, 42]


def test_all_channels_may_be_kept() -> None:
    assert chosen([1.0, 3.0, 2.0], 3) == [0, 1, 2]


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_wrong_count_is_refused(count: int) -> None:
    with pytest.raises(InputError) as caught:
        chosen([1.0, 2.0, 3.0], count)
    assert str(caught.value) == (
        f"the count of channels to keep is {count}, but the layer '1' of Sequential gives 3; choose 1..3"
    )


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_wrong_path_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=f"^Sequential has no layer '{path}'; "):
        filter_norms(plain(), path, IMAGE)


def test_layer_that_does_not_run_is_refused() -> None:
    network = zoo("resnet8")
    network.add_module("extra", nn.Conv2d(3, 3, 1))
    with pytest.raises(InputError, match=r"^the layer 'extra' did not run in the forward pass; "):
        filter_norms(network, "extra", IMAGE)


def test_image_that_the_network_cannot_read_is_refused() -> None:
    with pytest.raises(InputError, match=r"^Sequential cannot read images of 5×16×16 \(.*\); change data or model$"):
        filter_norms(plain(), "0", (5, 16, 16))


class Drawing(nn.Module):
    """Draws random numbers in evaluation, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Tensor
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.rand_like(x)


@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_state_are_left_as_they_were(training: bool) -> None:
    network = nn.Sequential(*plain(), Drawing()).train(training)
    network[1].eval()
    modes = [module.training for module in network.modules()]
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    strongest_channels(network, "6", IMAGE, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_of_another_precision_is_scored_in_double(dtype: torch.dtype) -> None:
    network: Any = plain().to(dtype)
    expected = network[4].weight.detach().double().abs().sum((1, 2, 3))
    torch.testing.assert_close(filter_norms(network, "7", IMAGE), expected, rtol=1e-12, atol=0)
