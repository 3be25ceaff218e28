"""What a network's input must look like, and how pixels are made into it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, nearest

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images.

    Attributes:
        mean: channel means in 0..1 that are subtracted.
        sd: channel standard deviations that are divided by.
        size: (height, width) to which the images are resized; None: they stay as they are.
        interpolation: by which they are resized: nearest, bilinear or bicubic; the latter two antialiased.
    """

    mean: tuple[float, ...]
    sd: tuple[float, ...]
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"unknown interpolation {self.interpolation!r}; {nearest(self.interpolation, INTERPOLATIONS)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain types; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`, also after a way through JSON or YAML."""
        tuples = {key: tuple(content[key]) for key in ("mean", "sd", "size") if content.get(key) is not None}
        return cls(**{**content, **tuples})


class InputTransform:
    """Makes pixels into a network's input, on a device.

    Args:
        preprocessing: what the network wants.
        device: where the pixels lie.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self.preprocessing = preprocessing
        # Of pixels in 0..255, so that the division by 255 costs no pass of its own.
        self._mean = torch.tensor(preprocessing.mean, device=device).mul(255).view(1, -1, 1, 1)
        self._scale = torch.tensor(preprocessing.sd, device=device).mul(255).reciprocal().view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Uint8 [B, C, H, W] → float32 [B, C, height, width], resized and normalised, in the memory format it came."""
        size = self.preprocessing.size
        if size is not None and tuple(pixels.shape[2:]) != size:
            pixels = resized(pixels, size, self.preprocessing.interpolation)
        return torch.sub(pixels, self._mean).mul_(self._scale)


def resized(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Uint8 [B, C, H, W] → float32 [B, C, height, width] in 0..255; no aspect ratio is kept.

    Args:
        pixels: the images.
        size: (height, width).
        interpolation: nearest, bilinear or bicubic; the latter two antialiased, as torchvision's `resize` is.
    """
    if interpolation == "nearest":
        return torch.nn.functional.interpolate(pixels.float(), size, mode="nearest")
    made = torch.nn.functional.interpolate(pixels.float(), size, mode=interpolation, antialias=True)
    # Bicubic overshoots.
    return made.clamp_(0, 255)
