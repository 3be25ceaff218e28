import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hintsearch.distill.data import (
    DATASETS,
    DataSpec,
    DataSplits,
    ImageSet,
    balanced_split,
    check_data_name,
    load_data,
)
from hintsearch.models.errors import InputError
from hintsearch.models.preprocessing import Preprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

NOWHERE = Path("no-such-folder")


def numbered(count: int, classes: int, shape: tuple[int, ...] = (3, 4)) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images whose pixels all are the image's number, with labels in turn."""
    numbers = np.arange(count, dtype=np.uint8).reshape(count, *(1 for _ in shape))
    return np.broadcast_to(numbers, (count, *shape)).copy(), np.arange(count, dtype=np.int64) % classes


def write_folder(folder: Path, **changes: Any) -> str:
    """Writes `train.npz` (40 images of 4 classes) and `test.npz` (8 images); changes go to `train.npz`."""
    for split, count in (("train", 40), ("test", 8)):
        images, labels = numbered(count, 4)
        content: dict[str, Any] = {"images": images, "labels": labels} | (changes if split == "train" else {})
        np.savez(folder / f"{split}.npz", **content)
    return str(folder)


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """The IDX format: two zero bytes, 8 for uint8, the number of dimensions, their sizes, the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write_fashion_mnist(root: Path) -> None:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 50), ("t10k", 20)):
        images, labels = numbered(count, 10, (28, 28))
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", labels.astype(np.uint8))


def counted(data: ImageSet) -> Counter[tuple[bytes, int]]:
    return Counter((image.tobytes(), int(label)) for image, label in zip(data.images, data.labels, strict=True))


def numbers(data: ImageSet) -> list[int]:
    """Which of the `numbered` images these are."""
    return sorted(data.images[:, 0, 0, 0].tolist())


def error_of(name: str, root: Path = NOWHERE) -> str:
    with pytest.raises(InputError) as caught:
        load_data(DataSpec(name), root)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data(DataSpec("digits"), NOWHERE)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is refused at once: the proxy is a closed port of this machine."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # urllib keeps an opener with the proxies that it found first.
    monkeypatch.setattr(urllib.request, "_opener", None)


def test_digits_splits_hold_every_image_once(digits: DataSplits) -> None:
    assert digits.test is not None
    together = counted(digits.train) + counted(digits.validation) + counted(digits.test)
    assert together == counted(DATASETS.get("digits")(NOWHERE).train)


def test_digits_splits_have_the_sizes_of_their_fractions(digits: DataSplits) -> None:
    assert digits.test is not None
    sizes = [len(digits.train), len(digits.validation), len(digits.test)]
    assert sizes == pytest.approx([0.6 * 1797, 0.2 * 1797, 0.2 * 1797], abs=10)


def test_digits_splits_are_class_balanced(digits: DataSplits) -> None:
    assert digits.test is not None
    whole = np.bincount(DATASETS.get("digits")(NOWHERE).train.labels)
    for split in (digits.validation, digits.test):
        assert np.abs(np.bincount(split.labels) - 0.2 * whole).max() <= 1


def test_digits_span_the_grey_levels_of_uint8(digits: DataSplits) -> None:
    assert digits.image_shape == (1, 8, 8)
    assert digits.classes == 10
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    assert len(np.unique(digits.train.images)) == 17


def test_splits_are_the_same_for_the_same_seed(digits: DataSplits) -> None:
    again = load_data(DataSpec("digits"), NOWHERE)
    assert again.test is not None
    assert digits.test is not None
    for ours, theirs in ((again.train, digits.train), (again.validation, digits.validation), (again.test, digits.test)):
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.labels, theirs.labels)


def test_splits_depend_on_the_seed(digits: DataSplits) -> None:
    other = load_data(DataSpec("digits", seed=1), NOWHERE)
    assert other.test is not None
    assert digits.test is not None
    assert counted(other.validation) != counted(digits.validation)
    assert counted(other.test) != counted(digits.test)


@pytest.mark.parametrize("fraction", [0.5, 0.1])
def test_train_fraction_takes_that_share_of_every_class(digits: DataSplits, fraction: float) -> None:
    part = load_data(DataSpec("digits", train_fraction=fraction), NOWHERE)
    expected = [round(fraction * count) for count in np.bincount(digits.train.labels)]
    assert np.bincount(part.train.labels).tolist() == expected
    assert counted(part.train) <= counted(digits.train)


def test_train_fraction_leaves_validation_and_test_alone(digits: DataSplits) -> None:
    part = load_data(DataSpec("digits", train_fraction=0.5), NOWHERE)
    assert part.test is not None
    assert digits.test is not None
    assert counted(part.validation) == counted(digits.validation)
    assert counted(part.test) == counted(digits.test)


def test_train_fraction_that_leaves_a_class_empty_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        load_data(DataSpec("digits", train_fraction=0.001), NOWHERE)
    assert str(caught.value) == (
        "the train split of digits has no image of class 0 of 0..9; "
        "raise data.train_fraction or change data.validation_fraction"
    )


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "validation"), (1.0, "train")])
def test_validation_fraction_that_leaves_a_split_empty_is_an_error(fraction: float, split: str) -> None:
    with pytest.raises(InputError, match=f"the {split} split of digits has no image of class 0"):
        load_data(DataSpec("digits", validation_fraction=fraction), NOWHERE)


def test_mean_and_sd_are_measured_on_the_training_split(digits: DataSplits) -> None:
    scaled = digits.train.images.astype(np.float64) / 255
    assert digits.mean == pytest.approx((scaled.mean(),), rel=1e-6)
    assert digits.sd == pytest.approx((scaled.std(),), rel=1e-6)


def test_given_mean_and_sd_are_used() -> None:
    splits = load_data(DataSpec("digits", mean=(0.25,), sd=(0.75,)), NOWHERE)
    assert (splits.mean, splits.sd) == ((0.25,), (0.75,))


@pytest.mark.parametrize("name", ["mean", "sd"])
def test_mean_or_sd_of_another_number_of_channels_is_an_error(name: str) -> None:
    values: dict[str, Any] = {name: (0.5, 0.5, 0.5)}
    with pytest.raises(InputError, match=f"^data.{name} has 3 values, but the images have 1 channels$"):
        load_data(DataSpec("digits", **values), NOWHERE)


def test_measured_sd_of_a_constant_channel_is_not_zero(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, images=np.full((40, 3, 4), 9, dtype=np.uint8))
    assert load_data(DataSpec(folder), NOWHERE).sd == (1e-6,)


def test_without_test_drops_the_test_split_only(digits: DataSplits) -> None:
    dropped = digits.without_test()
    assert dropped.test is None
    assert dropped == replace(digits, test=None)


def test_hash_of_splits_follows_training_images_labels_and_normalisation(digits: DataSplits) -> None:
    images, labels = digits.train.images.copy(), digits.train.labels.copy()
    images[0, 0, 0, 0] += 1
    labels[0] = (labels[0] + 1) % 10
    changed = [
        replace(digits, train=replace(digits.train, images=images)),
        replace(digits, train=replace(digits.train, labels=labels)),
        replace(digits, mean=(0.125,)),
        replace(digits, sd=(0.125,)),
    ]
    assert len({splits.sha256() for splits in [digits, *changed]}) == 5


def test_preprocessing_is_the_normalisation_alone(digits: DataSplits) -> None:
    assert digits.preprocessing == Preprocessing(digits.mean, digits.sd)


def test_split_in_memory_is_read_by_rows(digits: DataSplits) -> None:
    rows = np.array([5, 0, 5])
    assert isinstance(digits.train, ImageSet)
    assert np.array_equal(digits.train.read(rows), digits.train.images[rows])


def test_hash_of_splits_does_not_see_the_test_split(digits: DataSplits) -> None:
    assert digits.without_test().sha256() == digits.sha256()


def test_subset_keeps_the_order_of_the_indices() -> None:
    images, labels = numbered(6, 3)
    subset = ImageSet(images[:, None], labels).subset(np.array([4, 1]))
    assert subset.images[:, 0, 0, 0].tolist() == [4, 1]
    assert subset.labels.tolist() == [1, 1]


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_balanced_split_draws_the_fraction_of_every_class(labels: list[int], fraction: float, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    drawn, left = balanced_split(array, fraction, np.random.default_rng(seed))
    assert sorted([*drawn.tolist(), *left.tolist()]) == list(range(len(labels)))
    found = Counter(array[drawn].tolist())
    assert all(found[label] == round(fraction * count) for label, count in Counter(labels).items())


def test_balanced_split_mixes_the_classes() -> None:
    drawn, left = balanced_split(np.repeat(np.arange(4), 20), 0.5, np.random.default_rng(0))
    assert (np.diff(drawn // 20) < 0).any()
    assert (np.diff(left // 20) < 0).any()


def test_grey_folder_gets_one_channel(tmp_path: Path) -> None:
    splits = load_data(DataSpec(write_folder(tmp_path)), NOWHERE)
    assert splits.image_shape == (1, 3, 4)
    assert splits.classes == 4


def test_colour_folder_gets_its_channels_first(tmp_path: Path) -> None:
    images, labels = numbered(8, 4, (3, 5, 2))
    images[..., 1] += 100
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    splits = load_data(DataSpec(str(tmp_path), validation_fraction=0.5), NOWHERE)
    assert splits.image_shape == (2, 3, 5)
    assert (splits.train.images[:, 1] == splits.train.images[:, 0] + 100).all()


def test_folder_is_split_into_train_and_validation_and_keeps_its_test(tmp_path: Path) -> None:
    splits = load_data(DataSpec(write_folder(tmp_path)), NOWHERE)
    assert splits.test is not None
    assert sorted(numbers(splits.train) + numbers(splits.validation)) == list(range(40))
    assert len(splits.validation) == 8
    assert numbers(splits.test) == list(range(8))


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    splits = load_data(DataSpec(write_folder(tmp_path)), NOWHERE)
    assert (splits.train.images[:, 0, 0, 0] % 4 == splits.train.labels).all()


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint16])
def test_labels_may_be_any_integers(tmp_path: Path, kind: type[np.integer[Any]]) -> None:
    labels = numbered(40, 4)[1].astype(kind)
    assert load_data(DataSpec(write_folder(tmp_path, labels=labels)), NOWHERE).train.labels.dtype == np.int64


@pytest.mark.parametrize("missing", ["train.npz", "test.npz"])
def test_folder_without_a_split_is_an_error(tmp_path: Path, missing: str) -> None:
    folder = write_folder(tmp_path)
    (tmp_path / missing).unlink()
    expected = f"data.name is {folder!r}, but that folder has no {missing}; it needs train.npz and test.npz"
    assert error_of(folder) == expected


def test_unknown_name_is_an_error_with_the_nearest_data_set() -> None:
    assert error_of("digtis").startswith("unknown data set 'digtis'; did you mean 'digits'? (cifar10, ")


def test_missing_folder_is_an_error_with_the_data_sets() -> None:
    assert error_of("no/such/folder").startswith("unknown data set 'no/such/folder'; choose one of cifar10, ")


def test_checking_a_name_reads_no_files(tmp_path: Path) -> None:
    for split in ("train.npz", "test.npz"):
        (tmp_path / split).write_bytes(b"unreadable")
    check_data_name(str(tmp_path))
    assert "cannot be read" in error_of(str(tmp_path))


@given(share=st.floats(0, 0.99), compressed=st.booleans())
@settings(deadline=None)
def test_npz_that_is_cut_short_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, share: float, compressed: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    name = write_folder(folder)
    if compressed:
        images, labels = numbered(40, 4)
        np.savez_compressed(folder / "train.npz", images=images, labels=labels)
    content = (folder / "train.npz").read_bytes()
    (folder / "train.npz").write_bytes(content[: int(share * len(content))])
    assert error_of(name).startswith(f"{folder / 'train.npz'} cannot be read (")


def test_npz_with_a_damaged_value_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    content = bytearray((tmp_path / "train.npz").read_bytes())
    content[300] ^= 255
    (tmp_path / "train.npz").write_bytes(content)
    assert "Bad CRC-32" in error_of(folder)


def test_single_array_in_the_place_of_an_archive_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    with (tmp_path / "train.npz").open("wb") as file:
        np.save(file, numbered(40, 4)[0])
    assert error_of(folder).endswith("it needs the arrays `images` and `labels`")


def test_npz_without_labels_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    np.savez(tmp_path / "train.npz", images=numbered(40, 4)[0])
    assert error_of(folder).endswith("it needs the arrays `images` and `labels`")


def test_pickled_objects_in_an_npz_are_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, labels=np.array([{}] * 40, dtype=object))
    assert "allow_pickle=False" in error_of(folder)


@pytest.mark.parametrize(
    ("images", "described"),
    [
        (np.zeros((40, 3, 4), dtype=np.float32), "float32 [40, 3, 4]"),
        (np.zeros((40, 12), dtype=np.uint8), "uint8 [40, 12]"),
        (np.zeros((40, 3, 4, 3, 1), dtype=np.uint8), "uint8 [40, 3, 4, 3, 1]"),
    ],
)
def test_images_of_a_wrong_type_or_shape_are_an_error(tmp_path: Path, images: NDArray[Any], described: str) -> None:
    folder = write_folder(tmp_path, images=images)
    expected = f"images are {described}, but must be uint8 [N, H, W] or [N, H, W, C]"
    assert error_of(folder) == f"{tmp_path / 'train.npz'}: {expected}"


@pytest.mark.parametrize(
    ("labels", "described"),
    [
        (np.zeros(40, dtype=np.float64), "float64 [40]"),
        (np.zeros(39, dtype=np.int64), "int64 [39]"),
        (np.zeros((40, 4), dtype=np.int64), "int64 [40, 4]"),
        (np.full(40, "cat"), "<U3 [40]"),
    ],
)
def test_labels_of_a_wrong_type_or_shape_are_an_error(tmp_path: Path, labels: NDArray[Any], described: str) -> None:
    folder = write_folder(tmp_path, labels=labels)
    expected = f"labels are {described}, but must be 40 integers from 0"
    assert error_of(folder) == f"{tmp_path / 'train.npz'}: {expected}"


def test_negative_label_is_an_error_that_names_its_image(tmp_path: Path) -> None:
    labels = numbered(40, 4)[1]
    labels[7] = -3
    assert error_of(write_folder(tmp_path, labels=labels)) == (
        f"{tmp_path / 'train.npz'}: the label of image 7 is -3, but labels start at 0; number them anew"
    )


@pytest.mark.parametrize(("label", "largest"), [(9, 9), (2**40, 2**40)])
def test_label_far_out_of_range_is_an_error(tmp_path: Path, label: int, largest: int) -> None:
    labels = numbered(40, 4)[1]
    labels[0] = label
    assert f"has no image of class 4 of 0..{largest};" in error_of(write_folder(tmp_path, labels=labels))


@pytest.mark.parametrize("split", ["training", "test"])
def test_label_beyond_the_declared_classes_is_an_error(tmp_path: Path, split: str) -> None:
    folder = write_folder(tmp_path)
    images, labels = numbered(40, 4)
    labels[5] = 4
    np.savez(tmp_path / ("train.npz" if split == "training" else "test.npz"), images=images, labels=labels)
    with pytest.raises(InputError) as caught:
        load_data(DataSpec(folder, classes=4), NOWHERE)
    assert str(caught.value) == (
        f"image 5 of the {split} images of {folder} has the label 4, but labels must be 0..3; "
        "mend the labels or data.classes"
    )


def test_declared_class_without_images_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    with pytest.raises(InputError, match=r"has no image of class 4 of 0\.\.4;"):
        load_data(DataSpec(folder, classes=5), NOWHERE)


def test_class_that_only_test_has_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    images, labels = numbered(10, 5)
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    assert error_of(folder) == (
        f"image 4 of the test images of {folder} has the label 4, but labels must be 0..3; "
        "mend the labels, or give data.classes"
    )


def test_gap_between_the_classes_is_an_error(tmp_path: Path) -> None:
    labels = numbered(40, 4)[1]
    folder = write_folder(tmp_path, labels=np.where(labels == 1, 0, labels))
    assert error_of(folder).startswith(f"the train split of {folder} has no image of class 1 of 0..3;")


def test_archive_without_images_is_an_error(tmp_path: Path) -> None:
    empty = {"images": np.zeros((0, 3, 4), np.uint8), "labels": np.zeros(0, np.int64)}
    folder = write_folder(tmp_path, **empty)
    assert error_of(folder) == f"{tmp_path / 'train.npz'} holds no images; it needs at least one of each class"


def test_test_images_of_another_shape_are_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, images=np.zeros((40, 5, 4), np.uint8))
    assert error_of(folder) == (
        f"the images [C, H, W] of {folder} are [1, 5, 4] in train.npz, but [1, 3, 4] in test.npz; "
        "they must be of one shape"
    )


def test_fashion_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    splits = load_data(DataSpec("fashion_mnist"), tmp_path)
    assert splits.test is not None
    assert splits.image_shape == (1, 28, 28)
    assert sorted(numbers(splits.train) + numbers(splits.validation)) == list(range(50))
    assert (splits.train.images[:, 0, 0, 0] % 10 == splits.train.labels).all()
    assert numbers(splits.test) == list(range(20))


def test_root_of_the_study_comes_before_the_default_root(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    assert load_data(DataSpec("fashion_mnist", root=str(tmp_path)), NOWHERE).classes == 10
    assert not NOWHERE.exists()


@pytest.mark.parametrize("kind", ["images-idx3-ubyte", "labels-idx1-ubyte"])
def test_fashion_mnist_file_that_is_cut_short_is_an_error(tmp_path: Path, kind: str) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / f"train-{kind}"
    path.write_bytes(path.read_bytes()[:-5])
    message = error_of("fashion_mnist", tmp_path)
    assert message.startswith(f"FashionMNIST cannot be read from {tmp_path} nor downloaded to it (")
    assert message.endswith("; set data.root, or delete damaged files there")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "class_name"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("fashion_mnist", "FashionMNIST")]
)
def test_data_set_that_cannot_be_downloaded_is_an_error(tmp_path: Path, name: str, class_name: str) -> None:
    message = error_of(name, tmp_path)
    assert message.startswith(f"{class_name} cannot be read from {tmp_path} nor downloaded to it (")
    assert "<urlopen error" in message
