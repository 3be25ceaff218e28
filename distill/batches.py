"""Batches of a data set that lives on the device: a whole epoch is augmented in a few tensor operations.

Order and augmentation of an epoch depend on (data_seed, epoch) alone, so that any epoch can be made again without a
generator's state. No worker processes.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import ImageSet
from .seeding import derived_seed


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: float32 [B, C, H, W], normalised.
        labels: int64 [B].
        indices: int64 [B], positions in the data set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    Attributes:
        crop_padding: zero pixels around the image before a random crop of its own size; 0: no crop.
        flip: mirror half of the images left to right.
    """

    crop_padding: int = 4
    flip: bool = True


class DeviceImages:
    """A data set on a device as uint8, normalised when read.

    Args:
        data: the images.
        mean: channel means in 0..1.
        sd: channel standard deviations in 0..1.
        device: where it lives.
    """

    def __init__(self, data: ImageSet, mean: Sequence[float], sd: Sequence[float], device: torch.device) -> None:
        with warnings.catch_warnings():
            # Arrays out of Ray's object store are read-only, which torch warns of; nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            self.images = torch.from_numpy(data.images).to(device)
            self.labels = torch.from_numpy(data.labels).to(device)
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._sd = torch.tensor(sd, device=device).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batch_count(self, batch_size: int) -> int:
        """Batches an epoch."""
        return len(batch_bounds(len(self), batch_size))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All images once, unchanged, in their own order."""
        yield from self._cut(torch.arange(len(self)), self.images, batch_size)

    def fixed_batches(self, count: int, batch_size: int, seed: int) -> list[Batch]:
        """`count` unaugmented batches (fewer if the images run out), the same for the same seed."""
        order = torch.randperm(len(self), generator=_generator("fixed", seed, 0))[: count * batch_size]
        return list(self._cut(order, self.images, batch_size))

    def epoch(self, epoch: int, batch_size: int, data_seed: int, augmentation: Augmentation) -> Iterator[Batch]:
        """All images once, shuffled and augmented.

        Args:
            epoch: 1-based.
            batch_size: images a batch; a last batch of one image is joined to the one before (batch norm needs two).
            data_seed: decides order and augmentation together with the epoch.
            augmentation: random crop and flip.
        """
        generator = _generator("epoch", data_seed, epoch)
        order = torch.randperm(len(self), generator=generator)
        yield from self._cut(order, augment(self.images, augmentation, generator), batch_size)

    def _cut(self, order: Tensor, images: Tensor, batch_size: int) -> Iterator[Batch]:
        order = order.to(images.device)
        for start, stop in batch_bounds(len(order), batch_size):
            indices = order[start:stop]
            normalised = (images[indices].float() / 255 - self._mean) / self._sd
            yield Batch(normalised, self.labels[indices], indices)


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Where each batch starts and stops; never a last batch of one image, unless there is but one."""
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Randomly crops and flips every image, in distribution as RandomCrop(size, padding) and RandomHorizontalFlip.

    Args:
        images: uint8 [N, C, H, W].
        augmentation: what to do.
        generator: a CPU generator.

    Returns:
        uint8 [N, C, H, W].
    """
    count, _, height, width = images.shape
    everyone = torch.arange(count, device=images.device)
    if augmentation.crop_padding:
        padding = augmentation.crop_padding
        offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(images.device)
        padded = torch.nn.functional.pad(images, (padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = windows[everyone, :, offsets[0], offsets[1]]
    if augmentation.flip:
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def _generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    """A CPU generator of its own for each purpose, seed and epoch."""
    return torch.Generator().manual_seed(derived_seed(purpose, seed, epoch))
