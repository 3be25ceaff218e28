from typing import Any

import pytest
import torch
import torchvision
from hintsearch.models.end_activation import end_activation, preceding_batch_norm
from hintsearch.models.errors import InputError
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn

IMAGE = (3, 16, 16)


def zoo(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_model(ModelSpec(name, 3, 3, width=0.5))


def unit(activation: nn.Module, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), activation)


class Residual(nn.Module):
    """Block with a convolution as shortcut, which runs before or after the main branch; one activation, used twice."""

    def __init__(self, shortcut_first: bool, inplace: bool) -> None:
        super().__init__()
        self.shortcut_first = shortcut_first
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.shortcut_first else None
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x) if shortcut is None else shortcut
        activated: Tensor = self.relu(out)
        return activated


class Added(nn.Module):
    """Unit whose last activation's output gets the input added to it, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.unit = unit(nn.ReLU(inplace=True), 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.unit(x)
        if self.inplace:
            out += x
            return out
        return out + x


class PreActivation(nn.Module):
    """Norm and activation before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.conv = nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(self.relu(self.bn(x)))
        return out


class Functional(nn.Module):
    """Ends with an activation that is no module, after one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.bn = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(self.relu(x))))


class Shared(nn.Module):
    """One activation module for the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PreActivation(), nn.Conv2d(4, 4, 1)
        self.first.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), self.first.relu)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(self.block(x)))
        return out


def behind_stem(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), block)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.ELU(),
        nn.GELU(),
        nn.SiLU(inplace=True),
        nn.Hardswish(),
        nn.Sigmoid(),
    ],
    ids=str,
)
def test_unit_ends_with_its_activation_which_reads_its_norm(activation: nn.Module) -> None:
    network = nn.Sequential(unit(nn.ReLU()), unit(activation, 4), nn.Conv2d(4, 4, 1))
    assert end_activation(network, "1", IMAGE) == "1.2"
    assert preceding_batch_norm(network, "1.2", IMAGE) is network.get_submodule("1.1")


def test_activation_is_its_own_end() -> None:
    assert end_activation(nn.Sequential(unit(nn.ReLU(inplace=True))), "0.2", IMAGE) == "0.2"


def test_what_follows_and_does_nothing_in_evaluation_does_not_count() -> None:
    network = nn.Sequential(nn.Sequential(*unit(nn.ReLU()), nn.Dropout(), nn.Identity()))
    assert end_activation(network, "0", IMAGE) == "0.2"


@pytest.mark.parametrize("path", ["0.0", "0.1"])
def test_what_an_activation_writes_over_does_not_end_with_it(path: str) -> None:
    assert end_activation(nn.Sequential(unit(nn.ReLU(inplace=True))), path, IMAGE) is None


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shortcut_first", [True, False])
def test_residual_block_ends_with_the_last_run_of_its_activation(shortcut_first: bool, inplace: bool) -> None:
    network = behind_stem(Residual(shortcut_first, inplace))
    assert end_activation(network, "1", IMAGE) == "1.relu"
    assert preceding_batch_norm(network, "1.relu", IMAGE) is network.get_submodule("1.bn2")


@pytest.mark.parametrize(
    "block",
    [
        Added(inplace=True),
        Added(inplace=False),
        PreActivation(),
        Functional(),
        nn.Sequential(unit(nn.ReLU(inplace=True), 4), nn.MaxPool2d(2)),
        unit(nn.Identity(), 4),
        unit(nn.Softmax(1), 4),
    ],
    ids=["added in place", "added", "pre-activation", "functional", "pooled", "none", "softmax"],
)
def test_block_without_activation_module_at_its_end_has_none(block: nn.Module) -> None:
    assert end_activation(behind_stem(block), "1", IMAGE) is None


def test_activation_that_runs_again_later_is_none() -> None:
    assert end_activation(Shared(), "block", IMAGE) is None


def test_block_that_runs_twice_counts_by_its_last_run() -> None:
    block = Residual(shortcut_first=True, inplace=True)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), block, block)
    assert end_activation(network, "1", IMAGE) == "1.relu"
    assert preceding_batch_norm(network, "1.relu", IMAGE) is block.bn2


