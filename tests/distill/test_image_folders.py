from pathlib import Path

import numpy as np
import pytest
from hintsearch.distill.data import DataSpec, check_data_name, known_shape, load_data
from hintsearch.distill.image_folders import read_image_folder
from hintsearch.distill.image_sources import ImageFiles
from hintsearch.distill.lazy_images import LazyImages
from hintsearch.distill.splits import ImageSet
from hintsearch.models.errors import InputError
from image_files import truncate, write_class_folders, write_image

NOWHERE = Path("no-such-folder")


def names(source: object, root: Path) -> list[str]:
    assert isinstance(source, ImageFiles)
    return sorted(str(Path(source.name(row)).relative_to(root)) for row in range(len(source)))


def files(root: Path, split: str) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in (root / split).rglob("*.png"))


def spec(folder: Path, **changes: object) -> DataSpec:
    return DataSpec(str(folder), **{"size": 8, **changes})  # type: ignore[arg-type]


def error_of(data: DataSpec) -> str:
    with pytest.raises(InputError) as caught:
        load_data(data, NOWHERE)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_folder_of_class_folders_has_no_test_split_of_its_own(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    raw = read_image_folder(tmp_path)
    assert names(raw.train, tmp_path) == files(tmp_path, ".")
    assert raw.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert (raw.validation, raw.test) == (None, None)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_test_or_val_beside_train_is_the_test_split(tmp_path: Path, held_out: str) -> None:
    write_class_folders(tmp_path / "train", count=5)
    write_class_folders(tmp_path / held_out, count=2)
    raw = read_image_folder(tmp_path)
    assert names(raw.train, tmp_path) == files(tmp_path, "train")
    assert names(raw.test, tmp_path) == files(tmp_path, held_out)
    assert raw.validation is None


def test_val_beside_test_is_the_validation_split(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        write_class_folders(tmp_path / split, count=count)
    raw = read_image_folder(tmp_path)
    assert names(raw.validation, tmp_path) == files(tmp_path, "val")
    assert names(raw.test, tmp_path) == files(tmp_path, "test")


def test_validation_split_of_the_folder_is_used_as_it_is(tmp_path: Path) -> None:
    for split, classes in (("train", "abc"), ("val", "ac"), ("test", "abc")):
        write_class_folders(tmp_path / split, classes, count=4)
    splits = load_data(spec(tmp_path), NOWHERE)
    assert len(splits.train) == 12
    assert splits.validation.labels.tolist() == [0] * 4 + [2] * 4


def test_splits_of_a_folder_hold_every_image_once(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    splits = load_data(spec(tmp_path), NOWHERE)
    parts = [splits.train, splits.validation, splits.test]
    assert all(isinstance(part, ImageSet) for part in parts)
    assert [len(part) for part in parts if part] == [18, 6, 6]
    pixels = {image.tobytes() for part in parts if part for image in part.read(np.arange(len(part)))}
    assert len(pixels) == 30
    assert (splits.image_shape, splits.classes) == ((3, 8, 8), 3)


def test_images_that_take_more_than_the_memory_stay_files(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    # 30 images of 3×8×8 bytes.
    fitting, larger = (load_data(spec(tmp_path, memory_gb=bytes_ / 1e9), NOWHERE) for bytes_ in (5760, 5759))
    assert isinstance(fitting.train, ImageSet)
    assert isinstance(larger.train, LazyImages)
    for ours, theirs in ((fitting.train, larger.train), (fitting.validation, larger.validation)):
        assert np.array_equal(ours.read(np.arange(len(ours))), theirs.read(np.arange(len(theirs))))
        assert ours.labels.tolist() == theirs.labels.tolist()
    assert larger.mean == fitting.mean


def test_images_of_one_size_need_no_size(tmp_path: Path) -> None:
    for number in range(20):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", number, size=(7, 9))
    assert load_data(spec(tmp_path, size=None), NOWHERE).image_shape == (3, 7, 9)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    assert error_of(spec(tmp_path, size=None)).endswith("; set data.size, to which all are resized")


def test_images_that_do_not_fit_need_a_size(tmp_path: Path) -> None:
    for number in range(20):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", number, size=(7, 9))
    assert error_of(spec(tmp_path, size=None, memory_gb=1e-9)) == (
        f"data.size is not set, but the images of {tmp_path} take 0.0 GB, more than data.memory_gb, which is 1e-09; "
        "set data.size, or raise data.memory_gb"
    )


def test_size_may_be_height_and_width(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    assert load_data(spec(tmp_path, size=(6, 10)), NOWHERE).image_shape == (3, 6, 10)


def test_unreadable_images_are_left_out_up_to_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_class_folders(tmp_path)
    damaged = [tmp_path / place for place in ("a/003.png", "b/000.png", "c/009.png")]
    for path in damaged:
        truncate(path, 0.3)
    splits = load_data(spec(tmp_path, unreadable=3), NOWHERE)
    assert splits.test is not None
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 27
    assert all(any(str(path) in record.getMessage() for record in caplog.records) for path in damaged)
    message = error_of(spec(tmp_path, unreadable=2))
    assert message.startswith("3 images cannot be read (")
    assert message.endswith("but data.unreadable tolerates 2; mend or remove them, or raise data.unreadable")


def test_hidden_folders_and_other_files_are_no_classes_and_no_images(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "a" / "notes.txt").write_text("")
    raw = read_image_folder(tmp_path)
    assert names(raw.train, tmp_path) == files(tmp_path, ".")


def test_class_without_images_is_an_error(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "d").mkdir()
    message = error_of(spec(tmp_path))
    assert message.startswith(f"{tmp_path} is no folder of images (Found no valid file for the classes d.")


def test_class_that_only_test_has_is_an_error(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", "ab")
    write_class_folders(tmp_path / "test", "abc", count=2)
    assert error_of(spec(tmp_path)) == (
        f"{tmp_path / 'test' / 'c'} is a class that {tmp_path / 'train'} has not; "
        "add training images of it, or remove it"
    )


def test_labels_of_test_are_those_of_train_where_it_lacks_a_class(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", "abc")
    write_class_folders(tmp_path / "test", "ac", count=2)
    splits = load_data(spec(tmp_path), NOWHERE)
    assert splits.test is not None
    assert splits.test.labels.tolist() == [0, 0, 2, 2]


def test_test_split_without_images_is_an_error(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    (tmp_path / "test" / "a").mkdir(parents=True)
    assert error_of(spec(tmp_path)) == f"{tmp_path / 'test'} holds no images; add some, or remove the folder"


def test_folder_without_anything_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("")
    assert error_of(spec(tmp_path)) == (
        f"data.name is {str(tmp_path)!r}, but that folder has neither train.npz and test.npz nor a folder for each "
        "class of images; give one that has"
    )


def test_checking_the_name_of_a_folder_reads_no_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_text("no image")
    check_data_name(str(tmp_path))


@pytest.mark.parametrize(("size", "found"), [(8, (3, (3, 8, 8))), ((6, 10), (3, (3, 6, 10))), (None, None)])
def test_shape_of_a_folder_is_known_where_its_size_is(
    tmp_path: Path, size: int | tuple[int, int] | None, found: object
) -> None:
    write_class_folders(tmp_path / "train", count=1)
    assert known_shape(str(tmp_path), size) == found


def test_label_out_of_the_declared_range_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    assert error_of(spec(tmp_path, classes=2)) == (
        f"{tmp_path / 'c' / '000.png'} has the label 2, but labels must be 0..1; mend the labels or data.classes"
    )


def test_hash_of_splits_of_files_follows_the_files(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    one, again = (load_data(spec(tmp_path, memory_gb=0), NOWHERE).sha256() for _ in range(2))
    for path in (tmp_path / "a").iterdir():
        write_image(path, seed=9, size=(30, 30))
    assert one == again != load_data(spec(tmp_path, memory_gb=0), NOWHERE).sha256()
