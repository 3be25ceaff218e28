"""Data sets as arrays: class-balanced train, validation and test splits by seed.

Validation is carved from the training images; a search never loads the test split.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.errors import InputError, reason
from ..models.registry import Registry

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], 0 .. classes-1.
    """

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: NDArray[np.intp]) -> "ImageSet":
        """The images at `indices`, in that order."""
        return ImageSet(np.ascontiguousarray(self.images[indices]), self.labels[indices])


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how they are split.

    Attributes:
        name: of the data set registry, or a folder holding `train.npz` and `test.npz`.
        root: folder where torchvision's data sets lie or are downloaded to.
        train_fraction: share of the training images that is used, class-balanced.
        validation_fraction: share of the training images (of all images, if the data set ships no test split) that is
            held out for validation, class-balanced.
        test_fraction: share of all images held out for test, if the data set ships no test split.
        seed: of the splits.
        mean: channel means of the images in 0..1; None: measured on the training split.
        sd: channel standard deviations; None: measured on the training split.
    """

    name: str = "digits"
    root: str | None = None
    train_fraction: float = 1.0
    validation_fraction: float = 0.2
    test_fraction: float = 0.2
    seed: int = 0
    mean: tuple[float, ...] | None = None
    sd: tuple[float, ...] | None = None


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
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet | None
    classes: int
    mean: tuple[float, ...]
    sd: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def without_test(self) -> "DataSplits":
        """The same splits for a search, which never sees test."""
        return replace(self, test=None)

    def sha256(self) -> str:
        """Hash of the training images, their labels and the normalisation."""
        digest = hashlib.sha256(repr((self.train.images.shape, self.classes, self.mean, self.sd)).encode())
        digest.update(self.train.images.tobytes())
        digest.update(self.train.labels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class RawData:
    """What a data set ships: training images, and test images if it has them."""

    train: ImageSet
    test: ImageSet | None


DATASETS: Registry[Callable[[Path], RawData]] = Registry("data set")


@DATASETS.register(
    "digits",
    source="Alpaydin & Kaynak 1998, UCI; shipped with scikit-learn",
    images="1,797",
    shape="1×8×8",
    classes="10",
)
def digits(_root: Path) -> RawData:
    """Scikit-learn's handwritten digits: 17 grey levels spread over uint8."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return RawData(ImageSet(images, bunch.target.astype(np.int64)), None)


@DATASETS.register(
    "fashion_mnist",
    source="Xiao et al. 2017, arXiv 1708.07747",
    images="60,000 / 10,000",
    shape="1×28×28",
    classes="10",
)
def fashion_mnist(root: Path) -> RawData:
    """Torchvision's FashionMNIST, downloaded to `root` if it is not there."""
    return _torchvision("FashionMNIST", root)


@DATASETS.register("cifar10", source="Krizhevsky 2009", images="50,000 / 10,000", shape="3×32×32", classes="10")
def cifar10(root: Path) -> RawData:
    """Torchvision's CIFAR-10, downloaded to `root` if it is not there."""
    return _torchvision("CIFAR10", root)


@DATASETS.register("cifar100", source="Krizhevsky 2009", images="50,000 / 10,000", shape="3×32×32", classes="100")
def cifar100(root: Path) -> RawData:
    """Torchvision's CIFAR-100, downloaded to `root` if it is not there."""
    return _torchvision("CIFAR100", root)


