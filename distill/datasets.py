"""The data sets that a study can name; nothing else is to be edited to add one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..models.errors import InputError, reason
from ..models.registry import Registry
from .array_files import image_set
from .image_folders import image_files
from .image_sources import ImageFiles, RawData
from .splits import ImageSet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)
PHOTO_CROP_RATIO = 0.875

# A function gets the folder where data lie or are downloaded to. The fact `shape` of images that differ in size is the
# size to which they are resized unless the study names another.
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
    return _torchvision_arrays("FashionMNIST", root)


@DATASETS.register("cifar10", source="Krizhevsky 2009", images="50,000 / 10,000", shape="3×32×32", classes="10")
def cifar10(root: Path) -> RawData:
    """Torchvision's CIFAR-10, downloaded to `root` if it is not there."""
    return _torchvision_arrays("CIFAR10", root)


@DATASETS.register("cifar100", source="Krizhevsky 2009", images="50,000 / 10,000", shape="3×32×32", classes="100")
def cifar100(root: Path) -> RawData:
    """Torchvision's CIFAR-100, downloaded to `root` if it is not there."""
    return _torchvision_arrays("CIFAR100", root)


@DATASETS.register(
    "tiny_imagenet",
    source="Le & Yang 2015, Stanford CS231n",
    images="100,000 / 10,000",
    shape="3×64×64",
    classes="200",
)
def tiny_imagenet(root: Path) -> RawData:
    """Tiny-ImageNet, downloaded to `root` if it is not there; its own validation images are the test split.

    Labels are in the order of the sorted WordNet ids.
    """
    folder = downloaded(
        root,
        "tiny-imagenet-200",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
    )
    return _read_from(folder, _tiny_imagenet)


@DATASETS.register(
    "cub200",
    source="Wah et al. 2011, Caltech CNS-TR-2011-001",
    images="5,994 / 5,794",
    shape="3×224×224",
    classes="200",
)
def cub200(root: Path) -> RawData:
    """Caltech-UCSD Birds 200-2011, downloaded to `root` if it is not there, with its own train-test split."""
    folder = downloaded(
        root,
        "CUB_200_2011",
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "97eceeb196236b17998738112f37df78",
    )
    return _read_from(folder, _cub200)


@DATASETS.register(
    "imagenet",
    source="Russakovsky et al. 2015, arXiv 1409.0575",
    images="1,281,167 / 50,000",
    shape="3×224×224",
    classes="1000",
)
def imagenet(root: Path) -> RawData:
    """Torchvision's ImageNet 2012 in `root` or `root/imagenet`; its own validation images are the test split."""
    from torchvision.datasets import ImageNet

    folder = (root / "imagenet" if (root / "imagenet").is_dir() else root).expanduser()
    try:
        train, test = (image_files(folder, ImageNet(folder, split).samples) for split in ("train", "val"))
    except Exception as error:
        raise InputError(
            f"ImageNet cannot be read from {folder} ({reason(error)}); put its archives there and set data.root, or "
            "give as data.name a folder that has train/ and val/ with a folder for each class"
        ) from error
    return RawData(train, test, crop_ratio=PHOTO_CROP_RATIO, mean=IMAGENET_MEAN, sd=IMAGENET_SD)


def registered_shape(name: str) -> tuple[int, int, int]:
    """(channels, height, width) that a registered data set declares."""
    channels, height, width = (int(part) for part in DATASETS.entry(name).facts["shape"].split("×"))
    return channels, height, width


def downloaded(root: Path, name: str, url: str, md5: str) -> Path:
    """The folder `name` below `root`, whole: an archive is extracted beside it and then moved.

    Args:
        root: where the archive is downloaded to, unless it is there.
        name: of the one folder in the archive.
        url: of the archive.
        md5: of the archive.

    Raises:
        InputError: no network, another MD5, a full disk.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    folder, partial = root / name, root / f".{name}.partial"
    if folder.is_dir():
        return folder
    # What an extraction that was killed has left.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        download_and_extract_archive(url, str(root), str(partial), md5=md5)
        (partial / name).rename(folder)
    except Exception as error:
        raise InputError(
            f"{name} is not in {root} and cannot be downloaded to it ({reason(error)}); "
            f"set data.root to where it lies, or extract {url} there"
        ) from error
    return folder


def _torchvision_arrays(class_name: str, root: Path) -> RawData:
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
    train, test = (image_set(np.asarray(split.data), np.asarray(split.targets)) for split in splits)
    return RawData(train, test)


def _read_from(folder: Path, read: Callable[[Path], RawData]) -> RawData:
    try:
        return read(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} cannot be read ({reason(error)}); delete it to have it downloaded again") from error


def _tiny_imagenet(folder: Path) -> RawData:
    classes = sorted(entry.name for entry in os.scandir(folder / "train") if entry.is_dir())
    train = [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in sorted((folder / "train" / name / "images").iterdir())
    ]
    labels = {name: label for label, name in enumerate(classes)}
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    test = [(str(folder / "val" / "images" / line.split("\t")[0]), labels[line.split("\t")[1]]) for line in lines]
    return RawData(image_files(folder, train), image_files(folder, test))


def _cub200(folder: Path) -> RawData:
    def column(file: str) -> dict[str, str]:
        """The values by image id; each line is `id value`."""
        return dict(line.split(maxsplit=1) for line in (folder / file).read_text().splitlines())

    paths, labels, in_train = (
        column(file) for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )

    def split(mark: str) -> ImageFiles:
        chosen = [image for image in paths if in_train[image].strip() == mark]
        # Classes are numbered from 1.
        numbers = np.array([int(labels[image]) - 1 for image in chosen], dtype=np.int64)
        return ImageFiles(folder / "images", [paths[image].strip() for image in chosen], numbers)

    return RawData(split("1"), split("0"), crop_ratio=PHOTO_CROP_RATIO)
