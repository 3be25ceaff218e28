from contextlib import suppress
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


def without_memory(name: str) -> nn.Module:
    """A network on the meta device: its layers have shapes, but no values."""
    with torch.device("meta"):
        return build_model(ModelSpec(name, 100, 3))


def whole_network(name: str) -> int:
    """Multiply-adds up to the last candidate, and those of the classifier."""
    model = without_memory(name)
    return list_candidates(model, IMAGE)[-1].multiply_adds + model.get_parameter("fc.weight").numel()


@pytest.mark.parametrize(
    ("name", "millions", "rounding"),
    [
        ("resnet8", 12.5, 0.05),
        ("resnet20", 40.8, 0.05),
        ("resnet32", 69.1, 0.05),
        ("resnet56", 125.8, 0.05),
        ("resnet110", 253.2, 0.05),
        ("resnet8x4", 177.1, 0.05),
        ("resnet32x4", 1083, 0.5),
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, millions: float, rounding: float) -> None:
    assert whole_network(name) / 1e6 == pytest.approx(millions, abs=rounding)


@pytest.mark.parametrize("name", MODELS.names())
def test_multiply_adds_are_half_of_what_torch_counts(name: str) -> None:
    with FlopCounterMode(display=False) as counter:
        without_memory(name).eval()(torch.zeros(1, *IMAGE, device="meta"))
    assert 2 * whole_network(name) == counter.get_total_flops()


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


@pytest.mark.parametrize(("name", "count"), [("resnet56", 27), ("resnet110", 54), ("resnet32x4", 15)])
def test_candidates_are_the_residual_blocks(name: str, count: int) -> None:
    found = list_candidates(without_memory(name), IMAGE)
    per_stage = count // 3
    expected = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(per_stage)]
    assert [candidate.path for candidate in found] == expected


@pytest.mark.parametrize("name", MODELS.names())
def test_registry_declares_the_number_of_candidates(name: str) -> None:
    found = list_candidates(without_memory(name), IMAGE)
    assert MODELS.entry(name).facts["candidates"] == f"{len(found)} residual blocks"


def test_candidates_carry_depth_and_size() -> None:
    found = list_candidates(without_memory("resnet8x4"), (3, 32, 24))
    sizes = [(c.index, c.path, c.channels, c.height, c.width) for c in found]
    assert sizes == [(1, "layer1.0", 64, 32, 24), (2, "layer2.0", 128, 16, 12), (3, "layer3.0", 256, 8, 6)]


@pytest.mark.parametrize("name", MODELS.names())
def test_multiply_adds_increase_with_depth(name: str) -> None:
    costs = [candidate.multiply_adds for candidate in list_candidates(without_memory(name), IMAGE)]
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


@pytest.mark.parametrize("paths", [["layer1.0"], ["fc"], ["layer1.9"]])
def test_no_hook_is_left_behind(paths: list[str]) -> None:
    model = build_model(ModelSpec("resnet8", 4, 1))
    with suppress(InputError):
        list_candidates(model, (1, 8, 8), paths)
    assert not any(module._forward_hooks for module in model.modules())


def test_unknown_path_is_an_error_with_the_nearest_name() -> None:
    model = build_model(ModelSpec("resnet8", 4, 1))
    with pytest.raises(InputError, match=r"^CifarResNet has no layer 'layer1.1'; did you mean 'layer1.0'\?"):
        list_candidates(model, (1, 8, 8), ["layer1.1"])


def test_layer_without_a_feature_map_is_an_error() -> None:
    model = build_model(ModelSpec("resnet8", 4, 1))
    with pytest.raises(InputError) as caught:
        list_candidates(model, (1, 8, 8), ["fc"])
    expected = "the layer 'fc' gives no feature map [B, C, H, W]; choose a convolutional layer"
    assert str(caught.value) == expected


def test_network_without_repeated_blocks_is_an_error(small_network: nn.Sequential) -> None:
    with pytest.raises(InputError, match=r"^Sequential has no repeated blocks; .*layers\.candidates"):
        list_candidates(small_network, (2, 4, 4))


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("resnet34", 16)])
def test_repeated_blocks_of_torchvision_networks(name: str, count: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    blocks = repeated_blocks(model)
    assert len(blocks) == count
    assert {path.split(".")[0] for path in blocks} == {"layer1", "layer2", "layer3", "layer4"}


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
    assert [candidate.path for candidate in stage_ends(list_candidates(without_memory(name), IMAGE))] == ends


@given(st.lists(st.sampled_from([(4, 8, 8), (8, 8, 8), (8, 4, 4)]), min_size=1, max_size=12))
@settings(deadline=None)
def test_stage_ends_separate_runs_of_one_size(sizes: list[tuple[int, int, int]]) -> None:
    candidates = [Candidate(str(i), i, *size, multiply_adds=i) for i, size in enumerate(sizes, start=1)]
    ends = [candidate.index for candidate in stage_ends(candidates)]
    runs = [sizes[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == len(sizes)
    assert all(len(set(run)) == 1 for run in runs)
    assert all(before[-1] != after[0] for before, after in pairwise(runs))