def load_data(spec: DataSpec, default_root: Path) -> DataSplits:
    """Loads and splits a data set.

    Args:
        spec: which data, and how they are split.
        default_root: where torchvision's data sets go if the spec names no root.

    Raises:
        InputError: unknown name, damaged files, labels out of range, too few images of a class for the splits.
    """
    raw = _read(spec, Path(spec.root) if spec.root else default_root)
    rng = np.random.default_rng(spec.seed)
    train, test = raw.train, raw.test
    everything = len(train)
    if test is None:
        held_out, kept = balanced_split(train.labels, spec.test_fraction, rng)
        test, train = train.subset(held_out), train.subset(kept)
    held_out, kept = balanced_split(train.labels, spec.validation_fraction * everything / len(train), rng)
    validation, train = train.subset(held_out), train.subset(kept)
    if spec.train_fraction < 1:
        used, _ = balanced_split(train.labels, spec.train_fraction, rng)
        train = train.subset(used)
    classes = int(max(raw.train.labels.max(), test.labels.max())) + 1
    _check_splits(spec, classes, train, validation)
    mean, sd = _normalisation(spec, train)
    return DataSplits(train, validation, test, classes, mean, sd)


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
    """Raises `InputError` for a name that is neither a data set nor a folder with `train.npz` and `test.npz`."""
    if name in DATASETS:
        return
    folder = Path(name)
    if not folder.is_dir():
        DATASETS.entry(name)
    for split in ("train.npz", "test.npz"):
        if not (folder / split).is_file():
            raise InputError(f"data.name is {name!r}, but that folder has no {split}; it needs train.npz and test.npz")


def known_shape(name: str) -> tuple[int, tuple[int, int, int]] | None:
    """(classes, (channels, height, width)) of a registered data set, without reading it; None for a folder."""
    if name not in DATASETS:
        return None
    facts = DATASETS.entry(name).facts
    channels, height, width = (int(size) for size in facts["shape"].split("×"))
    return int(facts["classes"]), (channels, height, width)


def _read(spec: DataSpec, root: Path) -> RawData:
    check_data_name(spec.name)
    if spec.name in DATASETS:
        return DATASETS.get(spec.name)(root)
    folder = Path(spec.name)
    train, test = _read_npz(folder / "train.npz"), _read_npz(folder / "test.npz")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(
            f"the images [C, H, W] of {folder} are {list(train.images.shape[1:])} in train.npz, but "
            f"{list(test.images.shape[1:])} in test.npz; they must be of one shape"
        )
    return RawData(train, test)


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
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise InputError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}, but must be {len(images)} integers from 0"
        )
    return _image_set(images, labels)


def _image_set(images: NDArray[Any], labels: NDArray[Any]) -> ImageSet:
    channels_last = images[..., None] if images.ndim == 3 else images
    channels_first = np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2))
    return ImageSet(channels_first, np.asarray(labels).astype(np.int64))


def _torchvision(class_name: str, root: Path) -> RawData:
    from torchvision import datasets

    dataset = getattr(datasets, class_name)
    try:
        splits = [dataset(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        # Besides network and disk, damaged files: torchvision's readers assert, and raise ValueError.
        raise InputError(
            f"{class_name} cannot be read from {root} nor downloaded to it ({reason(error)}); "
            "set data.root, or delete damaged files there"
        ) from error
    train, test = (_image_set(np.asarray(split.data), np.asarray(split.targets)) for split in splits)
    return RawData(train, test)


def _check_splits(spec: DataSpec, classes: int, train: ImageSet, validation: ImageSet) -> None:
    for name, split in (("train", train), ("validation", validation)):
        present = np.unique(split.labels)
        if len(present) < classes:
            absent = next((label for label, found in enumerate(present) if label != found), len(present))
            raise InputError(
                f"the {name} split of {spec.name} has no image of class {absent} of 0..{classes - 1}; "
                "raise data.train_fraction or change data.validation_fraction"
            )


def _normalisation(spec: DataSpec, train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = train.images.shape[1]
    # Per channel in float64 a slice at a time: a float copy of all images would be eight times their size.
    scaled = [train.images[:, channel] / np.float32(255) for channel in range(channels)]
    mean = spec.mean or tuple(float(values.mean(dtype=np.float64)) for values in scaled)
    sd = spec.sd or tuple(max(float(values.std(dtype=np.float64)), 1e-6) for values in scaled)
    for name, values in (("mean", mean), ("sd", sd)):
        if len(values) != channels:
            raise InputError(f"data.{name} has {len(values)} values, but the images have {channels} channels")
    return mean, sd
