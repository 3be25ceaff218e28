import json
from typing import Any

import pytest
import torch
from hintsearch.models.errors import InputError
from hintsearch.models.preprocessing import InputTransform, Preprocessing, resized
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

CPU = torch.device("cpu")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 2, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pixels_are_normalised_by_channel(pixels: torch.Tensor) -> None:
    made = InputTransform(Preprocessing((0.25, 0.5), (0.5, 2.0)), CPU)(pixels)
    scaled = pixels.double() / 255
    expected = torch.stack([(scaled[:, 0] - 0.25) / 0.5, (scaled[:, 1] - 0.5) / 2.0], dim=1)
    torch.testing.assert_close(made, expected.float())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(4, 5), (18, 14), (9, 3)])
def test_images_are_resized_as_torchvision_does(
    pixels: torch.Tensor, size: tuple[int, int], interpolation: str
) -> None:
    theirs = functional.resize(pixels.float(), list(size), InterpolationMode(interpolation), antialias=True)
    torch.testing.assert_close(resized(pixels, size, interpolation), theirs.clamp(0, 255))


def test_nearest_keeps_the_values_of_the_pixels(pixels: torch.Tensor) -> None:
    assert torch.equal(resized(pixels, (18, 14), "nearest"), pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_resized_values_stay_in_range() -> None:
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    made = resized(edge, (32, 32), "bicubic")
    assert (made.min(), made.max()) == (0, 255)


def test_images_of_the_right_size_are_left_as_they_are(pixels: torch.Tensor) -> None:
    without, with_size = (
        InputTransform(Preprocessing((0.5, 0.5), (1.0, 1.0), size), CPU)(pixels) for size in (None, (9, 7))
    )
    assert torch.equal(without, with_size)


def test_size_is_that_of_the_result(pixels: torch.Tensor) -> None:
    assert InputTransform(Preprocessing((0.5, 0.5), (1.0, 1.0), (4, 6)), CPU)(pixels).shape == (3, 2, 4, 6)


def test_memory_format_is_kept(pixels: torch.Tensor) -> None:
    transform = InputTransform(Preprocessing((0.5, 0.5), (1.0, 1.0), (4, 6)), CPU)
    made = transform(pixels.contiguous(memory_format=torch.channels_last))
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_unknown_interpolation_is_an_error_with_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        Preprocessing((0.5,), (1.0,), interpolation="bilnear")
    assert str(caught.value) == (
        "unknown interpolation 'bilnear'; did you mean 'bilinear'? (bicubic, bilinear, nearest)"
    )


@pytest.mark.parametrize("changes", [{}, {"size": (4, 6), "interpolation": "bicubic"}])
def test_preprocessing_survives_the_way_through_json(changes: dict[str, Any]) -> None:
    one = Preprocessing((0.25, 0.5), (0.5, 2.0), **changes)
    assert Preprocessing.from_dict(json.loads(json.dumps(one.to_dict()))) == one
