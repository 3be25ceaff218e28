from collections.abc import Callable

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.penultimate import classifier_path, evaluating
from hintsearch.models.zoo import MODELS, ModelSpec, build_model
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

CLASSES = 10
IMAGE = (3, 32, 32)
# Of the zoo; all others call it `fc`.
OTHER_NAMES = {
    "ResNet18": "linear",
    "ResNet34": "linear",
    "ResNet50": "linear",
    "ShuffleV1": "linear",
    "ShuffleV2": "linear",
    "MobileNetV2": "classifier.0",
    "vgg8": "classifier",
    "vgg11": "classifier",
    "vgg13": "classifier",
    "vgg16": "classifier",
    "vgg19": "classifier",
    "Cnn32": "fc2",
    "Cnn32_Small": "fc2",
}


def small_vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (lambda: models.resnet18(weights=None, num_classes=CLASSES), "fc"),
    "mobilenet_v2": (lambda: models.mobilenet_v2(weights=None, num_classes=CLASSES), "classifier.1"),
    "vgg11": (lambda: models.vgg11(weights=None, num_classes=CLASSES, init_weights=False), "classifier.6"),
    "squeezenet1_1": (lambda: models.squeezenet1_1(weights=None, num_classes=CLASSES), "classifier.1"),
    "vit": (small_vit, "heads.head"),
}


class Heads(nn.Module):
    """Two linear layers on one feature; the second to run is not part of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(4, 2)
        self.side = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        feature = x.mean(dim=(2, 3)).repeat(1, 4)
        logits: Tensor = self.main(feature)
        self.side(feature)
        return logits


class OwnClassifier(nn.Module):
    """A linear layer of as many values as classes, or of `width`, then a product with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.directions = nn.Parameter(torch.randn(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.embed(x.mean(dim=(2, 3)))) @ functional.normalize(self.directions)


class Twice(nn.Module):
    """Its one layer runs before and after another."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(2, 2)
        self.between = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.between(self.again(x.mean(dim=(2, 3)).repeat(1, 2))))
        return out


class Fails(nn.Module):
    """A linear layer, then an error."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.fc(x.mean(dim=(2, 3)))
        raise ValueError("too small")


class Gives(nn.Module):
    """Gives what it is told, whatever it reads."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, _x: Tensor) -> object:
        return self.output


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def input_and_logits(model: nn.Module, path: str) -> tuple[nn.Module, Tensor, Tensor]:
    taken: list[Tensor] = []
    module = model.get_submodule(path)
    with module.register_forward_pre_hook(lambda _module, inputs: taken.append(inputs[0])), torch.no_grad():
        logits = model.eval()(torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0)))
    return module, taken[-1], logits


@pytest.mark.parametrize("name", MODELS.names())
def test_classifier_makes_the_logits_of_every_network_of_the_zoo(name: str) -> None:
    model = build_model(ModelSpec(name, CLASSES, 3))
    path = classifier_path(model, IMAGE)
    assert path == OTHER_NAMES.get(name, "fc")
    module, feature, logits = input_and_logits(model, path)
    assert torch.equal(module(feature), logits)


@pytest.mark.parametrize("name", TORCHVISION)
def test_classifier_of_a_network_of_torchvision(name: str) -> None:
    build, path = TORCHVISION[name]
    assert classifier_path(build(), IMAGE) == path


def test_layer_that_runs_later_but_makes_no_logits_is_no_classifier() -> None:
    assert classifier_path(Heads(), (1, 4, 4)) == "main"


@pytest.mark.parametrize("after", [nn.Softmax(dim=1), nn.BatchNorm1d(3), nn.Dropout()])
def test_what_comes_after_the_classifier_does_not_hide_it(after: nn.Module) -> None:
    assert classifier_path(pooled(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 3), after), (1, 4, 4)) == "4"


def test_convolution_whose_maps_are_pooled_to_the_logits_is_a_classifier() -> None:
    head = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    assert classifier_path(nn.Sequential(*head), (1, 8, 8)) == "1"


def test_layer_that_runs_several_times_counts_by_its_last_run() -> None:
    assert classifier_path(Twice(), (1, 4, 4)) == "again"


def test_weights_in_float64_are_read() -> None:
    assert classifier_path(pooled(nn.Linear(1, 3)).double(), (1, 4, 4)) == "2"


def test_modes_and_hooks_are_left_as_they_were() -> None:
    model = pooled(nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 3)).train()
    model[3].eval()
    classifier_path(model, (1, 4, 4))
    assert [module.training for module in model] == [True, True, True, False, True]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_modes_and_hooks_are_left_as_they_were_after_an_error() -> None:
    model = Fails().train()
    with pytest.raises(InputError, match=r"^Fails cannot read images of 1×4×4 \(too small\); change data or model$"):
        classifier_path(model, (1, 4, 4))
    assert model.fc.training
    assert not model.fc._forward_hooks


def test_batch_norm_statistics_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), pooled(nn.Linear(1, 3))).train()
    classifier_path(model, (1, 4, 4))
    assert model.get_buffer("0.num_batches_tracked").item() == 0


def test_network_without_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), pooled())
    with pytest.raises(InputError) as error:
        classifier_path(model, (1, 4, 4))
    assert str(error.value) == (
        "Sequential makes its logits by no linear layer; let the network end with a linear layer or a 1×1 convolution"
    )


def test_network_that_ends_with_something_else_is_refused() -> None:
    with pytest.raises(InputError) as error:
        classifier_path(OwnClassifier(width=5), (1, 4, 4))
    assert str(error.value) == (
        "OwnClassifier gives 3 logits, but its last linear layer, 'embed', gives 5 values; "
        "let the network end with a linear layer or a 1×1 convolution"
    )


@pytest.mark.parametrize(
    ("output", "described"), [({"logits": 0}, "dict"), (torch.zeros(1, 3, 4), r"a tensor \[1, 3, 4\]")]
)
def test_network_that_gives_no_logits_is_refused(output: object, described: str) -> None:
    with pytest.raises(InputError, match=rf"^Gives gives {described} for one image, but logits are \[B, classes\]; "):
        classifier_path(Gives(output), (1, 4, 4))


def test_evaluating_gives_each_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]
