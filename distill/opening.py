"""One way to open a split for reading in batches, wherever its images are."""

import numpy as np
import torch

from ..models.preprocessing import Preprocessing
from .batches import Batches, DeviceImages
from .lazy_images import LazyImages
from .splits import ImageSet, Split
from .streaming import StreamedImages


def open_batches(
    split: Split, preprocessing: Preprocessing, device: torch.device, teacher: Preprocessing | None = None
) -> Batches:
    """Opens a split: resident on the device if it lies in memory, else streamed.

    Args:
        split: the images.
        preprocessing: what the student takes.
        device: where the batches are wanted.
        teacher: what the teacher takes; None: the same.
    """
    if isinstance(split, LazyImages):
        return StreamedImages(split, preprocessing, device, teacher)
    data = split if isinstance(split, ImageSet) else ImageSet(split.read(np.arange(len(split))), split.labels)
    return DeviceImages(data, preprocessing, device, teacher)
