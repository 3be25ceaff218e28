"""A data set made by one's own function: map-style training, validation and test sets."""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..models.errors import InputError, reason
from ..models.own_code import load_own_code, own_code_sha256
from .image_sources import RawData, pixels_of
from .splits import Images, Labels, Rows, content_hash

KIND = "data set"
SPLITS = ("train", "validation", "test")


def read_own_data(name: str) -> RawData:
    """Calls one's own function and takes its data sets.

    Args:
        name: `path/to/file.py:function` or `package.module:function`. The function takes nothing and returns
            (train, validation, test) or a mapping with these keys; validation and test may be None. Each is map-style:
            `len(dataset)`, and `dataset[i]` is (image, label). An image is a Pillow image, a uint8 array [H, W] or
            [H, W, C], or a uint8 tensor [C, H, W]; a label is an integer. Labels are taken from `dataset.targets` or
            `dataset.labels` if it has them, else every item is read once for its label.

            Items are read by one thread at a time unless the data set has a true attribute `thread_safe`.

    Raises:
        InputError: what the function returns is none of that, or it fails.
    """
    place, _, function = name.rpartition(":")
    # Another process, which may run in another folder, calls the function again.
    name = f"{Path(place).resolve()}:{function}" if place.endswith(".py") else name
    found = _called(name)
    train = OwnItems(name, "train", found["train"])
    others = [
        None if found[split] is None else OwnItems(name, split, found[split], channels=train.channels)
        for split in SPLITS[1:]
    ]
    return RawData(train, validation=others[0], test=others[1])


class OwnItems:
    """Items of a data set of one's own.

    It is no part of what travels to other processes, which might not know its class: they call the function again.

    Args:
        name: of the function.
        split: train, validation or test.
        dataset: what the function gave; None: it is called when the first item is read.
        labels: int64 [N]; None: asked of the data set.
        rows: which of its items; None: all.
        channels: of every image; None: those of the first.
    """

    def __init__(
        self,
        name: str,
        split: str,
        dataset: Any,
        labels: Labels | None = None,
        rows: Rows | None = None,
        channels: int | None = None,
    ) -> None:
        self._function, self._split = name, split
        self._dataset, self._turn, self._loading = dataset, _turn_of(dataset), threading.Lock()
        self._rows = np.arange(_length(dataset, self._what())) if rows is None else rows
        self._labels = self._asked_labels() if labels is None else labels
        self._channels = channels or self._first_channels()

    @property
    def labels(self) -> Labels:
        """Int64 [N]."""
        return self._labels

    @property
    def channels(self) -> int:
        """Of every image."""
        return self._channels

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, indices: Rows) -> "OwnItems":
        """The items at `indices`, in that order."""
        part = self._labels[indices], self._rows[indices]
        return OwnItems(self._function, self._split, self._loaded(), *part, self._channels)

    def name(self, row: int) -> str:
        """For example `item 7 of train of data.py:birds`."""
        return f"item {self._rows[row]} of {self._what()}"

    def pixels(self, row: int) -> Images:
        """One image, uint8 [H, W, C]."""
        pixels = _pixels(self._item(row)[0], self._channels, self.name(row))
        if pixels.shape[2] != self._channels:
            raise InputError(
                f"{self.name(row)} has {pixels.shape[2]} channels, but the first has {self._channels}; "
                "all images must have as many"
            )
        return pixels

    def fingerprint(self) -> str:
        """A hash of the file that holds the function, the items' numbers and their labels."""
        code = own_code_sha256(self._function), self._split, self._channels
        return content_hash(code, self._rows, self._labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None, "_turn": None, "_loading": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loading=threading.Lock())

    def _what(self) -> str:
        return f"{self._split} of {self._function}"

    def _loaded(self) -> Any:
        with self._loading:
            if self._dataset is None:
                self._dataset = _called(self._function)[self._split]
                self._turn = _turn_of(self._dataset)
            return self._dataset

    def _item(self, row: int) -> tuple[Any, Any]:
        dataset = self._loaded()
        with self._turn:
            item = dataset[int(self._rows[row])]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"{self.name(row)} is {type(item).__name__}, but must be a pair (image, label)")
        return item[0], item[1]

    def _asked_labels(self) -> Labels:
        for attribute in ("targets", "labels"):
            given = getattr(self._dataset, attribute, None)
            if given is not None:
                return _integers(given, len(self), f"the `{attribute}` of {self._what()}")
        return _integers([self._label(row) for row in range(len(self))], len(self), f"the labels of {self._what()}")

    def _label(self, row: int) -> Any:
        try:
            return self._item(row)[1]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.name(row)} cannot be read ({reason(error)}), so that its label is not known; mend it, or give "
                "the data set an attribute `targets` with all labels"
            ) from error

    def _first_channels(self) -> int:
        """Of the first image that can be read; one that cannot is reported when it is decoded."""
        for row in range(len(self)):
            try:
                image = self._item(row)[0]
            except InputError:
                raise
            except Exception:
                continue
            channels: int = _pixels(image, None, self.name(row)).shape[2]
            return channels
        raise InputError(f"no item of {self._what()} can be read; mend the function or its files")


def _called(name: str) -> dict[str, Any]:
    """Train, validation and test as the function gives them."""
    try:
        found = load_own_code(name, KIND)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data set {name!r} failed ({type(error).__name__}: {reason(error)}); mend it") from error
    if isinstance(found, tuple | list) and len(found) == len(SPLITS):
        found = dict(zip(SPLITS, found, strict=True))
    if not isinstance(found, Mapping) or found.get("train") is None or not set(found) <= set(SPLITS):
        keys = f" with keys {sorted(map(str, found))}" if isinstance(found, Mapping) else ""
        raise InputError(
            f"data set {name!r} returns {type(found).__name__}{keys}, but must return (train, validation, test), or a "
            "mapping with these keys; validation and test may be None"
        )
    return {split: found.get(split) for split in SPLITS}


def _turn_of(dataset: Any) -> AbstractContextManager[Any]:
    """What a thread holds while it reads an item."""
    return nullcontext() if getattr(dataset, "thread_safe", False) else threading.Lock()


def _length(dataset: Any, what: str) -> int:
    count: int = len(dataset) if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") else 0
    if not count:
        raise InputError(
            f"{what} is {type(dataset).__name__}, but must be a data set with at least one item, `len(dataset)` and "
            "`dataset[i]`"
        )
    return count


def _integers(given: Any, count: int, what: str) -> Labels:
    labels: NDArray[Any] = np.asarray(given)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{what} are {labels.dtype} {list(labels.shape)}, but must be {count} integers from 0")
    return labels.astype(np.int64)


def _pixels(image: Any, channels: int | None, name: str) -> Images:
    """An item's image as uint8 [H, W, C]; a Pillow image is converted to so many channels, or to its own."""
    if isinstance(image, Image.Image):
        return pixels_of(image, channels or (1 if image.mode in ("1", "L") else 3))
    array = np.asarray(image.permute(1, 2, 0) if isinstance(image, torch.Tensor) and image.ndim == 3 else image)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3:
        kind = type(image).__name__ if array.dtype == object else f"{array.dtype} {list(np.shape(image))}"
        raise InputError(
            f"{name}: the image is {kind}, but must be a Pillow image, a uint8 array [H, W] or [H, W, C], or a uint8 "
            "tensor [C, H, W]; return it as it is read, without normalisation"
        )
    return array
