import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hintsearch.distill.data import DATASETS, DataSpec, DataSplits, known_shape, load_data
from hintsearch.distill.datasets import downloaded, registered_shape
from hintsearch.distill.image_sources import ImageFiles
from hintsearch.models.errors import InputError
from image_files import write_class_folders, write_image
from PIL import Image

WNIDS = ("n01", "n02", "n03")


def write_tiny_imagenet(root: Path) -> Path:
    """Six training and two test images of each of three classes, whose ids `wnids.txt` lists in another order."""
    folder = root / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        for number in range(6):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 10 * label + number, (64, 64))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    lines = []
    for number in range(6):
        name, wnid = f"val_{number}.JPEG", WNIDS[::-1][number % 3]
        write_image(folder / "val" / "images" / name, 100 + number, (64, 64), mode="L")
        lines.append(f"{name}\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS[::-1]))
    return folder


def write_cub200(root: Path) -> Path:
    """Sixteen images of two birds, of which every fourth is a test image."""
    folder = root / "CUB_200_2011"
    lines: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number in range(1, 17):
        label = 1 + (number > 8)
        path = f"00{label}.Bird_{label}/Bird_{number}.jpg"
        write_image(folder / "images" / path, number, (40, 60))
        lines["images"].append(f"{number} {path}")
        lines["image_class_labels"].append(f"{number} {label}")
        lines["train_test_split"].append(f"{number} {int(number % 4 != 0)}")
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


def write_imagenet(folder: Path) -> None:
    """The folders of ImageNet's own class, and the file that it makes of the development kit."""
    for wnid, count in ((wnid, count) for wnid in WNIDS for count in (6,)):
        write_class_folders(folder / "train", [wnid], count, ".JPEG")  # type: ignore[arg-type]
        write_class_folders(folder / "val", [wnid], 2, ".JPEG")  # type: ignore[arg-type]
    torch.save(({wnid: (wnid,) for wnid in WNIDS}, []), folder / "meta.bin")


def loaded(name: str, root: Path, **changes: object) -> DataSplits:
    return load_data(DataSpec(name, **{"validation_fraction": 0.34, **changes}), root)  # type: ignore[arg-type]


def sizes(splits: DataSplits) -> list[int]:
    assert splits.test is not None
    return [len(part) for part in (splits.train, splits.validation, splits.test)]


def files_of(name: str, root: Path) -> tuple[ImageFiles, ImageFiles]:
    raw = DATASETS.get(name)(root)
    assert isinstance(raw.train, ImageFiles)
    assert isinstance(raw.test, ImageFiles)
    return raw.train, raw.test


def test_tiny_imagenet_is_read_from_its_files(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    splits = loaded("tiny_imagenet", tmp_path)
    assert sizes(splits) == [12, 6, 6]
    assert (splits.image_shape, splits.classes) == ((3, 64, 64), 3)
    train, test = files_of("tiny_imagenet", tmp_path)
    assert all(WNIDS[label] in Path(train.name(row)).name for row, label in enumerate(train.labels))
    assert [Path(test.name(row)).name for row in range(6)] == [f"val_{number}.JPEG" for number in range(6)]
    assert test.labels.tolist() == [2, 1, 0, 2, 1, 0]
    # Its images have the declared size and are left as they are.
    with Image.open(folder / "val" / "images" / "val_0.JPEG") as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert splits.test is not None
    assert np.array_equal(splits.test.read(np.arange(1))[0], expected)


def test_damaged_list_of_tiny_imagenet_is_an_error(tmp_path: Path) -> None:
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(InputError) as caught:
        loaded("tiny_imagenet", tmp_path)
    assert str(caught.value) == f"{folder} cannot be read ('n99'); delete it to have it downloaded again"


def test_cub200_is_read_from_its_lists(tmp_path: Path) -> None:
    write_cub200(tmp_path)
    splits = loaded("cub200", tmp_path, size=16)
    assert sizes(splits) == [8, 4, 4]
    assert (splits.image_shape, splits.classes) == ((3, 16, 16), 2)
    train, test = files_of("cub200", tmp_path)
    assert [Path(test.name(row)).stem for row in range(4)] == [f"Bird_{number}" for number in (4, 8, 12, 16)]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert all(f"Bird_{label + 1}" in Path(train.name(row)).parent.name for row, label in enumerate(train.labels))


def test_imagenet_is_read_by_torchvisions_class(tmp_path: Path) -> None:
    write_imagenet(tmp_path / "imagenet")
    splits = loaded("imagenet", tmp_path, size=16)
    assert sizes(splits) == [12, 6, 6]
    assert splits.classes == 3
    assert (splits.mean, splits.sd) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    train, test = files_of("imagenet", tmp_path)
    for part, name in ((train, "train"), (test, "val")):
        for row, label in enumerate(part.labels):
            assert Path(part.name(row)).parent == tmp_path / "imagenet" / name / WNIDS[label]


def test_imagenet_may_lie_in_the_root_itself(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    assert sizes(loaded("imagenet", tmp_path, size=16)) == [12, 6, 6]


def test_imagenet_that_is_not_there_is_an_error_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        loaded("imagenet", tmp_path)
    message = str(caught.value)
    assert message.startswith(f"ImageNet cannot be read from {tmp_path} (The archive ILSVRC2012_devkit_t12.tar.gz ")
    assert message.endswith("give as data.name a folder that has train/ and val/ with a folder for each class")


@pytest.mark.parametrize("name", ["cub200", "imagenet"])
def test_photos_are_cropped_as_is_usual_unless_the_study_says_otherwise(tmp_path: Path, name: str) -> None:
    """A crop of 14 out of 16 pixels, or of everything."""
    write_cub200(tmp_path)
    write_imagenet(tmp_path / "imagenet")
    usual, same, whole = (loaded(name, tmp_path, size=14, crop_ratio=ratio) for ratio in (None, 0.875, 1.0))
    assert usual.sha256() == same.sha256() != whole.sha256()


NO_SERVER = "http://127.0.0.1:9/birds.zip"


@pytest.fixture
def md5(tmp_path: Path) -> str:
    """Of an archive that is downloaded already: a folder `birds` with one file."""
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as file:
        file.writestr("birds/list.txt", "one")
    return hashlib.md5((tmp_path / "birds.zip").read_bytes()).hexdigest()


def test_archive_is_extracted_once(tmp_path: Path, md5: str) -> None:
    for _ in range(2):
        folder = downloaded(tmp_path, "birds", NO_SERVER, md5)
        assert (folder / "list.txt").read_text() == "one"
        (tmp_path / "birds.zip").unlink(missing_ok=True)


def test_archive_with_another_hash_is_downloaded_again(tmp_path: Path, md5: str) -> None:
    with pytest.raises(InputError) as caught:
        downloaded(tmp_path, "birds", NO_SERVER, md5[::-1])
    message = str(caught.value)
    assert message.startswith(f"birds is not in {tmp_path} and cannot be downloaded to it (")
    assert message.endswith(f"; set data.root to where it lies, or extract {NO_SERVER} there")
    assert not (tmp_path / "birds").exists()


def test_extraction_that_was_cut_short_is_not_taken_for_the_data(tmp_path: Path, md5: str) -> None:
    """As if the process had been killed while it extracted."""
    (tmp_path / ".birds.partial" / "birds").mkdir(parents=True)
    (tmp_path / ".birds.partial" / "birds" / "half.txt").write_text("")
    assert os.listdir(downloaded(tmp_path, "birds", NO_SERVER, md5)) == ["list.txt"]


@pytest.mark.parametrize("entry", list(DATASETS), ids=lambda entry: str(entry.name))
def test_every_data_set_declares_its_source_images_shape_and_classes(entry: object) -> None:
    name = getattr(entry, "name")  # noqa: B009
    assert known_shape(name) == (int(DATASETS.entry(name).facts["classes"]), registered_shape(name))
    assert DATASETS.entry(name).source
    assert DATASETS.entry(name).facts["images"]


def test_known_shape_has_the_size_of_the_study() -> None:
    assert known_shape("imagenet", 96) == (1000, (3, 96, 96))
    assert known_shape("digits", (16, 8)) == (10, (1, 16, 8))


def test_arrays_are_resized_to_the_size_of_the_study(tmp_path: Path) -> None:
    original, larger = (load_data(DataSpec("digits", size=size, interpolation="nearest"), tmp_path) for size in (8, 16))
    assert larger.image_shape == (1, 16, 16)
    repeated = original.train.read(np.arange(50)).repeat(2, axis=2).repeat(2, axis=3)
    assert np.array_equal(larger.train.read(np.arange(50)), repeated)


def test_resized_arrays_are_rounded_and_not_cut_off(tmp_path: Path) -> None:
    splits = load_data(DataSpec("digits", size=4), tmp_path)
    original = load_data(DataSpec("digits"), tmp_path).train.read(np.arange(1_000))
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(original).double(), (4, 4), mode="bilinear", antialias=True
    )
    assert (torch.from_numpy(splits.train.read(np.arange(1_000))) - theirs).abs().max() <= 0.5 + 1e-3
