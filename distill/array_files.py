"""Images and labels as arrays: a folder's `train.npz` and `test.npz`, and what other readers give as arrays."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.errors import InputError, reason
from .image_sources import RawData
from .splits import ImageSet

ARCHIVES = ("train.npz", "test.npz")


def read_archives(folder: Path) -> RawData:
    """The images [N, H, W] or [N, H, W, C] and labels [N] of `train.npz` and `test.npz`.

    Raises:
        InputError: a file is missing or damaged, or holds something else.
    """
    train, test = (_read_npz(folder / name) for name in ARCHIVES)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"the images [C, H, W] of {folder} are {list(train.images.shape[1:])} in train.npz, but "
            f"{list(test.images.shape[1:])} in test.npz; they must be of one shape"
        )
    return RawData(train, test)


def image_set(images: NDArray[Any], labels: NDArray[Any]) -> ImageSet:
    """Images uint8 [N, H, W] or [N, H, W, C] and integer labels [N] as a split in memory."""
    channels_last = images[..., None] if images.ndim == 3 else images
    channels_first = np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2))
    return ImageSet(channels_first, np.asarray(labels).astype(np.int64))


def _read_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except Exception as error:
        # A damaged archive makes the decoders raise anything: BadZipFile, zlib.error, NotImplementedError, ...
        raise InputError(
            f"{path} cannot be read ({reason(error)}); it needs the arrays `images` and `labels`"
        ) from error
    if not images.size:
        raise InputError(f"{path} holds no images; it needs at least one of each class")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(
            f"{path}: images are {images.dtype} {list(images.shape)}, but must be uint8 [N, H, W] or [N, H, W, C]"
        )
    if labels.shape == (len(images),) and np.issubdtype(labels.dtype, np.integer) and labels.min(initial=0) < 0:
        first = int(np.flatnonzero(labels < 0)[0])
        raise InputError(
            f"{path}: the label of image {first} is {labels[first]}, but labels start at 0; number them anew"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}, but must be {len(images)} integers from 0"
        )
    return image_set(images, labels)
