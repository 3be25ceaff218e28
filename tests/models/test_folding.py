from collections.abc import Callable
from typing import Any

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.folding import folded, frozen, twin
from hintsearch.models.taps import LayerTaps
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import ModelSpec, build_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import DenseNet

IMAGE = (3, 16, 16)


def used(network: nn.Module) -> nn.Module:
    """The same network after a training that left no batch norm as it began; in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                ):
                    if tensor is not None:
                        nn.init.uniform_(tensor, low, high)
    return network.train()


def zoo(name: str, width: float = 1.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return used(build_model(ModelSpec(name, 3, 3, width=width)))


def densenet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return used(DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=3))


def unit(norm: Callable[[int], nn.Module] = nn.BatchNorm2d, convolution: Any = nn.Conv2d) -> nn.Sequential:
    """Convolution `0` and batch norm `1`."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = nn.Sequential(convolution(3, 3, 3, padding=1), norm(3))
    used(network)
    return network


def images() -> Tensor:
    return torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(5))


def folds(network: nn.Module) -> set[str]:
    """Paths of the batch norms that were folded."""
    return {path for path, module in network.named_modules() if isinstance(module, nn.Identity)}


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@torch.no_grad()
def outputs(network: nn.Module) -> Tensor:
    found: Tensor = network(images())
    return found


