from collections import Counter

import numpy as np
import pytest
import torch
from hintsearch.distill.batches import Augmentation, augment
from hintsearch.distill.crops import random_boxes, resized_boxes
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional


def drawn(count: int, size: tuple[int, int], least_area: float, seed: int = 0) -> Tensor:
    return random_boxes(count, size, least_area, torch.Generator().manual_seed(seed))


def torchvisions(count: int, size: tuple[int, int], least_area: float) -> Tensor:
    """Boxes [count, 4] of the class that ours are to agree with."""
    image = torch.zeros(1, *size)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        boxes = [RandomResizedCrop.get_params(image, [least_area, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    return torch.tensor(boxes)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two empirical distribution functions, over its 0.1 % point."""
    points = torch.cat([ours, theirs]).unique()
    below = [torch.searchsorted(values.sort().values, points, right=True) / len(values) for values in (ours, theirs)]
    return float((below[0] - below[1]).abs().max()) / (1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs)))


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize(("size", "least_area"), [((32, 32), 0.08), ((20, 32), 0.5), ((40, 10), 0.9)])
def test_boxes_are_those_of_torchvision_in_distribution(size: tuple[int, int], least_area: float, column: int) -> None:
    ours, theirs = drawn(20_000, size, least_area), torchvisions(2_000, size, least_area)
    assert distance(ours[:, column], theirs[:, column]) < 1


@pytest.mark.parametrize("size", [(32, 32), (7, 19), (1, 1)])
def test_boxes_lie_in_the_image(size: tuple[int, int]) -> None:
    top, left, height, width = drawn(5_000, size, 0.05).T
    assert bool((torch.stack([top, left]) >= 0).all())
    assert bool((torch.stack([height, width]) >= 1).all())
    assert bool((top + height <= size[0]).all())
    assert bool((left + width <= size[1]).all())


@pytest.mark.parametrize(("size", "middle"), [((100, 10), (43, 0, 13, 10)), ((10, 100), (0, 43, 10, 13))])
def test_where_no_box_fits_it_is_the_middle(size: tuple[int, int], middle: tuple[int, ...]) -> None:
    assert Counter(map(tuple, drawn(50, size, 0.9).tolist())) == {middle: 50}


def test_all_offsets_of_a_box_are_equally_likely() -> None:
    """Boxes of 3×3 in images of 4×4, by far the most of those that keep half of the area."""
    boxes = drawn(30_000, (4, 4), 0.5)
    chosen = boxes[(boxes[:, 2] == 3) & (boxes[:, 3] == 3), :2]
    counts = list(Counter(map(tuple, chosen.tolist())).values())
    expected = len(chosen) / 4
    assert len(counts) == 4
    assert sum((count - expected) ** 2 / expected for count in counts) < 16.27  # 0.1 % point of χ² of 3


def test_boxes_are_resized_as_torchvision_does_it_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 12, 9), dtype=torch.uint8, generator=generator)
    boxes = drawn(40, (12, 9), 0.1)
    ours = resized_boxes(images, boxes)
    for image, box, made in zip(images, boxes.tolist(), ours, strict=True):
        theirs = functional.resized_crop(image.float(), *box, [12, 9], antialias=True)
        # Both round halves, but not after the same float operations.
        assert (made.float() - theirs).abs().max() <= 0.5 + 1e-3


def test_box_of_the_whole_image_changes_nothing() -> None:
    images = torch.randint(0, 256, (5, 2, 8, 6), dtype=torch.uint8)
    assert torch.equal(resized_boxes(images, torch.tensor([[0, 0, 8, 6]] * 5)), images)


def test_augmentation_with_a_least_area_crops_to_it() -> None:
    """A ramp from left to right: the crop's span is the box's width."""
    ramp = torch.arange(0, 160, 5, dtype=torch.uint8).expand(500, 1, 32, 32)
    made = augment(ramp, Augmentation(crop_padding=4, flip=False, min_crop_area=0.25), torch.Generator().manual_seed(0))
    spans = (made[:, 0, 0, -1].int() - made[:, 0, 0, 0].int()).div(5) + 1
    # Half of the side at an aspect ratio of 3/4, to the whole side; without padding no pixel is black.
    assert 13 <= int(spans.min()) < 18
    assert int(spans.max()) == 32
    assert len(spans.unique()) > 10


def test_augmentation_with_a_least_area_flips_half() -> None:
    ramp = torch.arange(0, 160, 5, dtype=torch.uint8).expand(2_000, 1, 32, 32)
    made = augment(ramp, Augmentation(min_crop_area=0.5), torch.Generator().manual_seed(0))
    flipped = int((made[:, 0, 0, 0] > made[:, 0, 0, -1]).sum())
    assert abs(flipped - 1_000) < 150
