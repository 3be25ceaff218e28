"""Images that are decoded one at a time, and what a data set ships."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .splits import Images, ImageSet, Labels, Rows, content_hash

# Their values do not fit into 8 bits: Pillow would clip them without a word.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class ImageSource(Protocol):
    """Images that are decoded one at a time, in their own sizes."""

    @property
    def labels(self) -> Labels:
        """Int64 [N]."""

    @property
    def channels(self) -> int:
        """Of every image."""

    def __len__(self) -> int:
        """Images."""

    def subset(self, indices: Rows) -> "ImageSource":
        """The images at `indices`, in that order."""

    def name(self, row: int) -> str:
        """What to call an image in a message, e.g. its path."""

    def pixels(self, row: int) -> Images:
        """One image, uint8 [H, W, C]; raises anything if it cannot be read. Called from several threads at once."""

    def fingerprint(self) -> str:
        """A hash that changes with the images and their labels, made without decoding them."""


@dataclass(frozen=True)
class RawData:
    """What a data set ships.

    Attributes:
        train: training images.
        test: test images if it has them.
        validation: validation images if it has them; they are then not carved from the training images.
        crop_ratio: the usual ratio of crop to shorter side in evaluation.
        mean: the usual channel means, if there are any.
        sd: the usual channel standard deviations.
    """

    train: ImageSet | ImageSource
    test: ImageSet | ImageSource | None
    validation: ImageSet | ImageSource | None = None
    crop_ratio: float = 1.0
    mean: tuple[float, ...] | None = None
    sd: tuple[float, ...] | None = None


class ImageFiles:
    """Image files below a folder, read as RGB.

    The paths are one array of bytes: of a million files, Python strings would be copied to every process.

    Args:
        root: the folder.
        paths: of the files, relative to the folder.
        labels: int64 [N].
    """

    channels = 3

    def __init__(self, root: Path, paths: Sequence[str] | NDArray[np.bytes_], labels: Labels) -> None:
        self._root = str(root.resolve())
        self._paths = (
            paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        )
        self._labels = labels
        self._fingerprint: str | None = None

    @property
    def labels(self) -> Labels:
        """Int64 [N]."""
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def subset(self, indices: Rows) -> "ImageFiles":
        """The files at `indices`, in that order."""
        return ImageFiles(Path(self._root), self._paths[indices], self._labels[indices])

    def name(self, row: int) -> str:
        """The path of a file."""
        return os.path.join(self._root, os.fsdecode(bytes(self._paths[row])))

    def pixels(self, row: int) -> Images:
        """One image, uint8 [H, W, 3]."""
        with Image.open(self.name(row)) as image:
            return pixels_of(image, self.channels)

    def fingerprint(self) -> str:
        """A hash of the relative paths, the sizes of the files in bytes, and the labels."""
        if self._fingerprint is None:
            sizes = np.array([_file_size(self.name(row)) for row in range(len(self))], dtype=np.int64)
            self._fingerprint = content_hash("files", self._paths, sizes, self._labels)
        return self._fingerprint


def pixels_of(image: Image.Image, channels: int) -> Images:
    """A Pillow image as uint8 [H, W, C].

    Args:
        image: of any mode with 8 bits a channel.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: more than 8 bits a channel.
    """
    if image.mode in _DEEP_MODES:
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        # A missing file is reported when it is read, up to the limit of unreadable images.
        return -1
