import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hintsearch.distill import batches
from hintsearch.distill.batches import Augmentation, Batch, DeviceImages, augment, batch_bounds
from hintsearch.distill.data import ImageSet
from hintsearch.models.preprocessing import Preprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision import transforms

TWO_CHANNELS = Preprocessing((0.25, 0.5), (0.5, 2.0))
PLAIN = Augmentation(crop_padding=0, flip=False)
# Upper 0.1 % points of χ² by degrees of freedom.
CHI_SQUARE = {1: 10.83, 8: 26.12, 17: 40.79, 24: 51.18}


@pytest.fixture
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(0, 256, (23, 2, 5, 4)).astype(np.uint8), rng.integers(0, 3, 23))


@pytest.fixture
def data(images: ImageSet) -> DeviceImages:
    return on_cpu(images)


def on_cpu(images: ImageSet, teacher: Preprocessing | None = None) -> DeviceImages:
    return DeviceImages(images, TWO_CHANNELS, torch.device("cpu"), teacher)


def indices(batches: Any) -> list[int]:
    return [index for batch in batches for index in batch.indices.tolist()]


def assert_same_batches(one: list[Batch], other: list[Batch]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.teacher_images, theirs.teacher_images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.indices, theirs.indices)


def normalised(images: ImageSet, chosen: list[int]) -> Tensor:
    scaled = images.images[chosen].astype(np.float64) / 255
    mean, sd = np.array([0.25, 0.5]), np.array([0.5, 2.0])
    return torch.from_numpy((scaled - mean[:, None, None]) / sd[:, None, None]).float()


def variants(size: int, padding: int) -> tuple[NDArray[np.uint8], dict[bytes, tuple[int, int, bool]]]:
    """An image of distinct pixels, and what every crop offset and flip makes of it."""
    image = np.arange(1, size * size + 1, dtype=np.uint8).reshape(size, size)
    padded = np.pad(image, padding)
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + size, left : left + size]
            found[crop.tobytes()] = (top, left, False)
            found[crop[:, ::-1].tobytes()] = (top, left, True)
    assert len(found) == 2 * (2 * padding + 1) ** 2
    return image, found


def outcomes(size: int, augmentation: Augmentation, padding: int, count: int) -> Counter[tuple[int, int, bool]]:
    """How often each offset and flip came out; an image that is none of them is a KeyError."""
    image, found = variants(size, padding)
    stack = torch.from_numpy(np.broadcast_to(image, (count, 1, size, size)).copy())
    made = augment(stack, augmentation, torch.Generator().manual_seed(5)).numpy()
    return Counter(found[one.tobytes()] for one in made)


def chi_square(counts: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in counts)


def test_epoch_shows_every_image_once(data: DeviceImages) -> None:
    assert sorted(indices(data.epoch(1, 4, 0, Augmentation()))) == list(range(23))


def test_epoch_is_the_same_for_the_same_seed_and_number(images: ImageSet) -> None:
    one, other = (list(on_cpu(images).epoch(3, 4, 7, Augmentation())) for _ in range(2))
    assert_same_batches(one, other)


def test_epoch_can_be_made_again_without_those_before_it(images: ImageSet) -> None:
    undisturbed = on_cpu(images)
    for epoch in (1, 2):
        list(undisturbed.epoch(epoch, 4, 7, Augmentation()))
    third, alone = (list(data.epoch(3, 4, 7, Augmentation())) for data in (undisturbed, on_cpu(images)))
    assert_same_batches(third, alone)


@pytest.mark.parametrize(("epoch", "data_seed"), [(4, 7), (3, 8), (7, 3)])
def test_epoch_differs_for_another_seed_or_number(data: DeviceImages, epoch: int, data_seed: int) -> None:
    assert indices(data.epoch(epoch, 4, data_seed, PLAIN)) != indices(data.epoch(3, 4, 7, PLAIN))


def test_order_of_an_epoch_does_not_depend_on_the_batch_size(data: DeviceImages) -> None:
    assert indices(data.epoch(1, 4, 0, PLAIN)) == indices(data.epoch(1, 9, 0, PLAIN))


def test_epoch_does_not_depend_on_the_global_generators(images: ImageSet) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = list(on_cpu(images).epoch(1, 4, 0, Augmentation()))
        torch.manual_seed(2)
        other = list(on_cpu(images).epoch(1, 4, 0, Augmentation()))
    assert_same_batches(one, other)


def test_epoch_leaves_the_global_generator_as_it_was(data: DeviceImages) -> None:
    before = torch.get_rng_state()
    list(data.epoch(1, 4, 0, Augmentation()))
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_and_images_of_a_batch_belong_together(images: ImageSet, data: DeviceImages) -> None:
    for batch in data.epoch(1, 4, 0, PLAIN):
        chosen = batch.indices.tolist()
        assert batch.labels.tolist() == images.labels[chosen].tolist()
        torch.testing.assert_close(batch.images, normalised(images, chosen))


