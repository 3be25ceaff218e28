"""Batches of a data set that lives on the device: crop, flip and normalisation in a few tensor operations.

Order and augmentation of an epoch depend on (data_seed, epoch) alone, so that any epoch can be made again without a
generator's state. No worker processes.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.preprocessing import InputTransform, Preprocessing
from .crops import random_boxes, resized_boxes
from .seeding import derived_seed
from .splits import ImageSet
from .workers import ALONE, Workers

# Bytes of pixels that are augmented at once: what stays in a CPU's cache; on a GPU, enough to keep it busy.
CPU_BLOCK = 3 * 2**19
GPU_BLOCK = 2**26


@dataclass(frozen=True)
class Samples:
    """Which images a batch holds.

    Attributes:
        indices: int64 [B], positions in the data set.
        labels: int64 [B].
    """

    indices: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """One batch, or one worker's share of it.

    Attributes:
        images: float32 [B, C, H, W], what the student takes.
        labels: int64 [B].
        indices: int64 [B], positions in the data set.
        teacher_images: float32 [B, C, H', W'], the same images as the teacher takes them; the very tensor `images`
            where both take the same.
        whole: the images of the whole batch, of which these are a worker's share; None: these are all.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    teacher_images: Tensor
    whole: Samples | None = None

    def part(self, start: int, stop: int) -> "Batch":
        """The images from `start` to before `stop`; the batch itself if these are all."""
        if (start, stop) == (0, len(self.labels)):
            return self
        which = slice(start, stop)
        ours = self.images[which]
        theirs = ours if self.teacher_images is self.images else self.teacher_images[which]
        return Batch(ours, self.labels[which], self.indices[which], theirs, self.whole)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    Attributes:
        crop_padding: zero pixels around the image before a random crop of its own size; 0: no crop.
        flip: mirror half of the images left to right.
        min_crop_area: the least share of the image, 0..1, that a random crop of an aspect ratio of 3/4 to 4/3 keeps
            before it is resized to the image's size; in the place of the padded crop; None: that one.
    """

    crop_padding: int = 4
    flip: bool = True
    min_crop_area: float | None = None


class Batches(ABC):
    """A split, read in batches on a device."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the batches are."""

    @abstractmethod
    def __len__(self) -> int:
        """Images."""

    @abstractmethod
    def epoch(
        self,
        epoch: int,
        batch_size: int,
        data_seed: int,
        augmentation: Augmentation,
        workers: Workers = ALONE,
    ) -> Iterator[Batch]:
        """All images once, shuffled and augmented.

        Args:
            epoch: 1-based.
            batch_size: images a batch; a last batch of less than two a worker, which batch norm needs, is joined to
                the one before.
            data_seed: decides order and augmentation together with the epoch.
            augmentation: what happens to each image.
            workers: of whose batches this process's share is wanted.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends what reads the images; the batches already given stay."""

    @abstractmethod
    def _unchanged(self, order: Tensor, batch_size: int, workers: Workers) -> Iterator[Batch]:
        """The images `order` [n], without augmentation."""

    def batch_count(self, batch_size: int, workers: Workers = ALONE) -> int:
        """Batches an epoch, if every image can be read."""
        return len(batch_bounds(len(self), batch_size, workers))

    def in_order(self, batch_size: int, workers: Workers = ALONE) -> Iterator[Batch]:
        """All images once, unchanged, in their own order."""
        return self._unchanged(torch.arange(len(self)), batch_size, workers)

    def fixed_batches(self, count: int, batch_size: int, seed: int, workers: Workers = ALONE) -> list[Batch]:
        """`count` unaugmented batches (fewer if the images run out), the same for the same seed."""
        order = torch.randperm(len(self), generator=seeded_generator("fixed", seed, 0))[: count * batch_size]
        return list(self._unchanged(order, batch_size, workers))


