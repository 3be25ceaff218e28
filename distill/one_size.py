"""What a data set ships, made into splits whose images have one size, in memory where they fit."""

import os
from collections.abc import Sequence

import numpy as np
import torch

from ..models.errors import InputError
from ..models.preprocessing import resized
from .data_spec import DataSpec
from .datasets import DATASETS, registered_shape
from .image_sources import ImageSource
from .lazy_images import Decoding, LazyImages, UnreadableImages
from .splits import ImageSet, Split

_RESIZED_AT_ONCE = 1024


def of_one_size(spec: DataSpec, crop_ratio: float, parts: Sequence[ImageSet | ImageSource]) -> list[Split]:
    """Resizes arrays, and decodes files and items: at once if all fit into `memory_gb`, else when they are read.

    Args:
        spec: size, interpolation, crop ratio, memory, threads and the limit of unreadable images.
        crop_ratio: the data set's usual.
        parts: training, validation and test images, either all arrays or none.

    Raises:
        InputError: more unreadable images than are tolerated; images of several sizes, or too many to decode at once,
            without `spec.size`.
    """
    arrays = [part for part in parts if isinstance(part, ImageSet)]
    if arrays:
        return [_resized(part, spec) for part in arrays]
    sources = [part for part in parts if not isinstance(part, ImageSet)]
    unreadable = UnreadableImages(spec.unreadable)
    size = spec.image_size or (registered_shape(spec.name)[1:] if spec.name in DATASETS else None)
    decoding = Decoding(
        size or _first_size(sources[0], unreadable),
        crop_ratio if spec.crop_ratio is None else spec.crop_ratio,
        spec.interpolation,
        same_size=size is None,
    )
    lazy = [LazyImages(source, decoding, unreadable, spec.workers) for source in sources]
    gigabytes = sum(len(part) * float(np.prod(part.image_shape)) for part in lazy) / 1e9
    if gigabytes > spec.memory_gb:
        if size is None:
            raise InputError(
                f"data.size is not set, but the images of {spec.name} take {gigabytes:.1f} GB, more than "
                f"data.memory_gb, which is {spec.memory_gb:g}; set data.size, or raise data.memory_gb"
            )
        return list(lazy)
    # On all cores: nothing is trained yet.
    decoded: list[Split] = [part.decoded(os.cpu_count() or 1) for part in lazy]
    unreadable.check()
    return decoded


def _first_size(source: ImageSource, unreadable: UnreadableImages) -> tuple[int, int]:
    """Of the first image that can be read."""
    for row in range(len(source)):
        try:
            height, width, _ = source.pixels(row).shape
        except (InputError, MemoryError):
            raise
        except Exception as error:
            unreadable.note(source.name(row), error)
            if unreadable.is_far_beyond():
                break
        else:
            return height, width
    unreadable.check()
    raise InputError("no training image can be read; mend them")


def _resized(data: ImageSet, spec: DataSpec) -> ImageSet:
    size = spec.image_size
    if size is None or data.images.shape[2:] == size:
        return data
    images = np.empty((*data.images.shape[:2], *size), dtype=np.uint8)
    for start in range(0, len(data), _RESIZED_AT_ONCE):
        part = slice(start, start + _RESIZED_AT_ONCE)
        images[part] = resized(torch.from_numpy(data.images[part]), size, spec.interpolation).round_().numpy()
    return ImageSet(images, data.labels)
