import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hintsearch.models.errors import InputError
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import MODELS, ModelSpec, build_model, check_model_name
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Of the lines "name sizes", sorted, of the state dicts that the public code builds: RepDistiller's for 100 classes,
# InDistill's, which is Cnn32 and Cnn32_Small, for 10.
NAMES_AND_SHAPES = {
    "resnet8": "50c4722c53d5bc379c87cb9828ade13290d261595ac8fb564b30f6e1c9d9fcb0",
    "resnet14": "bfa6d8c5f9acb8173f916e3dfc20b54a2e78ff110874e939bc2629a926768d15",
    "resnet20": "a1362ad40b1d016202af130bbcc984e4f5e61df9ad829a30be6e6db55500e2a5",
    "resnet32": "60ad15411f35daa9e161a02719ab55447d84c147ba53a48333baf1586bcbcad5",
    "resnet44": "3e890647cf871c4427169b0fb6f261742aa0d641d561a9978ffac3905c4f07b2",
    "resnet56": "0322df116a2275b3a8ee7c62da584b1608eda2a172932d8b3745f1bd9e8a2666",
    "resnet110": "be04afff7e5786a6d7d87a5f97e44452a4a857d439e55b54db13828dfc21640a",
    "resnet8x4": "6ec9b63a0b07a2bb92dce605c6907834657a4d1083c69b4c94d12d1c30cfedd0",
    "resnet32x4": "f5248da95c12bf555b07e60c1f6294318520663a6c32c8d02bea5d96f6ef6b14",
    "ResNet18": "88b5451d5441175962942a487f83612279f6657d77bb913e99c08ab349fd6078",
    "ResNet34": "57c6cffb87507079d98fb5c296f95e5eba9b328005264e6a6f28f2765c87a14e",
    "ResNet50": "60dfe7f6361e7a86bbb418d7704361e6ed83f622655ebd2f35a2d4d365ba85a6",
    "wrn_16_1": "207463348f0e9c67f471a47f9bb6a0ddabf2a39aeddb133f389f60bd3507544a",
    "wrn_16_2": "fd547b2c2b98aa6b784b20b9eab1ead95f077fb631fdb779dad84e75dde93dd2",
    "wrn_40_1": "5befeb510a8656672c2413feb5e54e8c6eb67a9c0f841fade4fb69458fa19925",
    "wrn_40_2": "6ca5b8257b5e42bd618b61a6b496c0b55fffe36513686315e6dc1af64a2fae7a",
    "vgg8": "4fa9fe5ee69dbfa4109d37f51102fd3b07a682bb3b73a72a41344ec982dd0158",
    "vgg11": "e1263e79f8bc5faa079724371aa16f2fe80dce7353757108a197f8004901a899",
    "vgg13": "1af430c08f26f34e308cafd6a82a61b639affce11c013c09e2d483edbbdde4db",
    "vgg16": "b189ff0ac9ca7d72ead4c209d73b75f09e51c4781b9a0e9623f44b613ced6c87",
    "vgg19": "2e107c810041a58393d62b440f281221718fb9420110e23d7d50a9d9f689b583",
    "MobileNetV2": "5da2dff32414392398f12d67dadee042b84f2d4e78b9e2952d0b87a0bf64f455",
    "ShuffleV1": "124d583400db611269439a72621c44a5cc612ba5394ec12ee065f80b3d17bda6",
    "ShuffleV2": "6a8893a54dcbb6cdf86393607b97a9bbb219899ed4310b528ea51b5d755a97af",
    "Cnn32": "d62cd0c50e05b669ba1c67dc49e6b3076333d51cb729a7a3eedc93ff1f0ff25f",
    "Cnn32_Small": "0b993f7c16710bdbe27038c6b2d9ff87222bced71e5dbf601bedcd18c2e08671",
}

# Millions of parameters and of multiply-adds for 3×32×32 images and 100 classes, as published.
PUBLISHED_SIZES = {
    "resnet8": (None, "12.5"),
    "resnet20": ("0.278", "40.8"),
    "resnet32": (None, "69.1"),
    "resnet56": ("0.862", "125.8"),
    "resnet110": ("1.737", "253.2"),
    "resnet8x4": ("1.234", "177.1"),
    "resnet32x4": ("7.434", "1083"),
    "wrn_16_2": ("0.703", "101.1"),
    "wrn_40_2": ("2.255", "327.6"),
    "vgg8": ("3.965", "96.2"),
    "vgg13": ("9.462", "284.9"),
    "ResNet50": ("23.7", "1298"),
    "MobileNetV2": ("0.813", "6.5"),
    "ShuffleV1": ("0.949", "38.7"),
    "ShuffleV2": ("1.356", "44.5"),
}

