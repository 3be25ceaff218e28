"""What training, evaluation and the layer pass know of a split, whether it lies in memory or is decoded when read."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Rows = NDArray[np.intp]


class Split(Protocol):
    """Images with their labels."""

    @property
    def labels(self) -> Labels:
        """Int64 [N], 0 .. classes-1."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""

    def __len__(self) -> int:
        """Images."""

    def subset(self, indices: Rows) -> "Split":
        """The images at `indices`, in that order."""

    def read(self, rows: Rows) -> Images:
        """The images at `rows`, as evaluation and the layer pass see them: uint8 [n, C, H, W]."""

    def fingerprint(self) -> str:
        """A hash that changes with the images and their labels."""


@dataclass(frozen=True)
class ImageSet:
    """A split in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], 0 .. classes-1.
    """

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, indices: Rows) -> "ImageSet":
        """The images at `indices`, in that order."""
        return ImageSet(np.ascontiguousarray(self.images[indices]), self.labels[indices])

    def read(self, rows: Rows) -> Images:
        """The images at `rows`: uint8 [n, C, H, W]."""
        return self.images[rows]

    def fingerprint(self) -> str:
        """A hash of the pixels and the labels."""
        return content_hash("arrays", self.images, self.labels)


def content_hash(facts: object, *arrays: NDArray[Any]) -> str:
    """Hash of arrays, their shapes and types, and of what has a `repr` of its own."""
    digest = hashlib.sha256(repr(facts).encode())
    for array in arrays:
        digest.update(repr((array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
