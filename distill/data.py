"""Data sets: class-balanced train, validation and test splits by seed.

Validation is carved from the training images; a search never loads the test split.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.errors import InputError
from ..models.own_code import check_own_code, is_own_code
from ..models.preprocessing import Preprocessing
from .array_files import ARCHIVES, read_archives
from .data_spec import DataSpec
from .datasets import DATASETS, registered_shape
from .image_folders import class_names, is_image_folder, read_image_folder
from .image_sources import RawData
from .one_size import of_one_size
from .own_data import KIND, read_own_data
from .splits import Images, ImageSet, Labels, Split

__all__ = [
    "DATASETS",
    "DataSpec",
    "DataSplits",
    "ImageSet",
    "Images",
    "Labels",
    "RawData",
    "Split",
    "balanced_split",
    "check_data_name",
    "known_shape",
    "load_data",
]

# Images that mean and standard deviation are measured on where decoding all would take long.
MEASURED_IMAGES = 1024


@dataclass(frozen=True)
class DataSplits:
    """The splits of one data set.

    Attributes:
        train: what students, teacher and layer pass see.
        validation: what decides.
        test: what is reported once at the end; None inside a search.
        classes: number of classes.
        mean: channel means in 0..1 used to normalise.
        sd: channel standard deviations used to normalise.
        meta: training images set aside for dynamic weights to learn on; None: none are.
    """

    train: Split
    validation: Split
    test: Split | None
    classes: int
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    meta: Split | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.train.image_shape

    @property
    def preprocessing(self) -> Preprocessing:
        """What a network takes that says nothing of its own: the images in their size, normalised."""
        return Preprocessing(self.mean, self.sd)

    def without_test(self) -> "DataSplits":
        """The same splits for a search, which never sees test."""
        return replace(self, test=None)

    def sha256(self) -> str:
        """Hash of the training images, their labels and the normalisation."""
        content = (self.train.image_shape, len(self.train), self.classes, self.mean, self.sd, self.train.fingerprint())
        return hashlib.sha256(repr(content).encode()).hexdigest()


def load_data(spec: DataSpec, default_root: Path) -> DataSplits:
    """Loads and splits a data set.

    Args:
        spec: which data, and how they are split.
        default_root: where torchvision's data sets go if the spec names no root.

    Raises:
        InputError: unknown name, damaged files, labels out of range, too few images of a class for the splits, more
            unreadable images than are tolerated, images of several sizes without `spec.size`.
    """
    raw = _read(spec, Path(spec.root) if spec.root else default_root)
    classes = _checked_classes(spec, raw)
    rng = np.random.default_rng(spec.seed)
    train, validation, test = raw.train, raw.validation, raw.test
    everything = len(train)
    if test is None:
        held_out, kept = balanced_split(train.labels, spec.test_fraction, rng)
        test, train = train.subset(held_out), train.subset(kept)
    if validation is None:
        held_out, kept = balanced_split(train.labels, spec.validation_fraction * everything / len(train), rng)
        validation, train = train.subset(held_out), train.subset(kept)
    if spec.train_fraction < 1:
        used, _ = balanced_split(train.labels, spec.train_fraction, rng)
        train = train.subset(used)
    ours, theirs, last = of_one_size(spec, raw.crop_ratio, (train, validation, test))
    _check_split(spec, classes, "train", ours)
    if raw.validation is None:
        _check_split(spec, classes, "validation", theirs)
    mean, sd = _normalisation(spec, raw, ours)
    meta, taught = _meta(spec, classes, ours, rng)
    return DataSplits(taught, theirs, last, classes, mean, sd, meta)


def balanced_split(
    labels: Labels, fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Draws the same fraction of every class.

    Args:
        labels: int64 [N].
        fraction: share of each class, rounded to whole images.
        rng: source of the draw.

    Returns:
        Indices drawn and indices left, each shuffled over the classes.
    """
    drawn: list[NDArray[np.intp]] = []
    left: list[NDArray[np.intp]] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(members))
        drawn.append(members[:count])
        left.append(members[count:])
    return rng.permutation(np.concatenate(drawn)), rng.permutation(np.concatenate(left))


def check_data_name(name: str) -> None:
    """Checks that a name can be loaded, without reading images or running code.

    Raises:
        InputError: neither a data set, nor one's own function, nor a folder with archives or images.
    """
    folder = Path(name)
    if name in DATASETS:
        return
    if not folder.is_dir():
        if is_own_code(name):
            check_own_code(name, KIND)
        else:
            DATASETS.entry(name)
        return
    missing = [archive for archive in ARCHIVES if not (folder / archive).is_file()]
    if len(missing) == len(ARCHIVES) and not is_image_folder(folder):
        raise InputError(
            f"data.name is {name!r}, but that folder has neither train.npz and test.npz nor a folder for each class "
            "of images; give one that has"
        )
    if len(missing) == 1:
        raise InputError(f"data.name is {name!r}, but that folder has no {missing[0]}; it needs train.npz and test.npz")