# First three logits of the second image, from the public code in float64, see the test.
PUBLISHED_LOGITS = {
    "resnet8": (0.940962774, -2.57586484, 1.16166569),
    "resnet8x4": (-3.54878316, -6.61862402, 4.72720862),
    "ResNet18": (2.8513618907756166, 0.4226440456518026, -4.032439550547544),
    "ResNet50": (54.1599307, 54.8226437, 28.2173717),
    "wrn_16_2": (0.0486981602, 2.07213677, -2.67340813),
    "vgg11": (4.09673469, -2.87596614, 1.77244416),
    "MobileNetV2": (14.993661, -1.15411921, -13.8164325),
    "ShuffleV1": (-20.827079, 5.5016066, 20.1563525),
    "ShuffleV2": (28.7106049, 22.1628815, 12.8235667),
    "Cnn32": (-1.13862116, 0.995685341, 0.0922262171),
    "Cnn32_Small": (-0.981201485, 0.49210464, 0.733790413),
}

RESIZED = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), (224, 160), "bicubic")

# One network of each family, and the rows that its images need at least.
FAMILIES = {
    "resnet8": 1,
    "resnet8x4": 1,
    "ResNet18": 1,
    "ResNet50": 1,
    "wrn_16_2": 1,
    "vgg11": 8,
    "MobileNetV2": 1,
    "ShuffleV1": 1,
    "ShuffleV2": 1,
    "Cnn32": 22,
    "Cnn32_Small": 22,
}


