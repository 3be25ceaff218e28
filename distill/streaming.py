"""Batches of a split that does not fit into memory: decoded in threads, cropped and flipped on the device.

Order and augmentation of an epoch depend on (data_seed, epoch) alone, as those of `DeviceImages` do.
"""

from collections.abc import Callable, Generator, Iterator
from itertools import islice
from weakref import WeakSet

import torch
from torch import Tensor

from ..models.preprocessing import Preprocessing
from .batches import Augmentation, Batch, Batches, BatchMaker, EpochDraw, batch_bounds, seeded_generator
from .crops import random_boxes
from .lazy_images import LazyImages, ahead
from .workers import ALONE, Workers

# Batches that are decoded ahead of the one that is trained on: whole photos are large.
_BATCHES_AHEAD = 2


class StreamedImages(Batches):
    """A split that is decoded while it is read, by threads that live as long as an iterator over it.

    With the padded crop, batches are the very ones of `DeviceImages` on the decoded split. With random resized crops,
    boxes are cut out of the whole images, not of their evaluation view. Unreadable images are left out of their
    batches, and a training batch of which but one image is left is left out.

    Args:
        split: the images.
        preprocessing: what the student takes.
        device: where the batches go.
        teacher: what the teacher takes; None: the same.
        workers: decoding threads; None: the split's.
    """

    def __init__(
        self,
        split: LazyImages,
        preprocessing: Preprocessing,
        device: torch.device,
        teacher: Preprocessing | None = None,
        workers: int | None = None,
    ) -> None:
        self._split, self._device, self._workers = split, device, workers or split.workers
        self._maker = BatchMaker(torch.tensor(split.labels, device=device), preprocessing, teacher)
        self._decoding: WeakSet[Generator[Tensor | None, None, None]] = WeakSet()

    def __len__(self) -> int:
        return len(self._split)

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return self._device

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
        order = torch.randperm(len(self), generator=generator)
        if augmentation.min_crop_area is None:
            draw = EpochDraw(len(self), self._size, augmentation, generator, self._device)
            for batch, own, views in self._batches(order, batch_size, self._split.view, workers, fewest=2):
                yield from self._maker.cut(draw.augmented(self._stacked(views), own), [batch], workers)
        else:
            for batch, own, images in self._batches(order, batch_size, self._split.whole, workers, fewest=2):
                rows = zip(own.tolist(), images, strict=True)
                crops = [self._cropped(image, row, epoch, data_seed, augmentation) for row, image in rows]
                yield from self._maker.cut(torch.stack(crops), [batch], workers)

    def close(self) -> None:
        """Ends the iterators that were left in the middle, and their threads."""
        for decoding in list(self._decoding):
            decoding.close()

    @property
    def _size(self) -> tuple[int, int]:
        return self._split.decoding.size

    def _unchanged(self, order: Tensor, batch_size: int, workers: Workers) -> Iterator[Batch]:
        for batch, _, views in self._batches(order, batch_size, self._split.view, workers, fewest=1):
            yield from self._maker.cut(self._stacked(views), [batch], workers)

    def _batches(
        self, order: Tensor, batch_size: int, read: Callable[[int], Tensor | None], workers: Workers, fewest: int
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """The indices of each batch and of this process's share, on the device, and its images uint8 [C, H, W]."""
        # Pinned, so that the copy to the device waits for no kernel.
        on_gpu = self._device.type == "cuda"

        def ready(row: int) -> Tensor | None:
            image = read(row)
            return image.pin_memory() if on_gpu and image is not None else image

        def placed(indices: Tensor) -> Tensor:
            return (indices.pin_memory() if on_gpu else indices).to(self._device, non_blocking=True)

        batches = [order[start:stop] for start, stop in batch_bounds(len(order), batch_size, workers)]
        shares = [workers.share(batch) for batch in batches]
        decoding = ahead(ready, torch.cat(shares).tolist(), self._workers, _BATCHES_AHEAD * batch_size)
        self._decoding.add(decoding)
        try:
            for batch, share in zip(batches, shares, strict=True):
                decoded = zip(share.tolist(), islice(decoding, len(share)), strict=True)
                found = [(row, image) for row, image in decoded if image is not None]
                self._split.unreadable.check()
                if len(found) >= min(fewest, len(share)):
                    own = placed(torch.tensor([row for row, _ in found]))
                    # Where images may be left out there is but one worker.
                    yield own if workers.alone else placed(batch), own, [image for _, image in found]
        finally:
            decoding.close()

    def _stacked(self, views: list[Tensor]) -> Tensor:
        return torch.stack([view.to(self._device, non_blocking=True) for view in views])

    def _cropped(self, image: Tensor, row: int, epoch: int, data_seed: int, augmentation: Augmentation) -> Tensor:
        """A random resized crop of a whole image; its draws depend on image, epoch and seed alone."""
        from torchvision.transforms.v2 import functional

        assert augmentation.min_crop_area is not None
        generator = seeded_generator("crop", data_seed, epoch, row)
        size = image.shape[1], image.shape[2]
        box = random_boxes(1, size, augmentation.min_crop_area, generator)[0].tolist()
        crop: Tensor = functional.resized_crop(
            image.to(self._device, non_blocking=True), *box, list(self._size), self._split.decoding.mode()
        )
        flipped = augmentation.flip and float(torch.rand(1, generator=generator)) < 0.5
        return crop.flip(2) if flipped else crop
