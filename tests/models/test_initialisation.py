import pytest
import torch
from hintsearch.models.initialisation import he_by_outputs, small_linear
from hintsearch.models.zoo import ModelSpec, build_model
from torch import nn


@pytest.fixture(autouse=True)
def seeded() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("groups", [1, 32])
def test_convolutions_have_the_variance_of_he_by_outputs_whatever_their_groups(groups: int) -> None:
    network = nn.Sequential(nn.Conv2d(32, 64, 3, groups=groups))
    he_by_outputs(network)
    assert network[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert network[0].bias.count_nonzero() == 0


def test_small_linear_layers() -> None:
    layer = nn.Linear(100, 100)
    small_linear(layer)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "layer", "deviation"),
    [
        ("resnet8x4", "layer3.0.conv2", (2 / (256 * 9)) ** 0.5),
        ("ResNet50", "layer1.0.conv2", (2 / (64 * 9)) ** 0.5),
        ("wrn_16_2", "block3.layer.1.conv1", (2 / (128 * 9)) ** 0.5),
        ("vgg8", "block1.0", (2 / (128 * 9)) ** 0.5),
        ("vgg8", "classifier", 0.01),
        ("MobileNetV2", "blocks.6.0.conv.3", (2 / (480 * 9)) ** 0.5),
        ("MobileNetV2", "classifier.0", 0.01),
        # Torch's own: uniform within ± 1/√inputs.
        ("ShuffleV1", "layer3.0.conv3", (3 * 40) ** -0.5),
        ("ShuffleV2", "conv2", (3 * 464) ** -0.5),
        ("Cnn32", "fc1", (3 * 256) ** -0.5),
    ],
)
def test_networks_start_as_the_public_code_has_it(name: str, layer: str, deviation: float) -> None:
    weight = build_model(ModelSpec(name, 100, 3)).get_parameter(f"{layer}.weight")
    assert weight.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("layer", ["wrn_16_1 fc", "vgg8 classifier", "MobileNetV2 classifier.0"])
def test_classifiers_start_without_bias(layer: str) -> None:
    name, path = layer.split()
    assert build_model(ModelSpec(name, 10, 3)).get_parameter(f"{path}.bias").count_nonzero() == 0