def test_augmentation_moves_no_image_to_another_place(images: ImageSet) -> None:
    brightness = np.arange(1, 24, dtype=np.uint8)
    flat = ImageSet(np.broadcast_to(brightness[:, None, None, None], (23, 2, 5, 4)).copy(), images.labels)
    data = DeviceImages(flat, Preprocessing((0.0, 0.0), (1.0, 1.0)), torch.device("cpu"))
    for batch in data.epoch(1, 4, 0, Augmentation(crop_padding=2)):
        torch.testing.assert_close(batch.images.amax((1, 2, 3)) * 255, (batch.indices + 1).float())


def test_in_order_shows_all_images_normalised_in_their_order(images: ImageSet, data: DeviceImages) -> None:
    batches = list(data.in_order(4))
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), normalised(images, list(range(23))))
    assert torch.cat([batch.labels for batch in batches]).tolist() == images.labels.tolist()


def test_last_single_image_is_joined_to_the_batch_before(data: DeviceImages) -> None:
    assert [len(batch.labels) for batch in data.epoch(1, 11, 0, PLAIN)] == [11, 12]


@pytest.mark.parametrize("batch_size", [4, 11, 22, 23, 64])
def test_batch_count_is_the_number_of_batches_of_an_epoch(data: DeviceImages, batch_size: int) -> None:
    assert data.batch_count(batch_size) == len(list(data.epoch(1, batch_size, 0, PLAIN)))


def test_fixed_batches_are_the_same_for_the_same_seed(images: ImageSet) -> None:
    assert_same_batches(on_cpu(images).fixed_batches(3, 4, 9), on_cpu(images).fixed_batches(3, 4, 9))


def test_fixed_batches_differ_for_another_seed(data: DeviceImages) -> None:
    assert indices(data.fixed_batches(3, 4, 9)) != indices(data.fixed_batches(3, 4, 10))


def test_fixed_batches_are_unaugmented(images: ImageSet, data: DeviceImages) -> None:
    for batch in data.fixed_batches(3, 4, 9):
        torch.testing.assert_close(batch.images, normalised(images, batch.indices.tolist()))


@pytest.mark.parametrize(("count", "sizes"), [(3, [4, 4, 4]), (6, [4, 4, 4, 4, 4, 3]), (99, [4, 4, 4, 4, 4, 3])])
def test_fixed_batches_are_fewer_if_the_images_run_out(data: DeviceImages, count: int, sizes: list[int]) -> None:
    batches = data.fixed_batches(count, 4, 9)
    assert [len(batch.labels) for batch in batches] == sizes
    assert len(set(indices(batches))) == sum(sizes)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(min_crop_area=0.3)])
def test_batches_do_not_depend_on_how_many_are_made_together(
    images: ImageSet, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = list(on_cpu(images).epoch(1, 4, 0, augmentation))
    monkeypatch.setattr(batches, "CPU_BLOCK", 1)
    assert_same_batches(list(on_cpu(images).epoch(1, 4, 0, augmentation)), together)


def test_augmentation_of_an_image_does_not_depend_on_the_batch_size(images: ImageSet) -> None:
    made = []
    for batch_size in (4, 9):
        epoch = list(on_cpu(images).epoch(1, batch_size, 0, Augmentation()))
        order = torch.cat([batch.indices for batch in epoch])
        made.append(torch.cat([batch.images for batch in epoch])[order.argsort()])
    assert torch.equal(*made)


@pytest.mark.parametrize("teacher", [None, TWO_CHANNELS])
def test_teacher_that_takes_the_same_gets_the_very_tensor(images: ImageSet, teacher: Preprocessing | None) -> None:
    data = on_cpu(images, teacher)
    for batch in [*data.epoch(1, 4, 0, Augmentation()), *data.in_order(4), *data.fixed_batches(2, 4, 0)]:
        assert batch.teacher_images is batch.images


def test_teacher_gets_the_same_images_in_its_own_size_and_normalisation(images: ImageSet) -> None:
    teacher = Preprocessing((0.5, 0.5), (0.1, 0.2), size=(10, 8), interpolation="nearest")
    for batch in on_cpu(images, teacher).epoch(1, 4, 0, Augmentation()):
        pixels = batch.images * torch.tensor([0.5, 2.0]).view(2, 1, 1) + torch.tensor([0.25, 0.5]).view(2, 1, 1)
        expected = (pixels - 0.5) / torch.tensor([0.1, 0.2]).view(2, 1, 1)
        torch.testing.assert_close(batch.teacher_images, expected.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_batches_are_channels_last(images: ImageSet) -> None:
    data = on_cpu(images, Preprocessing((0.5, 0.5), (0.1, 0.2), size=(10, 8)))
    for batch in [*data.epoch(1, 4, 0, Augmentation()), *data.in_order(4)]:
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.teacher_images.is_contiguous(memory_format=torch.channels_last)


def test_read_only_images_give_no_warning(images: ImageSet) -> None:
    images.images.flags.writeable = False
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as given_out:
        warnings.simplefilter("always")
        on_cpu(images)
    torch.set_warn_always(False)
    assert given_out == []


@given(count=st.integers(1, 300), batch_size=st.integers(1, 80))
@settings(deadline=None)
def test_batches_cover_all_images_without_a_gap(count: int, batch_size: int) -> None:
    bounds = batch_bounds(count, batch_size)
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(count))


@given(count=st.integers(2, 300), batch_size=st.integers(2, 80))
@settings(deadline=None)
def test_no_batch_is_of_one_image(count: int, batch_size: int) -> None:
    assert all(stop - start >= 2 for start, stop in batch_bounds(count, batch_size))


@given(count=st.integers(2, 300), batch_size=st.integers(1, 80))
@settings(deadline=None)
def test_only_the_last_batch_has_another_size(count: int, batch_size: int) -> None:
    sizes = [stop - start for start, stop in batch_bounds(count, batch_size)]
    assert set(sizes[:-1]) <= {batch_size}
    assert sizes[-1] <= batch_size + 1


def test_a_single_image_is_a_batch() -> None:
    assert batch_bounds(1, 64) == [(0, 1)]


def test_no_augmentation_changes_nothing() -> None:
    images = torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8)
    assert torch.equal(augment(images, PLAIN, torch.Generator()), images)


