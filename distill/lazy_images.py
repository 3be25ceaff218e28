"""A split whose images are decoded when they are read, because they do not fit into memory."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..models.errors import InputError, nearest, reason
from ..models.preprocessing import INTERPOLATIONS
from .image_sources import ImageSource
from .splits import Images, ImageSet, Labels, Rows

# Beyond the limit, so many more unreadable images are looked for, so that one run tells of several.
_MORE_REPORTED = 20
_NAMED = 3

_log = logging.getLogger("hintsearch.data")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Decoding:
    """How a decoded image becomes one of the split's size.

    Attributes:
        size: (height, width).
        crop_ratio: crop to shorter side: the image is resized until it covers size / crop_ratio, and the middle is cut
            out; 1: as much as possible is kept.
        interpolation: nearest, bilinear or bicubic; the latter two antialiased.
        same_size: whether every image must have that size already.
    """

    size: tuple[int, int]
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"
    same_size: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"unknown interpolation {self.interpolation!r}; {nearest(self.interpolation, INTERPOLATIONS)}"
            )
        if not 0 < self.crop_ratio <= 1:
            raise InputError(f"data.crop_ratio is {self.crop_ratio:g}, but must be in 0..1; choose 0.875 or 1")

    def view(self, pixels: Tensor, name: str) -> Tensor:
        """The evaluation view: uint8 [C, H, W] of any size → uint8 [C, height, width]."""
        from torchvision.transforms.v2 import functional

        height, width = pixels.shape[1:]
        if self.same_size and (height, width) != self.size:
            raise InputError(
                f"{name} has {height}×{width} pixels, but the first image {self.size[0]}×{self.size[1]}; "
                "set data.size, to which all are resized"
            )
        covered = _covering((height, width), [round(side / self.crop_ratio) for side in self.size])
        if covered != (height, width):
            pixels = functional.resize(pixels, list(covered), self.mode())
        return functional.center_crop(pixels, list(self.size))  # type: ignore[no-any-return]

    def mode(self) -> object:
        """The interpolation as torchvision calls it."""
        from torchvision.transforms import InterpolationMode

        return InterpolationMode(self.interpolation)


class UnreadableImages:
    """Images that could not be read; each is reported once, by its path.

    Args:
        limit: how many are tolerated.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._names: set[str] = set()

    def note(self, name: str, error: Exception) -> None:
        """Reports an image that could not be read."""
        if name not in self._names:
            self._names.add(name)
            _log.warning("%s cannot be read (%s); it is left out", name, reason(error))

    def is_far_beyond(self) -> bool:
        """Whether there are so many that more need not be looked for."""
        return len(self._names) > self.limit + _MORE_REPORTED

    def check(self) -> None:
        """Raises `InputError` if there are more than are tolerated."""
        found = len(self._names)
        if found > self.limit:
            # Threads find them in any order.
            named = ", ".join(sorted(self._names)[:_NAMED]) + (", ..." if found > _NAMED else "")
            images = "1 image" if found == 1 else f"{found} images"
            raise InputError(
                f"{images} cannot be read ({named}), but data.unreadable tolerates {self.limit}; "
                "mend or remove them, or raise data.unreadable"
            )


class LazyImages:
    """A split whose images are decoded when they are read.

    Args:
        source: the images.
        decoding: how they become of one size.
        unreadable: counts the images that cannot be read.
        workers: decoding threads.
    """

    def __init__(
        self, source: ImageSource, decoding: Decoding, unreadable: UnreadableImages | None = None, workers: int = 2
    ) -> None:
        self.source, self.decoding, self.workers = source, decoding, workers
        self.unreadable = unreadable or UnreadableImages(0)

    @property
    def labels(self) -> Labels:
        """Int64 [N], 0 .. classes-1."""
        return self.source.labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image of the evaluation view."""
        return self.source.channels, *self.decoding.size

    def __len__(self) -> int:
        return len(self.source)

    def subset(self, indices: Rows) -> "LazyImages":
        """The images at `indices`, in that order."""
        return LazyImages(self.source.subset(indices), self.decoding, self.unreadable, self.workers)

    def whole(self, row: int) -> Tensor | None:
        """One image in its own size, uint8 [C, H, W]; None, and noted, if it cannot be read."""
        try:
            # A copy: Pillow's pixels are read-only.
            return torch.from_numpy(self.source.pixels(row).copy()).permute(2, 0, 1)
        except (InputError, MemoryError):
            raise
        except Exception as error:
            # Decoders raise anything: OSError, SyntaxError, ValueError, struct.error, ...
            self.unreadable.note(self.source.name(row), error)
            return None

    def view(self, row: int) -> Tensor | None:
        """One image as evaluation sees it, uint8 [C, height, width]; None, and noted, if it cannot be read."""
        pixels = self.whole(row)
        return None if pixels is None else self.decoding.view(pixels, self.source.name(row))

    def read(self, rows: Rows) -> Images:
        """The images at `rows` as evaluation sees them: uint8 [n, C, H, W].

        The next readable image of the same class stands in for one that cannot be read: who reads rows counts on as
        many images with these labels, and a made-up image would be an outlier among activations.

        Raises:
            InputError: more unreadable images than are tolerated.
        """
        images = np.empty((len(rows), *self.image_shape), dtype=np.uint8)
        for place, view in enumerate(ahead(self.view, rows.tolist(), self.workers, 4 * self.workers)):
            if view is None:
                self.unreadable.check()
                view = self._stand_in(int(rows[place]))
            images[place] = view.numpy()
        return images

    def decoded(self, workers: int) -> ImageSet:
        """All images in memory, without those that cannot be read; does not check how many these are.

        Args:
            workers: decoding threads.
        """
        images = np.empty((len(self), *self.image_shape), dtype=np.uint8)
        kept = np.zeros(len(self), dtype=np.bool_)
        for row, view in enumerate(ahead(self.view, range(len(self)), workers, 64 * workers)):
            if view is not None:
                images[row], kept[row] = view.numpy(), True
            elif self.unreadable.is_far_beyond():
                break
        return ImageSet(images, self.labels) if kept.all() else ImageSet(images[kept], self.labels[kept])

    def fingerprint(self) -> str:
        """A hash of the files or of one's own code, of the labels and of how images are decoded."""
        return hashlib.sha256(repr((self.source.fingerprint(), self.decoding)).encode()).hexdigest()

    def _stand_in(self, row: int) -> Tensor:
        alike = np.flatnonzero(self.labels == self.labels[row])
        for other in np.roll(alike, -int(np.searchsorted(alike, row)) - 1):
            view = self.view(int(other))
            self.unreadable.check()
            if view is not None:
                return view
        raise InputError(f"no image of class {self.labels[row]} can be read, as {self.source.name(row)}; mend them")


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int, most: int) -> Generator[R, None, None]:
    """What `work` makes of each item, in order, done in threads while the caller does something else.

    Threads and not processes: decoders release the interpreter's lock, and a process that is killed leaves nothing
    behind. The threads end with the generator, also if it is closed early.

    Args:
        work: called in the threads.
        items: what to work on.
        workers: threads.
        most: items that are worked on ahead of the caller.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hintsearch-decoding")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _covering(size: tuple[int, int], wanted: list[int]) -> tuple[int, int]:
    """(height, width) with the aspect ratio of `size` that just covers `wanted`."""
    height, width = size
    if wanted[0] * width >= wanted[1] * height:
        return wanted[0], max(wanted[1], int(wanted[0] * width / height))
    return max(wanted[0], int(wanted[1] * height / width)), wanted[1]
