"""Paths such as `fc:input`: what a module is given, in the place of what it gives."""

from collections import OrderedDict

import pytest
import torch
from hintsearch.models.candidates import list_candidates
from hintsearch.models.errors import InputError
from hintsearch.models.folding import folded, frozen
from hintsearch.models.taps import LayerTaps, module_path
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn
from torch.nn import functional

IMAGE = (2, 8, 8)


def network() -> nn.Sequential:
    """`conv`, `norm` that has seen data, `relu` in place, `pool`, `flat`, `fc`."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 3, 3, padding=1),
                norm=nn.BatchNorm2d(3),
                relu=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                fc=nn.Linear(3, 5),
            )
        )
        made(torch.randn(16, *IMAGE))
        return made.eval()


class Named(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = network()[:2], nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(input=self.body[1](input=self.body[0](x)).mean((2, 3)))
        return out


class Inner(nn.Module):
    """A batch norm of one's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.norm(features)
        return out


class AroundInner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(2, 3, 3), Inner()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(features=self.conv(x))
        return out


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(made: nn.Sequential, images: Tensor) -> dict[str, Tensor]:
    """What each layer of a copy in eval mode is given; nothing works in place."""
    found = {}
    for name, layer in frozen(made).named_children():
        found[f"{name}:input"] = images
        images = images.clamp(min=0) if name == "relu" else layer(images)
    return found


def as_map(given: Tensor) -> Tensor:
    return given[:, :, None, None] if given.dim() == 2 else given


@pytest.mark.parametrize(("path", "module"), [("fc", "fc"), ("fc:input", "fc"), ("a.0.relu:input", "a.0.relu")])
def test_path_of_the_module_is_without_the_ending(path: str, module: str) -> None:
    assert module_path(path) == module


@pytest.mark.parametrize("with_reader", [True, False])
def test_what_each_layer_is_given_is_captured(images: Tensor, with_reader: bool) -> None:
    made = network()
    expected = by_hand(made, images)
    read = (lambda _path, feature: feature.clone()) if with_reader else None
    taps = LayerTaps(made, list(expected), read) if read else LayerTaps(made, list(expected))
    with taps, torch.no_grad():
        made(images)
        found = taps.take()
    assert float(expected["relu:input"].min()) < 0
    for given, feature in zip(expected.values(), found, strict=True):
        torch.testing.assert_close(feature, as_map(given))


def test_activation_in_place_works_out_of_place_while_its_input_is_tapped(images: Tensor) -> None:
    made = network().train()
    with LayerTaps(made, ["relu:input", "relu"]) as taps:
        made(images)
        before, after = taps.take()
        assert not made.get_submodule("relu").inplace
    torch.testing.assert_close(after, before.clamp(min=0), rtol=0, atol=0)
    assert float(before.detach().min()) < 0
    assert made.get_submodule("relu").inplace
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in made.modules())


def test_gradients_flow_through_what_a_layer_is_given(images: Tensor) -> None:
    made = network()
    with LayerTaps(made, ["relu:input"]) as taps:
        made(images)
        torch.autograd.backward(taps.take()[0].sum())
    assert {name for name, parameter in made.named_parameters() if parameter.grad is not None} == {
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
    }


def test_input_of_a_layer_that_is_called_by_keyword_is_captured(images: Tensor) -> None:
    made = Named().eval()
    with LayerTaps(made, ["fc:input", "body.norm:input"]) as taps, torch.no_grad():
        made(images)
        embedding, before_norm = taps.take()
        expected = made.body[0](images)
        torch.testing.assert_close(before_norm, expected)
        torch.testing.assert_close(embedding[:, :, 0, 0], made.body[1](expected).mean((2, 3)))


def test_of_a_layer_that_runs_twice_the_last_input_counts(images: Tensor) -> None:
    block = build_model(ModelSpec("resnet8", 3, 2, width=0.25)).eval()
    with LayerTaps(block, ["layer1.0.relu:input", "layer1.0", "layer1.0.bn1"]) as taps, torch.no_grad():
        block(images)
        given, output, first = taps.take()
    torch.testing.assert_close(given.clamp(min=0), output, rtol=0, atol=0)
    assert not torch.allclose(given, first)


def test_input_of_an_unknown_layer_is_an_error_with_the_nearest() -> None:
    with pytest.raises(InputError, match="has no layer 'fd'; did you mean 'fc'"):
        LayerTaps(network(), ["fd:input"])


def test_network_itself_has_no_input_path() -> None:
    with pytest.raises(InputError, match="has no layer ''"):
        LayerTaps(network(), [":input"])


def test_input_that_is_no_feature_map_is_an_error() -> None:
    made = nn.Sequential(nn.Embedding(3, 2))
    with pytest.raises(InputError), LayerTaps(made, ["0:input"]):
        made(torch.zeros(2, dtype=torch.long))


def test_candidates_may_be_what_layers_are_given() -> None:
    found = list_candidates(network(), IMAGE, ["fc:input", "relu:input", "conv:input"])
    assert [(c.path, c.channels, c.height, c.width) for c in found] == [
        ("conv:input", 2, 8, 8),
        ("relu:input", 3, 8, 8),
        ("fc:input", 3, 1, 1),
    ]


def test_pattern_with_the_ending_stands_for_the_inputs_of_all_it_matches() -> None:
    made = build_model(ModelSpec("resnet8", 3, 2, width=0.25))
    found = list_candidates(made, IMAGE, ["layer?.0.conv2:input", "layer1.0"])
    assert [(c.path, c.channels, c.height) for c in found] == [
        ("layer1.0.conv2:input", 16 // 4, 8),
        ("layer1.0", 16 // 4, 8),
        ("layer2.0.conv2:input", 32 // 4, 4),
        ("layer3.0.conv2:input", 64 // 4, 2),
    ]


def test_pattern_with_the_ending_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"has no layer 'layer\?'"):
        list_candidates(network(), IMAGE, ["layer?:input"])


@pytest.mark.parametrize(
    ("tapped", "folds"),
    [("norm:input", False), ("conv:input", True), ("relu:input", True), ("fc:input", True), ("norm", True)],
)
def test_pair_with_a_tapped_input_between_is_not_folded(images: Tensor, tapped: str, folds: bool) -> None:
    made = folded(network(), IMAGE, (tapped,))
    assert isinstance(made.get_submodule("norm"), nn.Identity) == folds
    expected = by_hand(network(), images)
    with LayerTaps(made, ["norm:input" if tapped == "norm" else tapped], lambda _path, given: given.clone()) as taps:
        made(images)
        (found,) = taps.take()
    if tapped != "norm":
        torch.testing.assert_close(found, as_map(expected[tapped]), rtol=1e-5, atol=1e-5)


def test_pair_is_not_folded_if_the_tapped_input_between_is_given_by_keyword() -> None:
    around = AroundInner()
    assert isinstance(folded(around, IMAGE).get_submodule("inner.norm"), nn.Identity)
    made = folded(around, IMAGE, ("inner:input",))
    assert isinstance(made.get_submodule("inner.norm"), nn.BatchNorm2d)
    images = torch.ones(2, *IMAGE)
    with LayerTaps(made, ["inner:input"]) as taps:
        made(images)
        torch.testing.assert_close(taps.take()[0], functional.conv2d(images, around.conv.weight, around.conv.bias))


def test_input_of_a_layer_that_is_not_there_is_an_error_of_folding() -> None:
    with pytest.raises(InputError, match="has no layer 'fd'; did you mean 'fc'"):
        folded(network(), IMAGE, ("fd:input",))