def test_flip_alone_mirrors_or_keeps() -> None:
    assert set(outcomes(3, Augmentation(crop_padding=0), padding=0, count=200)) == {(0, 0, False), (0, 0, True)}


def test_half_of_the_images_are_flipped() -> None:
    found = outcomes(3, Augmentation(crop_padding=0), padding=0, count=10_000)
    assert chi_square([found[0, 0, False], found[0, 0, True]], 5_000) < CHI_SQUARE[1]


def test_crop_offsets_are_uniform_over_all_positions_with_zero_padding() -> None:
    found = outcomes(5, Augmentation(crop_padding=2, flip=False), padding=2, count=25_000)
    counts = [found[top, left, False] for top in range(5) for left in range(5)]
    assert sum(counts) == 25_000
    assert chi_square(counts, 1_000) < CHI_SQUARE[24]


def test_crop_and_flip_are_independent() -> None:
    found = outcomes(3, Augmentation(crop_padding=1), padding=1, count=18_000)
    counts = [found[top, left, flip] for top in range(3) for left in range(3) for flip in (False, True)]
    assert chi_square(counts, 1_000) < CHI_SQUARE[17]


def test_neighbouring_images_are_cropped_independently() -> None:
    image, found = variants(3, 1)
    stack = torch.from_numpy(np.broadcast_to(image, (18_000, 1, 3, 3)).copy())
    made = augment(stack, Augmentation(crop_padding=1, flip=False), torch.Generator().manual_seed(5)).numpy()
    offsets = [found[one.tobytes()][:2] for one in made]
    steps = Counter(((a[0] - b[0]) % 3, (a[1] - b[1]) % 3) for a, b in zip(offsets[::2], offsets[1::2], strict=True))
    assert chi_square([steps[row, column] for row in range(3) for column in range(3)], 1_000) < CHI_SQUARE[8]


def test_all_channels_of_an_image_are_cropped_alike() -> None:
    grey = torch.randint(0, 256, (50, 1, 6, 6), dtype=torch.uint8)
    made = augment(grey.expand(50, 3, 6, 6).contiguous(), Augmentation(2), torch.Generator().manual_seed(0))
    assert torch.equal(made[:, :1].expand(50, 3, 6, 6), made)


def test_augmentation_is_that_of_torchvision_in_distribution() -> None:
    count = 3_600
    ours = outcomes(3, Augmentation(crop_padding=1), padding=1, count=count)
    image, found = variants(3, 1)
    theirs: Counter[tuple[int, int, bool]] = Counter()
    reference = transforms.Compose([transforms.RandomCrop(3, padding=1), transforms.RandomHorizontalFlip()])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(count):
            theirs[found[reference(torch.from_numpy(image)[None]).numpy().tobytes()]] += 1
    assert len(theirs) == 18
    # The two-sample statistic: both are draws, so the difference has twice the variance of one.
    assert sum((ours[key] - theirs[key]) ** 2 / (ours[key] + theirs[key]) for key in theirs) < CHI_SQUARE[17]
