import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill.batches import Augmentation, Batch, Batches, DeviceImages
from hintsearch.distill.image_folders import read_image_folder
from hintsearch.distill.image_sources import ImageFiles
from hintsearch.distill.lazy_images import Decoding, LazyImages, UnreadableImages
from hintsearch.distill.opening import open_batches
from hintsearch.distill.splits import ImageSet
from hintsearch.distill.streaming import StreamedImages
from hintsearch.models.errors import InputError
from hintsearch.models.preprocessing import Preprocessing
from image_files import truncate, write_class_folders

CPU = torch.device("cpu")
STUDENT = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
TEACHER = Preprocessing((0.1, 0.1, 0.1), (0.9, 0.9, 0.9), size=(12, 12))
PADDED = Augmentation(crop_padding=2)
RESIZED = Augmentation(min_crop_area=0.2)
PLAIN = Augmentation(crop_padding=0, flip=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of several sizes in each of three classes."""
    folder = tmp_path_factory.mktemp("pictures")
    write_class_folders(folder, count=9)
    return folder


def split_of(folder: Path, unreadable: int = 0) -> LazyImages:
    source = read_image_folder(folder).train
    assert isinstance(source, ImageFiles)
    return LazyImages(source, Decoding((8, 8), 0.875), UnreadableImages(unreadable))


def streamed(folder: Path, workers: int = 2, unreadable: int = 0) -> StreamedImages:
    return StreamedImages(split_of(folder, unreadable), STUDENT, CPU, TEACHER, workers)


def resident(folder: Path) -> DeviceImages:
    return DeviceImages(split_of(folder).decoded(workers=1), STUDENT, CPU, TEACHER)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for part in ("images", "labels", "indices", "teacher_images"):
            assert torch.equal(getattr(one, part), getattr(other, part))


def by_index(batches: list[Batch]) -> torch.Tensor:
    order = torch.cat([batch.indices for batch in batches])
    return torch.cat([batch.images for batch in batches])[order.argsort()]


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hintsearch-decoding")]


@pytest.mark.parametrize("augmentation", [PLAIN, PADDED])
@pytest.mark.parametrize("batch_size", [4, 13])
def test_epoch_is_the_very_one_of_resident_images(folder: Path, augmentation: Augmentation, batch_size: int) -> None:
    ours, theirs = (list(data.epoch(3, batch_size, 7, augmentation)) for data in (streamed(folder), resident(folder)))
    assert_same(ours, theirs)


def test_images_in_order_and_fixed_ones_are_those_of_resident_images(folder: Path) -> None:
    ours, theirs = streamed(folder), resident(folder)
    assert_same(list(ours.in_order(4)), list(theirs.in_order(4)))
    assert_same(ours.fixed_batches(2, 5, 9), theirs.fixed_batches(2, 5, 9))


@pytest.mark.parametrize("augmentation", [PADDED, RESIZED])
def test_number_of_workers_changes_nothing(folder: Path, augmentation: Augmentation) -> None:
    one, five = (list(streamed(folder, workers).epoch(2, 4, 0, augmentation)) for workers in (1, 5))
    assert_same(one, five)


def test_random_resized_crops_do_not_depend_on_what_was_read_before(folder: Path) -> None:
    undisturbed = streamed(folder)
    list(undisturbed.epoch(1, 4, 0, RESIZED))
    # With another batch size, so that every image is in another batch.
    second, alone = list(undisturbed.epoch(2, 4, 0, RESIZED)), list(streamed(folder).epoch(2, 9, 0, RESIZED))
    assert torch.equal(by_index(second), by_index(alone))


@pytest.mark.parametrize(("epoch", "data_seed"), [(2, 0), (1, 1)])
def test_random_resized_crops_differ_for_another_seed_or_epoch(folder: Path, epoch: int, data_seed: int) -> None:
    first = by_index(list(streamed(folder).epoch(1, 4, 0, RESIZED)))
    other = by_index(list(streamed(folder).epoch(epoch, 4, data_seed, RESIZED)))
    assert all(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_random_resized_crop_of_everything_is_the_whole_image_resized(tmp_path: Path) -> None:
    """Square images, of which a crop of the whole area keeps all; the view would cut the margin off."""
    from image_files import write_image

    for number in range(6):
        write_image(tmp_path / "a" / f"{number}.png", number, size=(16, 16))
    split = split_of(tmp_path)
    whole = LazyImages(split.source, Decoding((8, 8), 1.0)).read(np.arange(6))
    data = StreamedImages(split, Preprocessing((0.0,) * 3, (1.0,) * 3), CPU)
    # Only an aspect ratio of 1 fits; ten draws of it seldom come, so it is the fallback: the middle, here all.
    found = by_index(list(data.epoch(1, 3, 0, Augmentation(flip=False, min_crop_area=1.0))))
    assert np.array_equal((found * 255).round().to(torch.uint8).numpy(), whole)


def test_global_generators_are_left_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    list(streamed(folder).epoch(1, 4, 0, RESIZED))
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_that_takes_the_same_gets_the_very_tensor(folder: Path) -> None:
    data = StreamedImages(split_of(folder), STUDENT, CPU)
    for batch in data.epoch(1, 4, 0, RESIZED):
        assert batch.teacher_images is batch.images
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_batch_count_and_length_are_those_of_the_split(folder: Path) -> None:
    data = streamed(folder)
    assert (len(data), data.device, data.batch_count(13)) == (27, CPU, len(list(data.epoch(1, 13, 0, PLAIN))))


def test_lazy_split_is_opened_as_a_stream_and_one_in_memory_as_resident(folder: Path) -> None:
    split = split_of(folder)
    opened: list[Batches] = [open_batches(data, STUDENT, CPU, TEACHER) for data in (split, split.decoded(1))]
    assert [type(data) for data in opened] == [StreamedImages, DeviceImages]
    assert_same(list(opened[0].in_order(9)), list(opened[1].in_order(9)))


def test_unreadable_images_are_left_out_of_their_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_class_folders(tmp_path, count=4)
    untouched = list(streamed(tmp_path).epoch(1, 4, 0, PADDED))
    for place in ("a/001.png", "c/003.png"):
        truncate(tmp_path / place, 0.1)
    data = streamed(tmp_path, unreadable=2)
    batches = [list(data.epoch(number, 4, 0, PADDED)) for number in (1, 1)][-1]
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == [0, *range(2, 11)]
    kept = [index for index in range(12) if index not in (1, 11)]
    assert torch.equal(by_index(batches), by_index(untouched)[kept])
    assert sum("cannot be read" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("augmentation", [PADDED, RESIZED])
def test_more_unreadable_images_than_tolerated_stop_the_epoch(tmp_path: Path, augmentation: Augmentation) -> None:
    write_class_folders(tmp_path, count=4)
    for place in ("a/001.png", "c/003.png"):
        truncate(tmp_path / place, 0.1)
    with pytest.raises(InputError, match=r"^2 images cannot be read \(.*\), but data.unreadable tolerates 1; "):
        list(streamed(tmp_path, unreadable=1).epoch(1, 4, 0, augmentation))
    assert decoding_threads() == []


def test_training_batch_of_which_one_image_is_left_is_left_out(tmp_path: Path) -> None:
    write_class_folders(tmp_path, "a", count=4)
    truncate(tmp_path / "a" / "001.png", 0.1)
    data = streamed(tmp_path, unreadable=1)
    sizes = sorted(len(batch.indices) for batch in data.epoch(1, 2, 0, PLAIN))
    assert sizes == [2]
    assert sorted(len(batch.indices) for batch in data.in_order(2)) == [1, 2]


def test_threads_live_no_longer_than_the_epoch(folder: Path) -> None:
    data = streamed(folder)
    epoch = data.epoch(1, 4, 0, PADDED)
    next(epoch)
    assert len(decoding_threads()) == 2
    list(epoch)
    assert decoding_threads() == []


@pytest.mark.parametrize("end", ["close", "drop", "loader"])
def test_abandoned_epoch_leaves_no_thread(folder: Path, end: str) -> None:
    data = streamed(folder)
    epoch: Any = data.epoch(1, 4, 0, RESIZED)
    next(epoch)
    if end == "close":
        epoch.close()
    elif end == "loader":
        data.close()
    else:
        del epoch
    assert decoding_threads() == []


STREAMING = """
import signal, sys, time, torch
# A shell's background processes start with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from hintsearch.distill.batches import Augmentation
from hintsearch.distill.image_folders import read_image_folder
from hintsearch.distill.lazy_images import Decoding, LazyImages
from hintsearch.distill.streaming import StreamedImages
from hintsearch.models.preprocessing import Preprocessing

split = LazyImages(read_image_folder(Path(sys.argv[1])).train, Decoding((8, 8)), workers=4)
data = StreamedImages(split, Preprocessing((0.5,) * 3, (0.5,) * 3), torch.device("cpu"))
for batch in data.epoch(1, 4, 0, Augmentation()):
    print("batch", flush=True)
    time.sleep(1)
"""


def test_interrupted_process_ends_at_once_and_has_no_children(folder: Path) -> None:
    """Without children, a process that is killed leaves none."""
    command = [sys.executable, "-c", STREAMING, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "batch\n"
            tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
            children = [text for task in tasks if (text := (task / "children").read_text())]
            names = [(task / "comm").read_text() for task in tasks]
            process.send_signal(signal.SIGINT)
            process.wait(timeout=10)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert len(names) >= 1 + 4
    assert children == []


def test_protocol_is_satisfied_by_splits_of_another_kind(folder: Path) -> None:
    """Whatever is a `Split` can be opened: it is read into memory."""

    class Wrapped:
        def __init__(self, inner: ImageSet) -> None:
            self.labels, self.image_shape = inner.labels, inner.image_shape
            self.read, self.subset, self.fingerprint = inner.read, inner.subset, inner.fingerprint
            self._inner = inner

        def __len__(self) -> int:
            return len(self._inner)

    data = split_of(folder).decoded(1)
    assert_same(
        list(open_batches(Wrapped(data), STUDENT, CPU).in_order(9)),
        list(open_batches(data, STUDENT, CPU).in_order(9)),
    )