def test_convolution_without_norm_has_no_batch_norm() -> None:
    network = nn.Sequential(*unit(nn.ReLU()), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert preceding_batch_norm(network, "4", IMAGE) is None


def test_another_norm_is_no_batch_norm() -> None:
    network = nn.Sequential(*unit(nn.ReLU()), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU())
    assert preceding_batch_norm(network, "5", IMAGE) is None


class ScalarGate(nn.Module):
    """Scales the image by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(x.mean())
        return out


def test_number_has_no_batch_norm() -> None:
    assert preceding_batch_norm(ScalarGate(), "gate", IMAGE) is None


def test_vector_has_no_batch_norm_of_maps() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5), nn.BatchNorm1d(5), nn.ReLU())
    assert end_activation(network, "3", IMAGE) == "3"
    assert preceding_batch_norm(network, "3", IMAGE) is None


@pytest.mark.parametrize(
    ("name", "path", "activation", "norm"),
    [
        ("vgg8", "block2", "block2.2", "block2.1"),
        ("vgg8", "block0.2", "block0.2", "block0.1"),
        ("MobileNetV2", "conv1", "conv1.2", "conv1.1"),
        ("MobileNetV2", "conv2", "conv2.2", "conv2.1"),
        ("resnet20", "layer1.0", "layer1.0.relu", "layer1.0.bn2"),
        ("resnet8x4", "layer3.0", "layer3.0.relu", "layer3.0.bn2"),
        ("ResNet50", "layer2.0", "layer2.0.relu", "layer2.0.bn3"),
        ("ShuffleV1", "layer1.1", "layer1.1.relu", "layer1.1.bn3"),
    ],
)
def test_networks_of_the_zoo_whose_layers_end_with_an_activation(
    name: str, path: str, activation: str, norm: str
) -> None:
    network = zoo(name)
    assert end_activation(network, path, IMAGE) == activation
    assert preceding_batch_norm(network, activation, IMAGE) is network.get_submodule(norm)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("wrn_16_2", "block2.layer.0"),
        ("MobileNetV2", "blocks.2.1"),
        ("ShuffleV2", "layer1.0"),
    ],
)
def test_networks_of_the_zoo_whose_layers_do_not(name: str, path: str) -> None:
    assert end_activation(zoo(name), path, IMAGE) is None


def test_convolution_unit_of_indistills_network_ends_with_pooling() -> None:
    assert end_activation(zoo("Cnn32"), "pool1", (3, 32, 32)) is None


@pytest.mark.parametrize(
    ("name", "path", "activation", "norm"),
    [
        ("resnet18", "layer1.0", "layer1.0.relu", "layer1.0.bn2"),
        ("resnet18", "layer2.0", "layer2.0.relu", "layer2.0.bn2"),
        ("resnet18", "layer4", "layer4.1.relu", "layer4.1.bn2"),
        ("resnet18", "relu", "relu", "bn1"),
        ("resnet50", "layer3.0", "layer3.0.relu", "layer3.0.bn3"),
    ],
)
def test_networks_of_torchvision(name: str, path: str, activation: str, norm: str) -> None:
    network = torchvision.models.get_model(name, weights=None)
    assert end_activation(network, path, (3, 32, 32)) == activation
    assert preceding_batch_norm(network, activation, (3, 32, 32)) is network.get_submodule(norm)


def test_input_of_the_last_run_is_the_output_before_the_activation() -> None:
    network = torchvision.models.resnet18(weights=None).eval()
    path = end_activation(network, "layer2.0", (3, 32, 32))
    assert path is not None
    seen: dict[str, Tensor] = {}

    def before(_module: nn.Module, inputs: Any) -> None:
        seen["before"] = inputs[0].clone()

    def after(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen["after"] = output.clone()

    network.get_submodule(path).register_forward_pre_hook(before)
    network.get_submodule("layer2.0").register_forward_hook(after)
    with torch.no_grad():
        network(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert bool((seen["before"] < 0).any())
    assert torch.equal(seen["before"].relu(), seen["after"])


@pytest.mark.parametrize("find", [end_activation, preceding_batch_norm])
def test_wrong_path_is_refused(find: Any) -> None:
    with pytest.raises(InputError, match=r"^Sequential has no layer 'nowhere'; "):
        find(unit(nn.ReLU()), "nowhere", IMAGE)


@pytest.mark.parametrize("find", [end_activation, preceding_batch_norm])
def test_model_is_left_as_it_was(find: Any) -> None:
    network = behind_stem(Residual(shortcut_first=True, inplace=True)).train()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    find(network, "1.relu", IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert network.get_submodule("1.relu").inplace
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