def assert_same_outputs(network: nn.Module, made: nn.Module) -> None:
    # The largest output, for what is near 0 has no relative accuracy.
    expected = outputs(frozen(network))
    torch.testing.assert_close(outputs(made), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def assert_not_folded(network: nn.Module) -> None:
    made = folded(network, IMAGE)
    assert folds(made) == set()
    assert torch.equal(outputs(made), outputs(frozen(network)))


# The batch norms left are those that read a sum, a concatenation or the input, not a convolution.
@pytest.mark.parametrize(
    ("build", "before", "left"),
    [
        (lambda: zoo("resnet8"), 9, 0),
        # The first of each of the six blocks and the last: what they read goes around the block too, or is a sum.
        (lambda: zoo("wrn_16_1"), 13, 7),
        (lambda: zoo("MobileNetV2"), 53, 0),
        # Of a dense layer the first, of each transition and at the end: they read concatenations.
        (densenet, 11, 6),
    ],
    ids=["resnet8", "wrn_16_1", "MobileNetV2", "densenet"],
)
def test_folded_network_gives_the_same_with_fewer_batch_norms(
    build: Callable[[], nn.Module], before: int, left: int
) -> None:
    network = build()
    made = folded(network, IMAGE)
    assert_same_outputs(network, made)
    assert (norms(network), norms(made)) == (before, left)


@pytest.mark.parametrize(
    "convolution",
    [
        lambda *args, **more: nn.Conv2d(*args, bias=False, **more),
        lambda *args, **more: nn.Conv2d(*args, groups=3, **more),
        lambda *args, **more: nn.Conv2d(*args, padding_mode="reflect", **more),
        lambda *args, **more: nn.Conv2d(*args, stride=2, dilation=2, **more),
    ],
    ids=["no bias", "groups", "reflect", "stride"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_any_convolution_is_folded(convolution: Callable[..., nn.Module], affine: bool) -> None:
    network = unit(lambda channels: nn.BatchNorm2d(channels, affine=affine), convolution)
    made = folded(network, IMAGE)
    assert folds(made) == {"1"}
    assert_same_outputs(network, made)


def test_network_in_double_precision_is_folded_in_it() -> None:
    network = unit().double()
    made = folded(network, IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(made(images().double()), frozen(network)(images().double()), rtol=1e-13, atol=1e-13)


def test_network_without_batch_norm_is_the_same() -> None:
    assert_not_folded(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten()))


@pytest.mark.parametrize("make", [frozen, lambda network: folded(network, IMAGE, ("layer1.0",))])
def test_copy_is_in_eval_mode_without_gradients(make: Callable[[nn.Module], nn.Module]) -> None:
    made = make(zoo("resnet8"))
    assert not any(module.training or module._forward_hooks for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("make", [frozen, lambda network: folded(network, IMAGE, ("layer1.0",))])
def test_given_network_is_left_as_it_was(make: Callable[[nn.Module], nn.Module]) -> None:
    network = zoo("resnet8")
    before = weights_sha256(network.state_dict())
    made = make(network)
    for parameter in made.parameters():
        parameter.zero_()
    assert weights_sha256(network.state_dict()) == before
    assert all(module.training and not module._forward_hooks for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert (folds(network), norms(network)) == (set(), 9)


def test_twin_shares_every_tensor_but_no_module() -> None:
    network = folded(zoo("resnet8"), IMAGE)
    same = twin(network)
    assert torch.equal(outputs(same), outputs(network))
    ours, theirs = network.state_dict(keep_vars=True), same.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert all(tensor is theirs[name] for name, tensor in ours.items())
    assert not set(network.modules()) & set(same.modules())


def test_folding_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    folded(unit(), IMAGE)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def feature(network: nn.Module, path: str) -> Tensor:
    with LayerTaps(network, [path], lambda _path, output: output.clone()) as taps:
        network(images())
        (found,) = taps.take()
    return found


def assert_same_feature(network: nn.Module, made: nn.Module, path: str) -> None:
    expected = feature(frozen(network), path)
    torch.testing.assert_close(feature(made, path), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tap", ["conv1", "layer1.0.conv2"])
def test_convolution_that_is_read_is_not_folded(tap: str) -> None:
    network = zoo("resnet8")
    made = folded(network, IMAGE, (tap,))
    assert folds(folded(network, IMAGE)) - folds(made) == {tap.replace("conv", "bn")}
    assert_same_feature(network, made, tap)


def test_convolution_is_not_folded_if_what_ends_with_it_is_read() -> None:
    network = used(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    made = folded(network, IMAGE, ("0",))
    assert folds(made) == set()
    assert_same_feature(network, made, "0")


def test_convolution_is_not_folded_if_it_is_part_of_what_is_read() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return x, {"made": self.conv(x)}

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.norm = Both(), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.both(x)[1]["made"])

    assert folds(folded(used(Network()), IMAGE, ("both",))) == set()


@pytest.mark.parametrize("tap", ["bn1", "layer2.0.bn2", "layer1.0", "relu"])
def test_what_comes_after_a_pair_can_be_read(tap: str) -> None:
    network = zoo("resnet8")
    made = folded(network, IMAGE, (tap,))
    assert norms(made) == 0
    assert_same_feature(network, made, tap)


def test_the_same_batch_norms_are_folded_every_time() -> None:
    network = zoo("resnet20", width=0.25)
    taps = [path for path, _ in network.named_modules() if path.count(".") == 1]
    found = {frozenset(folds(folded(network, IMAGE, taps))) for _ in range(10)}
    assert found == {frozenset(folds(folded(network, IMAGE)))}


def test_layer_that_is_not_there_is_an_error_naming_the_nearest() -> None:
    with pytest.raises(InputError, match=r"has no layer 'layer4'; did you mean 'layer"):
        folded(zoo("resnet8"), IMAGE, ("layer4",))


def test_batch_norm_with_two_names_is_folded_under_both() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.body = nn.Sequential(self.conv, self.norm)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.body(x)
            return found

    network = used(TwoNames())
    made = folded(network, IMAGE)
    assert norms(made) == 0
    assert_same_outputs(network, made)


class OneUnit(nn.Module):
    """A convolution that keeps channels and size, and a batch norm; what is made of them is each test's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)


class ConvolutionTwice(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(self.conv(x)))
        return found


class NormTwice(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.norm(self.conv(x)))
        return found


class UnitTwice(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(self.norm(self.conv(x))))
        return found


class ResidualAround(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        return made + self.norm(made)


class WritesBetween(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.conv(x).relu_())
        return found


class ReadsAView(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        return self.norm(made) + made.flatten(1).mean()


class GivesItAsWell(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        self.given = self.norm(made)
        return made


class NormByKeyword(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(input=self.conv(x))
        return found


class ReadsTheWeight(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight, padding=1)


class ReadsTheScale(OneUnit):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.weight.mean()


class SharedWeight(OneUnit):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(x)


@pytest.mark.parametrize(
    "kind",
    [
        ConvolutionTwice,
        NormTwice,
        UnitTwice,
        ResidualAround,
        WritesBetween,
        ReadsAView,
        GivesItAsWell,
        NormByKeyword,
        ReadsTheWeight,
        ReadsTheScale,
        SharedWeight,
    ],
)
def test_pair_that_is_not_only_a_pair_is_left(kind: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        assert_not_folded(used(kind()))


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class ScaledConv2d(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class ActivatedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def normed(*args: Any, **more: Any) -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(*args, **more))


@pytest.mark.parametrize("convolution", [StandardisedConv2d, ScaledConv2d, ActivatedConv2d, normed, nn.ConvTranspose2d])
def test_convolution_of_another_kind_is_left(convolution: Any) -> None:
    assert_not_folded(unit(convolution=convolution))


@pytest.mark.parametrize("norm", [ActivatedNorm, lambda n: nn.BatchNorm2d(n, track_running_stats=False)])
def test_norm_of_another_kind_is_left(norm: Callable[[int], nn.Module]) -> None:
    assert_not_folded(unit(norm))


@pytest.mark.parametrize("path", ["0", "1"])
def test_pair_with_a_hook_of_the_users_own_is_left(path: str) -> None:
    network = unit()
    network.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: 2 * output + 1)
    assert_not_folded(network)