class DeviceImages(Batches):
    """A data set that lives on a device as uint8, augmented and normalised when read.

    On a CPU the pixels are those of the given arrays, not a copy: what lies once in Ray's object store serves every
    process of a node.

    Args:
        data: the images.
        preprocessing: what the student takes.
        device: where the images live.
        teacher: what the teacher takes; None: the same.
    """

    def __init__(
        self,
        data: ImageSet,
        preprocessing: Preprocessing,
        device: torch.device,
        teacher: Preprocessing | None = None,
    ) -> None:
        with warnings.catch_warnings():
            # Arrays out of Ray's object store are read-only, which torch warns of; nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            self.images = torch.from_numpy(data.images).to(device)
            self.labels = torch.from_numpy(data.labels).to(device)
        self._maker = BatchMaker(self.labels, preprocessing, teacher)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the images live."""
        return self.labels.device

    def close(self) -> None:
        """Nothing to end: all images are there."""

    def epoch(
        self,
        epoch: int,
        batch_size: int,
        data_seed: int,
        augmentation: Augmentation,
        workers: Workers = ALONE,
    ) -> Iterator[Batch]:
        """All images once, shuffled and augmented (see `Batches`)."""
        generator = seeded_generator("epoch", data_seed, epoch)
        order = torch.randperm(len(self), generator=generator).to(self.device)
        draw = EpochDraw(len(self), _size(self.images), augmentation, generator, self.device)
        for bounds in self._blocks(batch_bounds(len(self), batch_size, workers)):
            batches = [order[start:stop] for start, stop in bounds]
            indices = torch.cat([workers.share(batch) for batch in batches])
            # The n-th image of the data set has the n-th draw, whatever the order and the blocks.
            yield from self._maker.cut(draw.augmented(self.images[indices], indices), batches, workers)

    def _unchanged(self, order: Tensor, batch_size: int, workers: Workers) -> Iterator[Batch]:
        order = order.to(self.device)
        for start, stop in batch_bounds(len(order), batch_size, workers):
            batch = order[start:stop]
            yield from self._maker.cut(self.images[workers.share(batch)], [batch], workers)

    def _blocks(self, bounds: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Whole batches that are made together."""
        image_bytes = self.images[0].numel()
        most = (CPU_BLOCK if self.device.type == "cpu" else GPU_BLOCK) // image_bytes
        together = max(1, most // (bounds[0][1] - bounds[0][0]))
        for first in range(0, len(bounds), together):
            yield bounds[first : first + together]


class BatchMaker:
    """Makes pixels into what student and teacher take, and cuts them into batches.

    Args:
        labels: int64 [N] of all images, on the device.
        preprocessing: what the student takes.
        teacher: what the teacher takes; None: the same.
    """

    def __init__(self, labels: Tensor, preprocessing: Preprocessing, teacher: Preprocessing | None) -> None:
        self._labels = labels
        self._as_student = InputTransform(preprocessing, labels.device)
        self._as_teacher = None if teacher in (None, preprocessing) else InputTransform(teacher, labels.device)

    def cut(self, pixels: Tensor, batches: Sequence[Tensor], workers: Workers = ALONE) -> Iterator[Batch]:
        """Normalises pixels and cuts them into batches.

        Args:
            pixels: uint8 [n, C, H, W], of this process's share of all batches.
            batches: indices of each whole batch.
            workers: of whose batches the pixels are a share.
        """
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        images = self._as_student(pixels)
        for_teacher = images if self._as_teacher is None else self._as_teacher(pixels)
        start = 0
        for indices in batches:
            whole = Samples(indices, self._labels[indices])
            own = workers.share(indices)
            stop = start + len(own)
            ours = images[start:stop]
            theirs = ours if for_teacher is images else for_teacher[start:stop]
            yield Batch(ours, workers.share(whole.labels), own, theirs, None if workers.alone else whole)
            start = stop


def batch_bounds(count: int, batch_size: int, workers: Workers = ALONE) -> list[tuple[int, int]]:
    """Where each batch starts and stops; never a last batch of less than two images a worker, unless it is the only."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] < 2 * workers.size:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Randomly crops and flips every image.

    In distribution as RandomCrop(size, padding), or RandomResizedCrop, and RandomHorizontalFlip.

    Args:
        images: uint8 [N, C, H, W].
        augmentation: what to do.
        generator: a CPU generator.

    Returns:
        uint8 [N, C, H, W].
    """
    draw = EpochDraw(len(images), _size(images), augmentation, generator, images.device)
    return draw.augmented(images, torch.arange(len(images), device=images.device))


class EpochDraw:
    """What happens to each of N images; drawn for a whole epoch at once, on the CPU, so that no device changes it.

    Args:
        count: N.
        size: (height, width) of the images.
        augmentation: what to do.
        generator: a CPU generator.
        device: where the images lie.
    """

    def __init__(
        self,
        count: int,
        size: tuple[int, int],
        augmentation: Augmentation,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._padding = augmentation.crop_padding
        self._boxes: Tensor | None = None
        self._offsets: Tensor | None = None
        self._mirrored: Tensor | None = None
        if augmentation.min_crop_area is not None:
            self._boxes = random_boxes(count, size, augmentation.min_crop_area, generator).to(device)
        elif self._padding:
            self._offsets = torch.randint(0, 2 * self._padding + 1, (2, count), generator=generator).to(device)
        if augmentation.flip:
            self._mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)

    def augmented(self, images: Tensor, which: Tensor) -> Tensor:
        """Images uint8 [n, C, H, W] that are number `which` [n] of the N → uint8 [n, C, H, W]."""
        if self._boxes is not None:
            images = resized_boxes(images, self._boxes[which])
        if self._offsets is not None:
            height, width = images.shape[2:]
            padded = torch.nn.functional.pad(images, (self._padding,) * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            everyone = torch.arange(len(images), device=images.device)
            images = windows[everyone, :, self._offsets[0, which], self._offsets[1, which]]
        if self._mirrored is not None:
            images = torch.where(self._mirrored[which].view(-1, 1, 1, 1), images.flip(3), images)
        return images


def seeded_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, seed, epoch and the like."""
    return torch.Generator().manual_seed(derived_seed(purpose, *numbers))


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