def known_shape(name: str, size: int | tuple[int, int] | None = None) -> tuple[int, tuple[int, int, int]] | None:
    """(classes, (channels, height, width)) where that is known without reading images, else None.

    Args:
        name: of the data.
        size: the study's; a folder of images needs it, a registered data set does not.
    """
    pair = (size, size) if isinstance(size, int) else size
    if name in DATASETS:
        channels, height, width = registered_shape(name)
        return int(DATASETS.entry(name).facts["classes"]), (channels, *(pair or (height, width)))
    folder = Path(name)
    if pair and folder.is_dir() and not (folder / ARCHIVES[0]).is_file():
        return len(class_names(folder)), (3, *pair)
    return None


def _read(spec: DataSpec, root: Path) -> RawData:
    check_data_name(spec.name)
    folder = Path(spec.name)
    if spec.name in DATASETS:
        return DATASETS.get(spec.name)(root)
    if not folder.is_dir():
        return read_own_data(spec.name)
    return read_archives(folder) if (folder / ARCHIVES[0]).is_file() else read_image_folder(folder)


def _checked_classes(spec: DataSpec, raw: RawData) -> int:
    """The number of classes, once every label is known to be one of them; the training images show what they are."""
    classes = spec.classes or int(raw.train.labels.max()) + 1
    for split, part in (("training", raw.train), ("validation", raw.validation), ("test", raw.test)):
        if part is None:
            continue
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= classes))
        if len(wrong):
            row = int(wrong[0])
            ours = f"image {row} of the {split} images of {spec.name}"
            where = ours if isinstance(part, ImageSet) else part.name(row)
            mend = "mend the labels or data.classes" if spec.classes else "mend the labels, or give data.classes"
            raise InputError(f"{where} has the label {part.labels[row]}, but labels must be 0..{classes - 1}; {mend}")
    return classes


def _check_split(spec: DataSpec, classes: int, name: str, split: Split) -> None:
    present = np.unique(split.labels)
    if len(present) < classes:
        absent = next((label for label, found in enumerate(present) if label != found), len(present))
        raise InputError(
            f"the {name} split of {spec.name} has no image of class {absent} of 0..{classes - 1}; "
            "raise data.train_fraction or change data.validation_fraction"
        )


def _meta(spec: DataSpec, classes: int, train: Split, rng: np.random.Generator) -> tuple[Split | None, Split]:
    """The images set aside for dynamic weights, and those left to train on."""
    if spec.meta_images == 0:
        return None, train
    if not classes <= spec.meta_images <= len(train) / 2:
        raise InputError(
            f"dynamic_weights.meta_images is {spec.meta_images}, but must be at least one for each of the {classes} "
            f"classes and at most half of the {len(train)} training images; choose {classes}..{len(train) // 2}"
        )
    drawn: list[NDArray[np.intp]] = []
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        # The first classes make up for the remainder.
        wanted = spec.meta_images // classes + (label < spec.meta_images % classes)
        if wanted >= len(members):
            raise InputError(
                f"dynamic_weights.meta_images is {spec.meta_images}, {wanted} of each class, but class {label} has "
                f"{len(members)} training images; lower it"
            )
        drawn.append(members[:wanted])
    meta = rng.permutation(np.concatenate(drawn))
    return train.subset(meta), train.subset(rng.permutation(np.setdiff1d(np.arange(len(train)), meta)))


def _normalisation(spec: DataSpec, raw: RawData, train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = train.image_shape[0]
    mean, sd = spec.mean or raw.mean, spec.sd or raw.sd
    if mean is None or sd is None:
        measured = _measured(spec, train)
        mean, sd = mean or measured[0], sd or measured[1]
    for name, values in (("mean", mean), ("sd", sd)):
        if len(values) != channels:
            raise InputError(f"data.{name} has {len(values)} values, but the images have {channels} channels")
    return mean, sd


def _measured(spec: DataSpec, train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if isinstance(train, ImageSet):
        images = train.images
    else:
        sample = np.random.default_rng(spec.seed).permutation(len(train))[:MEASURED_IMAGES]
        images = train.read(np.sort(sample))
    # Per channel in float64 a slice at a time: a float copy of all images would be eight times their size.
    scaled = [images[:, channel] / np.float32(255) for channel in range(images.shape[1])]
    mean = tuple(float(values.mean(dtype=np.float64)) for values in scaled)
    return mean, tuple(max(float(values.std(dtype=np.float64)), 1e-6) for values in scaled)
