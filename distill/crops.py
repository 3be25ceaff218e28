"""Random resized crops: boxes of random area and aspect ratio, drawn as torchvision's RandomResizedCrop draws them."""

import math

import torch
from torch import Tensor

# Of torchvision's RandomResizedCrop: aspect ratios, and how often a box that does not fit is drawn again.
ASPECT_RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def random_boxes(count: int, size: tuple[int, int], least_area: float, generator: torch.Generator) -> Tensor:
    """Boxes in images of one size, in distribution as RandomResizedCrop's.

    Args:
        count: how many images.
        size: (height, width) of the images.
        least_area: the least share of an image's area that a box covers, 0..1.
        generator: a CPU generator.

    Returns:
        int64 [count, 4]: top, left, height and width of each box.
    """
    height, width = size
    uniform = torch.rand((2 * TRIES + 2, count), generator=generator, dtype=torch.float64)
    area = height * width * (least_area + (1 - least_area) * uniform[:TRIES])
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    ratio = torch.exp(low + (high - low) * uniform[TRIES : 2 * TRIES])
    heights, widths = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    # The first try that fits; where none does, the middle.
    first = fits.int().argmax(0, keepdim=True)
    middle = _middle(size)
    none = ~fits.any(0)
    box_heights = torch.where(none, middle[2], heights.gather(0, first)[0])
    box_widths = torch.where(none, middle[3], widths.gather(0, first)[0])
    top = torch.where(none, middle[0], (uniform[-2] * (height - box_heights + 1)).long())
    left = torch.where(none, middle[1], (uniform[-1] * (width - box_widths + 1)).long())
    return torch.stack([top, left, box_heights, box_widths], dim=1)


def resized_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Cuts a box out of each image and resizes it bilinearly to the size of the image.

    All images at once. A box is never larger than the image, so that antialiasing would change nothing.

    Args:
        images: uint8 [n, C, H, W].
        boxes: int64 [n, 4] as `random_boxes` gives them.

    Returns:
        uint8 [n, C, H, W].
    """
    height, width = images.shape[2:]
    rows, columns = _places(boxes[:, 0], boxes[:, 2], height), _places(boxes[:, 1], boxes[:, 3], width)
    shape = (len(images), height, width)
    grid = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], dim=3)
    made = torch.nn.functional.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    return made.round_().to(torch.uint8)


def _places(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Where each of `side` pixels lies in its image, −1..1 from edge to edge: [n, side]."""
    start, length = start[:, None].float(), length[:, None].float()
    pixel = torch.arange(side, device=start.device)
    # No further than the box's own outermost pixels: what lies around the box is not in the crop.
    inside = ((pixel + 0.5) * (length / side) - 0.5).clamp_min(0).minimum(length - 1)
    return (start + inside + 0.5) * (2 / side) - 1


def _middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box in the middle with an allowed aspect ratio."""
    height, width = size
    box_height, box_width = height, width
    if width / height < ASPECT_RATIOS[0]:
        box_height = round(width / ASPECT_RATIOS[0])
    elif width / height > ASPECT_RATIOS[1]:
        box_width = round(height * ASPECT_RATIOS[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
