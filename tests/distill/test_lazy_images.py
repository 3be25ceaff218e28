import logging
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hintsearch.distill.image_folders import read_image_folder
from hintsearch.distill.image_sources import ImageFiles
from hintsearch.distill.lazy_images import Decoding, LazyImages, UnreadableImages, ahead
from hintsearch.models.errors import InputError
from image_files import truncate, write_class_folders, write_image
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode, v2

EVERYTHING = np.arange(15)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of several sizes in each of three classes."""
    write_class_folders(tmp_path, count=5)
    return tmp_path


def lazy(folder: Path, unreadable: int = 0, decoding: Decoding | None = None) -> LazyImages:
    source = read_image_folder(folder).train
    assert isinstance(source, ImageFiles)
    return LazyImages(source, decoding or Decoding((8, 8)), UnreadableImages(unreadable))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hintsearch-decoding")]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (9, 8), (64, 64)])
def test_view_is_torchvisions_resize_and_centre_crop(shape: tuple[int, int], interpolation: str) -> None:
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    covering = v2.Resize(round(14 / 0.875), InterpolationMode(interpolation), antialias=True)
    theirs = v2.Compose([covering, v2.CenterCrop(14)])(pixels)
    assert torch.equal(Decoding((14, 14), 0.875, interpolation).view(pixels, "it"), theirs)


@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (3, 5), (7, 11)])
def test_view_has_the_size_and_no_black_edge(shape: tuple[int, int]) -> None:
    made = Decoding((6, 10)).view(torch.full((1, *shape), 200, dtype=torch.uint8), "it")
    assert made.shape == (1, 6, 10)
    assert (made == 200).all()


def test_view_of_an_image_of_the_size_is_the_image() -> None:
    pixels = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    assert torch.equal(Decoding((8, 6)).view(pixels, "it"), pixels)


def test_image_of_another_size_is_an_error_where_no_size_is_set() -> None:
    with pytest.raises(InputError) as caught:
        Decoding((8, 6), same_size=True).view(torch.zeros(3, 6, 8, dtype=torch.uint8), "cat.png")
    assert str(caught.value) == (
        "cat.png has 6×8 pixels, but the first image 8×6; set data.size, to which all are resized"
    )


def test_unknown_interpolation_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown interpolation 'bicubik'; did you mean 'bicubic'"):
        Decoding((8, 8), interpolation="bicubik")


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_crop_ratio_out_of_range_is_an_error(ratio: float) -> None:
    with pytest.raises(InputError, match=rf"^data.crop_ratio is {ratio:g}, but must be in 0..1; "):
        Decoding((8, 8), ratio)


def test_rows_are_read_in_the_order_asked_for(folder: Path) -> None:
    split = lazy(folder)
    rows = np.array([7, 0, 14, 7])
    views = [split.view(int(row)) for row in rows]
    assert np.array_equal(split.read(rows), np.stack([view.numpy() for view in views if view is not None]))


def test_grey_and_palette_files_are_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA"):
        write_image(tmp_path / "a" / f"{mode}.png", size=(8, 8), mode=mode)
    assert lazy(tmp_path).read(np.arange(3)).shape == (3, 3, 8, 8)


def test_subset_keeps_the_order_of_the_indices(folder: Path) -> None:
    split = lazy(folder)
    part = split.subset(np.array([9, 2]))
    assert part.labels.tolist() == split.labels[[9, 2]].tolist()
    assert np.array_equal(part.read(np.arange(2)), split.read(np.array([9, 2])))


def test_decoded_split_holds_what_is_read(folder: Path) -> None:
    split = lazy(folder)
    decoded = split.decoded(workers=3)
    assert np.array_equal(decoded.images, split.read(EVERYTHING))
    assert decoded.labels.tolist() == split.labels.tolist()
    assert decoded.image_shape == split.image_shape == (3, 8, 8)


def test_fingerprint_follows_files_labels_and_decoding(folder: Path, tmp_path: Path) -> None:
    split = lazy(folder)
    found = [
        split.fingerprint(),
        lazy(folder, decoding=Decoding((8, 8), 0.875)).fingerprint(),
        split.subset(EVERYTHING[1:]).fingerprint(),
        LazyImages(ImageFiles(folder, ["a/000.png"] * 15, split.labels), split.decoding).fingerprint(),
    ]
    (folder / "a" / "000.png").write_bytes(b"another size")
    found.append(lazy(folder).fingerprint())
    assert len(set(found)) == 5


def test_fingerprint_stays_where_the_folder_is_moved(folder: Path, tmp_path: Path) -> None:
    before = lazy(folder).fingerprint()
    moved = folder.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert lazy(moved).fingerprint() == before


def test_split_travels_to_other_processes(folder: Path) -> None:
    split = lazy(folder)
    there = pickle.loads(pickle.dumps(split))
    assert np.array_equal(there.read(EVERYTHING), split.read(EVERYTHING))


@pytest.fixture
def damaged(folder: Path) -> Path:
    """The same pictures, of which `a/001`, truncated, and `b/002`, no image, cannot be read."""
    write_image(folder / "a" / "001.png", size=(40, 40))
    truncate(folder / "a" / "001.png")
    (folder / "b" / "002.png").write_text("no image")
    return folder


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_image_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / "a" / f"0{suffix}", size=(64, 64))
    truncate(tmp_path / "a" / f"0{suffix}")
    split = lazy(tmp_path, unreadable=1)
    assert split.whole(0) is None
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_image_of_more_than_8_bits_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "a" / "0.png")
    assert lazy(tmp_path, unreadable=1).view(0) is None
    assert "it has more than 8 bits a channel (mode I;16)" in caplog.text


def test_unreadable_images_are_left_out_when_all_are_decoded(damaged: Path) -> None:
    split = lazy(damaged, unreadable=2)
    decoded = split.decoded(workers=2)
    kept = np.delete(EVERYTHING, [1, 7])
    assert decoded.labels.tolist() == split.labels[kept].tolist()
    assert np.array_equal(decoded.images, split.read(kept))
    split.unreadable.check()


def test_each_unreadable_image_is_reported_once_by_its_path(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = lazy(damaged, unreadable=2)
    for _ in range(2):
        split.decoded(workers=2)
    told = [record for record in caplog.records if record.name == "hintsearch.data"]
    assert [record.levelno for record in told] == [logging.WARNING] * 2
    # Threads find them in any order.
    messages = sorted(record.getMessage() for record in told)
    for message, place in zip(messages, ("a/001.png", "b/002.png"), strict=True):
        assert message.startswith(f"{damaged / place} cannot be read (")


def test_more_unreadable_images_than_tolerated_are_an_error(damaged: Path) -> None:
    split = lazy(damaged, unreadable=1)
    with pytest.raises(InputError) as caught:
        split.read(EVERYTHING)
    paths = ", ".join(str(damaged / place) for place in ("a/001.png", "b/002.png"))
    assert str(caught.value) == (
        f"2 images cannot be read ({paths}), but data.unreadable tolerates 1; "
        "mend or remove them, or raise data.unreadable"
    )


def test_error_names_the_first_of_many_unreadable_images() -> None:
    unreadable = UnreadableImages(3)
    for number in range(5):
        unreadable.note(f"{number}.png", OSError("damaged"))
    with pytest.raises(InputError, match=r"^5 images cannot be read \(0.png, 1.png, 2.png, ...\), but "):
        unreadable.check()


def test_next_readable_image_of_the_class_stands_in_for_an_unreadable_one(damaged: Path) -> None:
    split = lazy(damaged, unreadable=3)
    truncate(damaged / "a" / "002.png", 0.1)
    found = split.read(EVERYTHING)
    expected = EVERYTHING.copy()
    expected[[1, 2, 7]] = 3, 3, 8
    assert np.array_equal(found, split.read(expected))


def test_first_image_of_the_class_stands_in_for_its_last(folder: Path) -> None:
    truncate(folder / "b" / "004.png", 0.1)
    split = lazy(folder, unreadable=1)
    assert np.array_equal(split.read(np.array([9])), split.read(np.array([5])))


def test_missing_file_is_an_unreadable_image(folder: Path) -> None:
    split = lazy(folder, unreadable=1)
    (folder / "a" / "000.png").unlink()
    assert split.view(0) is None
    split.fingerprint()


def test_work_ahead_comes_in_order_whatever_its_time() -> None:
    def slow(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item

    assert list(ahead(slow, range(20), 4, 6)) == list(range(20))


def test_work_is_done_no_further_ahead_than_told() -> None:
    begun: list[int] = []
    items = iter(range(100))

    def taken() -> Iterator[int]:
        for item in items:
            begun.append(item)
            yield item

    with closing(ahead(lambda item: item, taken(), 2, 5)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(begun) == 3 + 5


def test_error_in_a_thread_reaches_the_caller_and_ends_the_threads() -> None:
    def failing(item: int) -> int:
        if item == 5:
            raise InputError("the sixth")
        return item

    with pytest.raises(InputError, match="the sixth"):
        list(ahead(failing, range(20), 2, 4))
    assert threads() == []


def test_threads_end_with_an_iterator_that_is_closed_early() -> None:
    results = ahead(lambda item: item, range(1000), 2, 10)
    next(results)
    assert len(threads()) == 2
    results.close()
    assert threads() == []
