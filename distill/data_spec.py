"""Which data a study uses, and how they are read and split."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how they are split.

    Attributes:
        name: of the data set registry; a folder holding `train.npz` and `test.npz`; a folder of images; or one's own
            function (see `read_own_data`).
        root: folder where torchvision's data sets lie or are downloaded to.
        train_fraction: share of the training images that is used, class-balanced.
        validation_fraction: share of the training images (of all images, if the data set ships no test split) that is
            held out for validation, class-balanced; unused if the data set ships a validation split.
        test_fraction: share of all images held out for test, if the data set ships no test split.
        seed: of the splits.
        mean: channel means of the images in 0..1; None: the data set's usual, or measured on the training split.
        sd: channel standard deviations; None: as for the means.
        size: height and width, or one number for both; None: as the data set has them, or the registry's size where
            they differ.
        interpolation: by which images are resized: nearest, bilinear or bicubic.
        crop_ratio: of image files, see `Decoding`; None: the data set's usual, 1 for one's own.
        memory_gb: images that take less, as uint8, are decoded once when they are loaded; others whenever they are
            read.
        workers: decoding threads of a split that is decoded when it is read.
        unreadable: how many unreadable images are left out; more are an error.
        classes: number of classes; None: as many as the labels say.
        meta_images: training images set aside for dynamic weights to learn on, as many of each class.
    """

    name: str = "digits"
    root: str | None = None
    train_fraction: float = 1.0
    validation_fraction: float = 0.2
    test_fraction: float = 0.2
    seed: int = 0
    mean: tuple[float, ...] | None = None
    sd: tuple[float, ...] | None = None
    size: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop_ratio: float | None = None
    memory_gb: float = 4.0
    workers: int = 2
    unreadable: int = 0
    classes: int | None = None
    meta_images: int = 0

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width), or None: as the data set has them."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size
