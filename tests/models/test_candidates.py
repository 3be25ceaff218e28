from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from itertools import pairwise

import pytest
import torch
import torchvision
from hintsearch.models.candidates import Candidate, list_candidates, repeated_blocks, stage_ends
from hintsearch.models.errors import InputError
from hintsearch.models.weights import weights_sha256
from hintsearch.models.zoo import MODELS, ModelSpec, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vision_transformer import VisionTransformer

IMAGE = (3, 32, 32)


class Backwards(nn.Module):
    """Registers its layers in the order opposite to the one in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(4, 5, 1)
        self.early = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.late(self.early(x))
        return out


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x}


class Unit(nn.Module):
    """One convolution and its activation."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.conv(x))
        return out


class Block(nn.Module):
    """Two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class Residual(nn.Sequential):
    """A Sequential that does more than run its children."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return x + out


class Head(nn.Module):
    """A classifier of two linear layers, for [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.hidden(x.mean(dim=(2, 3))))
        return out


class Permuted(nn.Module):
    """[B, C, H, W] → [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsLast(nn.Module):
    """Two linear layers on [B, H, W, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class WithHeads(nn.Module):
    """Flat convolution units; `heads.0` makes the logits, `heads.1` runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
        self.heads = nn.ModuleList([Head(5), Head(5)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.features(x)
        return [head(x) for head in self.heads[: 1 + self.training]]


class Twice(nn.Module):
    """Runs `again` before and after `between`."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 3, 1)
        self.between = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.between(self.again(x)))
        return out


class Encoder(nn.Module):
    """Patches and torch's own transformer layers, whose tokens are [B, T, D] or [T, B, D]."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.order = (0, 2, 1) if batch_first else (2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.patches(x).flatten(2).permute(self.order))
        return out


def torchvision_model(name: str) -> nn.Module:
    """A network of torchvision on the meta device."""
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    # RegNet reads values while it is built.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model: nn.Module = torchvision.models.get_model(name, **options)
    return model.to("meta")


def transformer_block(tokens: int, width: int, hidden: int) -> int:
    """Multiply-adds: queries, keys, values and output; scores and their use; the two layers of the perceptron."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden


def without_memory(name: str) -> nn.Module:
    """A network on the meta device: its layers have shapes, but no values."""
    with torch.device("meta"):
        return build_model(ModelSpec(name, 100, 3))


@cache
def zoo_candidates(name: str) -> tuple[Candidate, ...]:
    return list_candidates(without_memory(name), IMAGE)


def distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


@pytest.mark.parametrize("name", ["resnet8", "resnet32x4", "wrn_16_2"])
def test_multiply_adds_are_half_of_what_torch_counts(name: str) -> None:
    model = without_memory(name)
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *IMAGE, device="meta"))
    whole = zoo_candidates(name)[-1].multiply_adds + model.get_parameter("fc.weight").numel()
    assert 2 * whole == counter.get_total_flops()


def test_multiply_adds_of_strided_grouped_and_linear_layers_add_up_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, (1, 3), padding=(0, 1), groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Unflatten(1, (6, 1, 1)),
    )
    found = list_candidates(network, (3, 8, 8), ["0", "1", "5"])
    strided, grouped, linear = 4 * 4 * 4 * 27, 8 * 4 * 4 * 6, 8 * 6
    assert [c.multiply_adds for c in found] == [strided, strided + grouped, strided + grouped + linear]


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet8", 3, ("layer1.0", 16, 32), ("layer3.0", 64, 8)),
        ("resnet14", 6, ("layer1.0", 16, 32), ("layer3.1", 64, 8)),
        ("resnet20", 9, ("layer1.0", 16, 32), ("layer3.2", 64, 8)),
        ("resnet32", 15, ("layer1.0", 16, 32), ("layer3.4", 64, 8)),
        ("resnet44", 21, ("layer1.0", 16, 32), ("layer3.6", 64, 8)),
        ("resnet56", 27, ("layer1.0", 16, 32), ("layer3.8", 64, 8)),
        ("resnet110", 54, ("layer1.0", 16, 32), ("layer3.17", 64, 8)),
        ("resnet8x4", 3, ("layer1.0", 64, 32), ("layer3.0", 256, 8)),
        ("resnet32x4", 15, ("layer1.0", 64, 32), ("layer3.4", 256, 8)),
        ("ResNet18", 8, ("layer1.0", 64, 32), ("layer4.1", 512, 4)),
        ("ResNet34", 16, ("layer1.0", 64, 32), ("layer4.2", 512, 4)),
        ("ResNet50", 16, ("layer1.0", 256, 32), ("layer4.2", 2048, 4)),
        ("wrn_16_1", 6, ("block1.layer.0", 16, 32), ("block3.layer.1", 64, 8)),
        ("wrn_16_2", 6, ("block1.layer.0", 32, 32), ("block3.layer.1", 128, 8)),
        ("wrn_40_1", 18, ("block1.layer.0", 16, 32), ("block3.layer.5", 64, 8)),
        ("wrn_40_2", 18, ("block1.layer.0", 32, 32), ("block3.layer.5", 128, 8)),
        ("vgg8", 5, ("block0.2", 64, 32), ("block4.2", 512, 4)),
        ("vgg11", 8, ("block0.2", 64, 32), ("block4.5", 512, 4)),
        ("vgg13", 10, ("block0.2", 64, 32), ("block4.5", 512, 4)),
        ("vgg16", 13, ("block0.2", 64, 32), ("block4.8", 512, 4)),
        ("vgg19", 16, ("block0.2", 64, 32), ("block4.11", 512, 4)),
        ("MobileNetV2", 17, ("blocks.0.0", 8, 16), ("blocks.6.0", 160, 2)),
        ("ShuffleV1", 16, ("layer1.0", 240, 16), ("layer3.3", 960, 4)),
        ("ShuffleV2", 16, ("layer1.0", 116, 16), ("layer3.3", 464, 4)),
        ("Cnn32", 3, ("pool1", 16, 15), ("pool3", 64, 2)),
        ("Cnn32_Small", 3, ("pool1", 8, 15), ("pool3", 32, 2)),
    ],
)
def test_candidates_of_the_zoo(name: str, count: int, first: tuple[str, int, int], last: tuple[str, int, int]) -> None:
    found = zoo_candidates(name)
    ends = [(c.path, c.channels, c.height) for c in (found[0], found[-1])]
    assert (len(found), ends) == (count, [first, last])


def test_candidates_are_all_blocks_of_all_stages() -> None:
    expected = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(5)]
    assert [candidate.path for candidate in zoo_candidates("resnet32x4")] == expected


@pytest.mark.parametrize("name", MODELS.names())
def test_registry_declares_the_candidates(name: str) -> None:
    facts, found = MODELS.entry(name).facts, zoo_candidates(name)
    assert facts["candidates"].split()[0] == str(len(found))
    assert distinct(facts["channels"].split("/")) == distinct(str(candidate.channels) for candidate in found)


def test_candidates_carry_depth_and_size() -> None:
    found = list_candidates(without_memory("resnet8x4"), (3, 32, 24))
    sizes = [(c.index, c.path, c.channels, c.height, c.width) for c in found]
    assert sizes == [(1, "layer1.0", 64, 32, 24), (2, "layer2.0", 128, 16, 12), (3, "layer3.0", 256, 8, 6)]


@pytest.mark.parametrize("name", MODELS.names())
def test_multiply_adds_increase_with_depth(name: str) -> None:
    costs = [candidate.multiply_adds for candidate in zoo_candidates(name)]
    assert all(before < after for before, after in pairwise(costs))


def test_candidates_come_in_the_order_of_execution() -> None:
    found = list_candidates(Backwards(), IMAGE, ["late", "early"])
    assert [(c.path, c.index, c.channels) for c in found] == [("early", 1, 4), ("late", 2, 5)]


def test_in_place_activations_are_left_as_they_were(small_network: nn.Sequential) -> None:
    list_candidates(small_network, (2, 4, 4), ["conv"])
    assert small_network.get_submodule("relu").inplace


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was(training: bool) -> None:
    model = build_model(ModelSpec("resnet8", 4, 1)).train(training)
    list_candidates(model, (1, 8, 8))
    assert {module.training for module in model.modules()} == {training}


def test_mode_of_each_layer_is_left_as_it_was() -> None:
    model = build_model(ModelSpec("resnet8", 4, 1)).train()
    model.get_submodule("bn1").eval()
    list_candidates(model, (1, 8, 8))
    assert [name for name, module in model.named_modules() if not module.training] == ["bn1"]


def test_buffers_are_left_as_they_were() -> None:
    model = build_model(ModelSpec("resnet8", 4, 1)).train()
    before = weights_sha256(model.state_dict())
    list_candidates(model, (1, 8, 8))
    assert weights_sha256(model.state_dict()) == before


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("paths", [None, ["layer1.0"], ["layer1.9"]])
def test_no_hook_is_left_behind(paths: list[str] | None, channels: int) -> None:
    model = build_model(ModelSpec("resnet8", 4, 1))
    with suppress(InputError):
        list_candidates(model, (channels, 8, 8), paths)
    assert not any(module._forward_hooks for module in model.modules())


def test_unknown_path_is_an_error_with_the_nearest_name() -> None:
    model = build_model(ModelSpec("resnet8", 4, 1))
    with pytest.raises(InputError, match=r"^CifarResNet has no layer 'layer1.1'; did you mean 'layer1.0'\?"):
        list_candidates(model, (1, 8, 8), ["layer1.1"])


def test_layer_without_a_feature_map_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(nn.Sequential(nn.Conv2d(3, 4, 3), Dictionary()), IMAGE, ["1"])
    assert str(caught.value) == (
        "the layer '1' gives a dict, but a feature map is [B, C, H, W], tokens [B, T, D] or [B, C]; "
        "choose another layer"
    )


def test_network_without_repeated_blocks_is_an_error(small_network: nn.Sequential) -> None:
    with pytest.raises(InputError, match=r"^Sequential has no repeated blocks; .*layers\.candidates"):
        list_candidates(small_network, (2, 4, 4))


def test_repeated_blocks_are_the_outermost() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"inner": nn.Sequential(Backwards(), Backwards())})

    assert repeated_blocks(nn.Sequential(block(), block())) == ("0", "1")


def test_a_class_that_occurs_once_is_no_block() -> None:
    assert repeated_blocks(nn.Sequential(Backwards(), nn.ReLU(), nn.ReLU())) == ()


@pytest.mark.parametrize(
    ("name", "ends"),
    [("resnet8", ["layer1.0", "layer2.0", "layer3.0"]), ("resnet20", ["layer1.2", "layer2.2", "layer3.2"])],
)
def test_stage_ends_are_the_last_blocks_of_the_stages(name: str, ends: list[str]) -> None:
    assert [candidate.path for candidate in stage_ends(zoo_candidates(name))] == ends


@given(st.lists(st.sampled_from([(4, 8, 8), (8, 8, 8), (8, 4, 4)]), min_size=1, max_size=12))
@settings(deadline=None)
def test_stage_ends_separate_runs_of_one_size(sizes: list[tuple[int, int, int]]) -> None:
    candidates = [Candidate(str(i), i, *size, multiply_adds=i) for i, size in enumerate(sizes, start=1)]
    ends = [candidate.index for candidate in stage_ends(candidates)]
    runs = [sizes[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == len(sizes)
    assert all(len(set(run)) == 1 for run in runs)
    assert all(before[-1] != after[0] for before, after in pairwise(runs))


@pytest.mark.parametrize(
    ("name", "size", "count", "first", "last"),
    [
        ("resnet18", 64, 8, ("layer1.0", 64, 16), ("layer4.1", 512, 2)),
        ("resnet34", 64, 16, ("layer1.0", 64, 16), ("layer4.2", 512, 2)),
        ("resnet50", 64, 16, ("layer1.0", 256, 16), ("layer4.2", 2048, 2)),
        ("wide_resnet50_2", 64, 16, ("layer1.0", 256, 16), ("layer4.2", 2048, 2)),
        ("vgg11", 32, 8, ("features.1", 64, 32), ("features.19", 512, 2)),
        ("vgg13_bn", 32, 10, ("features.2", 64, 32), ("features.33", 512, 2)),
        ("vgg16", 32, 13, ("features.1", 64, 32), ("features.29", 512, 2)),
        ("alexnet", 64, 5, ("features.1", 64, 15), ("features.11", 256, 3)),
        ("mobilenet_v2", 64, 17, ("features.1", 16, 32), ("features.17", 320, 2)),
        ("mobilenet_v3_small", 64, 11, ("features.1", 16, 16), ("features.11", 96, 2)),
        ("shufflenet_v2_x1_0", 64, 16, ("stage2.0", 116, 8), ("stage4.3", 464, 2)),
        ("mnasnet1_0", 64, 16, ("layers.8.0", 24, 16), ("layers.13.0", 320, 2)),
        ("efficientnet_b0", 64, 16, ("features.1.0", 16, 32), ("features.7.0", 320, 2)),
        ("efficientnet_v2_s", 64, 40, ("features.1.0", 24, 32), ("features.6.14", 256, 2)),
        ("regnet_y_400mf", 64, 16, ("trunk_output.block1.block1-0", 48, 16), ("trunk_output.block4.block4-5", 440, 2)),
        ("squeezenet1_1", 64, 8, ("features.3", 128, 15), ("features.12", 512, 3)),
        ("densenet121", 64, 4, ("features.denseblock1", 256, 16), ("features.denseblock4", 1024, 2)),
        ("googlenet", 64, 9, ("inception3a", 256, 8), ("inception5b", 1024, 2)),
        ("inception_v3", 299, 9, ("Mixed_5b", 256, 35), ("Mixed_7c", 2048, 8)),
        ("convnext_tiny", 64, 18, ("features.1.0", 96, 16), ("features.7.2", 768, 2)),
        (
            "vit_b_16",
            224,
            12,
            ("encoder.layers.encoder_layer_0", 768, 14),
            ("encoder.layers.encoder_layer_11", 768, 14),
        ),
        ("maxvit_t", 224, 4, ("blocks.0", 64, 56), ("blocks.3", 512, 7)),
        ("swin_t", 64, 12, ("features.1.0", 96, 16), ("features.7.1", 768, 2)),
        ("swin_v2_t", 64, 12, ("features.1.0", 96, 16), ("features.7.1", 768, 2)),
    ],
)
def test_candidates_of_torchvision_networks(
    name: str, size: int, count: int, first: tuple[str, int, int], last: tuple[str, int, int]
) -> None:
    found = list_candidates(torchvision_model(name), (3, size, size))
    ends = [(c.path, c.channels, c.height) for c in (found[0], found[-1])]
    assert (len(found), ends) == (count, [first, last])
    assert all(before.multiply_adds < after.multiply_adds for before, after in pairwise(found))


def test_blocks_that_seem_to_have_their_channels_last_are_an_error() -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(nn.Sequential(Permuted(), ChannelsLast(), ChannelsLast()), IMAGE)
    assert str(caught.value) == (
        "the block '1' gives [1, 32, 32, 3], which seems to have its channels last; list layers that give "
        "[B, C, H, W] in the study (layers.candidates, student.candidates)"
    )


def test_layers_that_a_network_names_itself_are_its_candidates() -> None:
    network = nn.Sequential(Block(3), nn.ReLU(), Block(3), nn.ReLU())
    network.hint_layers = ("1", "3")  # type: ignore[assignment]
    assert [candidate.path for candidate in list_candidates(network, IMAGE)] == ["1", "3"]


def test_layers_of_the_study_come_before_those_that_a_network_names_itself() -> None:
    found = list_candidates(without_memory("Cnn32"), IMAGE, ["conv?"])
    assert [candidate.path for candidate in found] == ["conv1", "conv2", "conv3"]


def test_a_network_that_feeds_a_module_a_view_of_a_parameter_has_candidates() -> None:
    class WithToken(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.scale(self.token.expand(len(x), -1, -1, -1)))

    network = WithToken(3, 3)
    network.token, network.scale = nn.Parameter(torch.zeros(1, 3, 1, 1)), nn.Conv2d(3, 3, 1)
    assert len(list_candidates(network, IMAGE, ["scale"])) == 1
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_frozen_weights_stay_frozen() -> None:
    model = build_model(ModelSpec("resnet8", 4, 1))
    model.get_parameter("fc.weight").requires_grad_(False)
    list_candidates(model, (1, 8, 8))
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["fc.weight"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_multiply_adds_of_a_vision_transformer_count_attention(device: str) -> None:
    with torch.device(device):
        model = VisionTransformer(32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128)
    found = list_candidates(model, IMAGE)
    patches, block = 16 * 64 * 3 * 8 * 8, transformer_block(tokens=17, width=64, hidden=128)
    assert [(c.channels, c.height, c.width) for c in found] == [(64, 4, 4)] * 3
    assert [c.multiply_adds for c in found] == [patches + block, patches + 2 * block, patches + 3 * block]


def test_multiply_adds_count_what_the_fast_path_of_transformer_layers_would_hide() -> None:
    found = list_candidates(Encoder(batch_first=True), IMAGE, ["layers.layers.2"])
    expected = 16 * 32 * 3 * 8 * 8 + 3 * transformer_block(tokens=16, width=32, hidden=64)
    assert found[0].multiply_adds == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_of_transformer_layers_is_left_as_it_was(enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        list_candidates(build_model(ModelSpec("resnet8", 4, 1)), (1, 8, 8))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_tokens_with_the_batch_second_are_an_error() -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(Encoder(batch_first=False), IMAGE)
    assert str(caught.value) == (
        "the layer 'layers.layers.0' gives the feature map [16, 32, 1, 1] for one image, but a feature map is "
        "[B, C, H, W] and tokens are [B, T, D]; choose another layer, or put the batch first"
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layer*.?"], ["layer1.0", "layer2.0", "layer3.0"]),
        (["layer[13].0"], ["layer1.0", "layer3.0"]),
        (["layer*"], ["layer1", "layer2", "layer3"]),
        (["*.*.conv?"], [f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (1, 2)]),
        (["layer3.0", "layer1.*", "layer?.0"], ["layer1.0", "layer2.0", "layer3.0"]),
        (["layer2.0", "layer2.0"], ["layer2.0"]),
        (["layer1", "layer1.0"], ["layer1.0", "layer1"]),
    ],
)
def test_patterns_match_segment_by_segment_and_the_order_is_that_of_execution(
    patterns: list[str], expected: list[str]
) -> None:
    found = list_candidates(without_memory("resnet8"), IMAGE, patterns)
    assert [candidate.path for candidate in found] == expected
    assert [candidate.index for candidate in found] == list(range(1, len(expected) + 1))


def test_a_path_with_the_signs_of_a_pattern_matches_itself() -> None:
    network = nn.Sequential()
    network.add_module("conv[1]", nn.Conv2d(3, 4, 1))
    assert [candidate.path for candidate in list_candidates(network, IMAGE, ["conv[1]"])] == ["conv[1]"]


@pytest.mark.parametrize(
    ("pattern", "mend"),
    [
        ("layer9.?", "did you mean 'layer3.0'? (layer1.0, layer2.0, layer3.0)"),
        ("LAYER?.0", "did you mean 'layer3.0'? (layer1.0, layer2.0, layer3.0)"),
        ("*.1", "choose one of layer1.0, layer2.0, layer3.0"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(pattern: str, mend: str) -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(without_memory("resnet8"), IMAGE, ["layer1.0", pattern])
    assert str(caught.value) == f"CifarResNet has no layer {pattern!r}; {mend}"


@pytest.mark.parametrize("pattern", ["*", "heads"])
def test_a_matched_layer_that_does_not_run_is_an_error(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(WithHeads(), IMAGE, ["features", pattern])
    assert str(caught.value) == ("the layer 'heads' did not run in the forward pass; choose one of features")


def test_a_layer_that_the_network_writes_over_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(torchvision_model("resnet18"), IMAGE, ["layer1.0", "layer*.?.bn2"])
    assert str(caught.value) == (
        "the network writes over what the layer 'layer1.0.bn2' gives; choose the layer that contains it, "
        "or the one after it"
    )


def test_a_layer_that_runs_twice_stands_where_it_runs_last() -> None:
    found = list_candidates(Twice(), IMAGE, ["again", "between"])
    once = 3 * 3 * 32 * 32
    assert [(c.path, c.multiply_adds) for c in found] == [("between", 2 * once), ("again", 3 * once)]


def test_images_that_the_network_refuses_are_an_error() -> None:
    model = torchvision_model("vit_b_16")
    with pytest.raises(InputError) as caught:
        list_candidates(model, IMAGE)
    assert str(caught.value) == (
        "VisionTransformer cannot read images of 3×32×32 (Wrong image height! Expected 224 but got 32!); "
        "change data or model"
    )


def test_heads_are_no_candidates() -> None:
    assert repeated_blocks(WithHeads()) == ("heads.0", "heads.1")
    assert [candidate.path for candidate in list_candidates(WithHeads(), IMAGE)] == ["features.1", "features.3"]


def test_blocks_in_containers_come_before_blocks_elsewhere() -> None:
    network = nn.ModuleDict({"stem": Backwards(), "late": Backwards(), "body": nn.Sequential(Block(5), Block(5))})
    assert repeated_blocks(network) == ("body.0", "body.1")


def test_blocks_outside_of_containers_are_found() -> None:
    network = nn.ModuleDict({"stem": Unit(3, 4), "other": Unit(4, 4), "early": Block(4), "late": Block(4)})
    assert repeated_blocks(network) == ("early", "late")


def test_blocks_of_one_convolution_count_where_there_are_no_larger_ones() -> None:
    assert repeated_blocks(nn.Sequential(Unit(3, 4), Unit(4, 4), nn.Flatten(), nn.Linear(4, 5))) == ("0", "1")


def test_blocks_of_one_convolution_do_not_count_beside_larger_ones() -> None:
    assert repeated_blocks(nn.Sequential(Unit(3, 4), Block(4), Unit(4, 4), Block(4))) == ("1", "3")


def test_a_small_block_of_a_class_with_larger_ones_counts() -> None:
    small, large = Block(4), Block(4)
    small.second = nn.Identity()  # type: ignore[assignment]
    assert repeated_blocks(nn.Sequential(small, large)) == ("0", "1")


def test_a_sequential_with_a_forward_of_its_own_is_a_block() -> None:
    def block() -> nn.Module:
        return Residual(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))

    assert repeated_blocks(nn.Sequential(block(), block())) == ("0", "1")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ELU()], ("1", "5")),
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.GroupNorm(1, 4), nn.Dropout(), nn.ReLU()], ("0", "2")),
        ([nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 4, 3)], ("0", "3")),
        ([nn.ReLU(), nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU())], ("2", "3.1")),
        ([nn.Conv2d(3, 4, 3), nn.ReLU()], ()),
    ],
)
def test_a_unit_of_a_flat_chain_ends_before_anything_but_norm_and_activation(
    layers: list[nn.Module], expected: tuple[str, ...]
) -> None:
    assert repeated_blocks(nn.Sequential(nn.Sequential(*layers), nn.Linear(4, 5))) == tuple(f"0.{p}" for p in expected)


def test_a_unit_ends_before_an_activation_that_the_chain_shares() -> None:
    relu = nn.ReLU()
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(4, 5))
    assert repeated_blocks(chain) == ("0", "2")


def test_a_convolution_that_makes_the_logits_is_no_unit() -> None:
    def unit() -> list[nn.Module]:
        return [nn.Conv2d(3, 3, 3), nn.ReLU()]

    network = nn.Sequential(*unit(), *unit(), *unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert repeated_blocks(network) == ("1", "3")


def test_blocks_with_as_many_channels_as_columns_have_their_channels_second() -> None:
    found = list_candidates(torchvision_model("convnext_tiny"), (3, 384, 384))
    assert (found[0].channels, found[0].height, found[0].width) == (96, 96, 96)


def test_images_of_the_wrong_dimensions_for_a_layer_are_an_error() -> None:
    with pytest.raises(InputError) as caught:
        list_candidates(nn.Sequential(nn.Flatten(), nn.BatchNorm2d(48)), (3, 4, 4), ["1"])
    expected = "Sequential cannot read images of 3×4×4 (expected 4D input (got 2D input)); change data or model"
    assert str(caught.value) == expected


def test_a_network_without_weights_has_candidates() -> None:
    found = list_candidates(nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), IMAGE, ["*"])
    sizes = [(c.path, c.channels, c.height, c.multiply_adds) for c in found]
    assert sizes == [("0", 3, 16, 0), ("1", 3, 16, 0)]


def test_the_network_runs_once_in_evaluation_without_gradients() -> None:
    class Watched(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    seen: list[tuple[bool, bool]] = []
    list_candidates(nn.Sequential(Watched(3, 4, 1)), IMAGE, ["0"])
    assert seen == [(False, False)]