@cache
def without_memory(name: str, num_classes: int = 100, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """A network on the meta device: its layers have shapes, but no values."""
    with torch.device("meta"):
        return build_model(ModelSpec(name, num_classes, in_channels, width)).eval()


def fill_by_formula(model: nn.Module) -> None:
    """Weights, and statistics of norms, that need no generator."""
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            wave = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 + number).reshape(tensor.shape)
            scale = (2 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.3
            around = 1 if tensor.dim() == 1 and not name.endswith(("bias", "mean")) else 0
            tensor.copy_(around + scale * wave)


def rounded(count: float, like: str) -> str:
    """Millions, with as many decimals."""
    return f"{count / 1e6:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("name", "least"), FAMILIES.items())
@given(
    in_channels=st.integers(1, 4),
    num_classes=st.integers(1, 30),
    width=st.floats(0.01, 2),
    extra=st.integers(0, 9),
    batch=st.integers(1, 3),
)
@settings(deadline=None, max_examples=4)
def test_every_network_gives_logits_at_every_width(
    name: str, least: int, in_channels: int, num_classes: int, width: float, extra: int, batch: int
) -> None:
    images = torch.zeros(batch, in_channels, least + extra, least + extra, device="meta")
    assert without_memory(name, num_classes, in_channels, width)(images).shape == (batch, num_classes)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_takes_images_of_28_32_and_64_rows(name: str) -> None:
    model = without_memory(name)
    shapes = [model(torch.zeros(2, 3, rows, rows, device="meta")).shape for rows in (28, 32, 64)]
    assert shapes == [(2, 100)] * 3


@pytest.mark.parametrize("name", [name for name, (parameters, _) in PUBLISHED_SIZES.items() if parameters])
def test_parameter_count_is_the_published_one(name: str) -> None:
    published = PUBLISHED_SIZES[name][0]
    assert published is not None
    assert rounded(sum(parameter.numel() for parameter in without_memory(name).parameters()), published) == published


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    with FlopCounterMode(display=False) as counter:
        without_memory(name)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert rounded(counter.get_total_flops() / 2, PUBLISHED_SIZES[name][1]) == PUBLISHED_SIZES[name][1]


@pytest.mark.parametrize(("name", "parameters"), [("Cnn32", 57_994), ("Cnn32_Small", 15_050)])
def test_parameter_count_of_the_networks_of_indistill_is_the_published_one(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in without_memory(name, num_classes=10).parameters()) == parameters


@pytest.mark.parametrize("name", MODELS.names())
def test_names_and_shapes_of_the_weights_are_those_of_public_checkpoints(name: str) -> None:
    state = without_memory(name, num_classes=10 if name.startswith("Cnn32") else 100).state_dict()
    lines = sorted(f"{path} {'x'.join(map(str, tensor.shape))}" for path, tensor in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == NAMES_AND_SHAPES[name]


@pytest.mark.parametrize(("name", "logits"), PUBLISHED_LOGITS.items())
def test_logits_are_those_of_the_public_code_with_the_same_weights(name: str, logits: tuple[float, ...]) -> None:
    model = build_model(ModelSpec(name, 10 if name.startswith("Cnn32") else 100, 3)).double().eval()
    images = torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37).reshape(2, 3, 32, 32)
    with torch.no_grad():
        fill_by_formula(model)
        made = model(images)[1, :3]
    torch.testing.assert_close(made, torch.tensor(logits, dtype=torch.float64), rtol=1e-7, atol=0)


def test_width_scales_every_inner_channel_count() -> None:
    model = build_model(ModelSpec("resnet8", 10, 3, width=0.5))
    shapes = {name: tuple(weight.shape[:2]) for name, weight in model.state_dict().items() if weight.dim() == 4}
    assert shapes["conv1.weight"] == (8, 3)
    assert shapes["layer1.0.conv2.weight"] == (8, 8)
    assert shapes["layer2.0.conv1.weight"] == (16, 8)
    assert shapes["layer3.0.downsample.0.weight"] == (32, 16)


def test_half_of_cnn32_is_cnn32_small() -> None:
    half, small = without_memory("Cnn32", width=0.5).state_dict(), without_memory("Cnn32_Small").state_dict()
    assert {name: tensor.shape for name, tensor in half.items()} == {n: tensor.shape for n, tensor in small.items()}


def test_initial_weights_follow_the_global_generator() -> None:
    hashes = []
    with torch.random.fork_rng():
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            hashes.append(weights_sha256(build_model(ModelSpec("resnet8", 10, 1)).state_dict()))
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


@pytest.mark.parametrize("preprocessing", [None, RESIZED, Preprocessing((0.5,), (0.2,))])
@pytest.mark.parametrize("through", [lambda d: json.loads(json.dumps(d)), lambda d: yaml.safe_load(yaml.safe_dump(d))])
def test_spec_survives_the_way_to_plain_types_and_back(preprocessing: Preprocessing | None, through: Any) -> None:
    spec = ModelSpec("resnet8", 7, 2, 0.5, preprocessing)
    assert ModelSpec.from_dict(through(spec.to_dict())) == spec


@pytest.mark.parametrize(
    ("preprocessing", "shape"),
    [(None, (3, 28, 30)), (Preprocessing((0.5,), (0.2,)), (3, 28, 30)), (RESIZED, (3, 224, 160))],
)
def test_input_has_the_size_of_the_preprocessing_else_of_the_images(
    preprocessing: Preprocessing | None, shape: tuple[int, int, int]
) -> None:
    assert ModelSpec("resnet8", 7, 3, preprocessing=preprocessing).input_shape((3, 28, 30)) == shape


def test_unknown_network_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"^unknown model 'resnt20'; did you mean 'resnet20'\? \(resnet110, .*\)$"):
        build_model(ModelSpec("resnt20", 10, 3))


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_width_that_is_not_above_zero_is_an_error(width: float) -> None:
    with pytest.raises(InputError) as caught:
        build_model(ModelSpec("resnet8", 10, 3, width))
    expected = f"the width of resnet8 is {width}, but must be above 0; 1 is the published width"
    assert str(caught.value) == expected


def test_own_factory_gives_the_network(own_factory: Path) -> None:
    model = build_model(ModelSpec(f"{own_factory}:build_net", 5, 2))
    assert model(torch.zeros(3, 2, 8, 8)).shape == (3, 5)


def test_factory_that_returns_no_network_is_an_error(own_factory: Path) -> None:
    with pytest.raises(InputError, match=r":build_nothing returned a dict, but must return a torch.nn.Module$"):
        build_model(ModelSpec(f"{own_factory}:build_nothing", 5, 2))


def test_factory_that_takes_other_arguments_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text("def build(classes): ...\n")
    with pytest.raises(InputError, match=r"cannot be called \(.*\); it must take num_classes and in_channels by name$"):
        build_model(ModelSpec(f"{path}:build", 5, 2))


def test_width_of_a_network_that_is_not_of_the_zoo_is_an_error(own_factory: Path) -> None:
    with pytest.raises(InputError, match=r"is 0.5, but only networks of the zoo have one; leave it out$"):
        build_model(ModelSpec(f"{own_factory}:build_net", 5, 2, width=0.5))


@pytest.mark.parametrize("name", ["resnet9", "torchvision:resnet9", "no_such_file.py:build"])
def test_checking_a_name_refuses_what_cannot_be_built(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown model|there is no file"):
        check_model_name(name)
