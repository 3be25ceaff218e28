"""Folders of image files with a folder for each class."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..models.errors import InputError, reason
from .image_sources import ImageFiles, RawData

TRAIN = "train"
TEST = ("test", "val")


def is_image_folder(folder: Path) -> bool:
    """Whether there are folders in it, which are taken for classes or splits."""
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


def class_names(folder: Path) -> tuple[str, ...]:
    """The classes of an image folder, in the order of their labels."""
    place = folder / TRAIN if (folder / TRAIN).is_dir() else folder
    return tuple(sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def read_image_folder(folder: Path) -> RawData:
    """The images of a folder that holds one folder a class, or `train/` and perhaps `test/` and `val/` with them.

    With `train/` alone, validation and test are carved from it; `val/` is the test split unless there is `test/`
    beside it.

    Raises:
        InputError: a class without images, or one that only test or validation has.
    """
    classes = class_names(folder)
    if not (folder / TRAIN).is_dir():
        return RawData(_images_of(folder, ".", classes, needed=True), None)
    train = _images_of(folder, TRAIN, classes, needed=True)
    test, validation = (
        _images_of(folder, name, classes, needed=False) if (folder / name).is_dir() else None for name in TEST
    )
    return RawData(train, test, validation) if test is not None else RawData(train, validation)


def image_files(root: Path, samples: Sequence[tuple[str, int]]) -> ImageFiles:
    """Files given as torchvision gives them, (path below `root`, label)."""
    # Cut off and not asked of os.path.relpath, which takes ten seconds for a million paths.
    start = os.path.join(root, "")
    paths = [path.removeprefix(start) for path, _ in samples]
    return ImageFiles(root, paths, np.array([label for _, label in samples], dtype=np.int64))


def _images_of(folder: Path, split: str, classes: tuple[str, ...], needed: bool) -> ImageFiles:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    place = folder / split
    unknown = sorted(set(class_names(place)) - set(classes))
    if unknown:
        raise InputError(
            f"{place / unknown[0]} is a class that {folder / TRAIN} has not; add training images of it, or remove it"
        )
    labels = {name: label for label, name in enumerate(classes)}
    try:
        samples = make_dataset(str(place), labels, IMG_EXTENSIONS, allow_empty=not needed)
    except FileNotFoundError as error:
        raise InputError(f"{place} is no folder of images ({reason(error)})") from error
    if not samples:
        raise InputError(f"{place} holds no images; add some, or remove the folder")
    return image_files(folder, samples)
