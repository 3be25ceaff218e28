from typing import Any

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.feature_maps import feature_map, gives_channels_last
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock


def numbered(*shape: int) -> Tensor:
    """A tensor whose values are all different."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def message_of(output: Any) -> str:
    with pytest.raises(InputError) as caught:
        feature_map(output, "block.1")
    return str(caught.value)


def test_a_feature_map_is_left_as_it_is() -> None:
    output = numbered(2, 3, 4, 5)
    assert feature_map(output, "block") is output


@pytest.mark.parametrize("kind", [tuple, list])
def test_of_several_outputs_the_first_counts(kind: Any) -> None:
    output = numbered(2, 3, 4, 5)
    assert feature_map(kind([output, None, numbered(7)]), "block") is output


@pytest.mark.parametrize(
    ("tokens", "height", "width"),
    [
        (1, 1, 1),
        (2, 2, 1),
        (3, 3, 1),
        (4, 2, 2),
        (6, 6, 1),
        (7, 7, 1),
        (9, 3, 3),
        (16, 4, 4),
        (18, 18, 1),
        (196, 14, 14),
    ],
)
def test_tokens_lie_in_a_square_row_by_row_or_in_a_column(tokens: int, height: int, width: int) -> None:
    output = numbered(2, tokens, 3)
    found = feature_map(output, "block")
    assert found.shape == (2, 3, height, width)
    for token in range(tokens):
        assert torch.equal(found[:, :, token // width, token % width], output[:, token])


@pytest.mark.parametrize(("tokens", "side"), [(5, 2), (10, 3), (17, 4), (197, 14)])
def test_a_class_token_before_a_square_of_tokens_is_left_out(tokens: int, side: int) -> None:
    output = numbered(2, tokens, 3)
    found = feature_map(output, "block")
    assert found.shape == (2, 3, side, side)
    assert torch.equal(found, feature_map(output[:, 1:], "block"))


def test_tokens_in_a_tuple_are_tokens() -> None:
    assert feature_map((numbered(2, 9, 3), None), "attention").shape == (2, 3, 3, 3)


def test_a_vector_is_a_feature_map_of_one_pixel() -> None:
    output = numbered(2, 3)
    found = feature_map(output, "fc")
    assert found.shape == (2, 3, 1, 1)
    assert torch.equal(found.flatten(1), output)


@pytest.mark.parametrize("shape", [(2, 3), (2, 9, 3), (2, 10, 3), (2, 7, 3), (2, 3, 4, 5)])
def test_nothing_is_copied(shape: tuple[int, ...]) -> None:
    output = numbered(*shape)
    assert feature_map(output, "block").untyped_storage().data_ptr() == output.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("output", "described"),
    [
        ({"logits": torch.zeros(2, 3)}, "a dict"),
        (None, "a NoneType"),
        ((), "a tuple that is empty"),
        ([None, torch.zeros(2, 3)], "a list that begins with a NoneType"),
        (((torch.zeros(2, 3),),), "a tuple that begins with a tuple that begins with a tensor [2, 3]"),
        (torch.zeros(2), "a tensor [2]"),
        (torch.zeros(2, 3, 4, 5, 6), "a tensor [2, 3, 4, 5, 6]"),
        ((torch.zeros(()),), "a tuple that begins with a tensor []"),
    ],
)
def test_anything_else_is_an_error_that_says_what_the_layer_gives(output: Any, described: str) -> None:
    assert message_of(output) == (
        f"the layer 'block.1' gives {described}, but a feature map is [B, C, H, W], tokens [B, T, D] or [B, C]; "
        "choose another layer"
    )


def test_channels_come_second_where_a_layer_is_known_to_give_them_last() -> None:
    output = numbered(2, 3, 4, 5)
    found = feature_map(output, "block", channels_last=True)
    assert found.shape == (2, 5, 3, 4)
    assert torch.equal(found[1, 2], output[1, :, :, 2])


def test_tokens_have_their_channels_last_anyway() -> None:
    assert feature_map(numbered(2, 9, 4), "block", channels_last=True).shape == (2, 4, 3, 3)


def test_layers_of_swin_give_channels_last() -> None:
    block, merging = SwinTransformerBlock(8, 2, [2, 2], [0, 0]), PatchMerging(8)
    assert all(map(gives_channels_last, (block, merging, nn.Sequential(nn.ReLU(), nn.Sequential(block)))))


@pytest.mark.parametrize("module", [nn.Linear(3, 3), nn.Sequential(), nn.Sequential(nn.LayerNorm(3))])
def test_other_layers_do_not(module: nn.Module) -> None:
    assert not gives_channels_last(module)
