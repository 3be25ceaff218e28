from collections import Counter

import numpy as np
import pytest
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.reading_plan import Chunk, Columns, plan_columns, plan_reading, sums_memory
from hintsearch.models.errors import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

IMAGES, CHUNKS = st.integers(1, 3000), st.integers(1, 500)
WIDTHS = st.lists(st.integers(1, 300), min_size=1, max_size=12)
# Pooled channels of its 16 blocks, 15,104 together.
RESNET50 = (256,) * 3 + (512,) * 4 + (1024,) * 6 + (2048,) * 3


@given(IMAGES, CHUNKS)
def test_chunks_cover_every_image_once_in_order(images: int, chunk: int) -> None:
    plan = plan_reading(images, chunk)
    assert [image for part in plan.chunks for image in range(part.start, part.stop)] == list(range(images))


@given(IMAGES, CHUNKS)
def test_chunks_are_neither_empty_nor_larger_than_asked_for(images: int, chunk: int) -> None:
    assert all(0 < part.stop - part.start <= chunk for part in plan_reading(images, chunk).chunks)


@given(IMAGES, CHUNKS)
def test_groups_follow_one_another(images: int, chunk: int) -> None:
    plan = plan_reading(images, chunk)
    groups = [part.group for part in plan.chunks]
    assert groups == sorted(groups)
    assert set(groups) == set(range(plan.groups))


@given(IMAGES, CHUNKS)
def test_groups_are_of_equal_size_but_for_one_image(images: int, chunk: int) -> None:
    sizes: Counter[int] = Counter()
    for part in plan_reading(images, chunk).chunks:
        sizes[part.group] += part.stop - part.start
    assert max(sizes.values()) - min(sizes.values()) <= 1


@given(IMAGES, CHUNKS)
def test_chunks_of_a_group_are_of_equal_size_but_for_one_image(images: int, chunk: int) -> None:
    plan = plan_reading(images, chunk)
    for group in range(plan.groups):
        sizes = [part.stop - part.start for part in plan.chunks if part.group == group]
        assert max(sizes) - min(sizes) <= 1


@given(IMAGES, CHUNKS)
def test_a_group_has_as_few_chunks_as_it_can(images: int, chunk: int) -> None:
    plan = plan_reading(images, chunk)
    for group in range(plan.groups):
        sizes = [part.stop - part.start for part in plan.chunks if part.group == group]
        assert (len(sizes) - 1) * chunk < sum(sizes)


@given(IMAGES, CHUNKS)
def test_anchors_are_the_first_images_of_each_group(images: int, chunk: int) -> None:
    plan = plan_reading(images, chunk)
    for group in range(plan.groups):
        parts = [part for part in plan.chunks if part.group == group]
        flags = [place < part.anchors for part in parts for place in range(part.stop - part.start)]
        assert flags == sorted(flags, reverse=True)
        assert flags[0]


@given(IMAGES, CHUNKS)
def test_anchors_are_256_together_or_all_images(images: int, chunk: int) -> None:
    plan = plan_reading(images, chunk)
    # Each group has equally many, rounded up.
    assert min(images, 256) <= sum(part.anchors for part in plan.chunks) < 256 + plan.groups


@pytest.mark.parametrize(("images", "groups"), [(1, 1), (3, 1), (7, 1), (8, 2), (63, 15), (64, 16), (50_000, 16)])
def test_images_are_cut_into_up_to_16_groups_of_at_least_four(images: int, groups: int) -> None:
    assert plan_reading(images, 256).groups == groups


@pytest.mark.parametrize(("images", "held_out"), [(7, []), (8, [1]), (60, [14]), (64, [14, 15]), (9999, [14, 15])])
def test_an_eighth_of_the_groups_is_held_out_the_last_ones(images: int, held_out: list[int]) -> None:
    plan = plan_reading(images, 256)
    assert [group for group in range(plan.groups) if plan.is_held_out(group)] == held_out
    assert plan.held_out == len(held_out)


def test_a_plan_by_hand() -> None:
    # Groups of 4 and 5; 2 chunks each.
    assert plan_reading(9, 3).chunks == (Chunk(0, 2, 0, 2), Chunk(2, 4, 0, 2), Chunk(4, 6, 1, 2), Chunk(6, 9, 1, 3))


@given(WIDTHS, st.integers(2, 20), st.integers(4, 600))
def test_all_channels_are_kept_if_they_just_fit(channels: list[int], classes: int, chunk: int) -> None:
    whole = Columns(tuple(channels), tuple(channels), classes, 0)
    limit = max(sums_memory(whole, chunk).__dict__.values())
    columns = plan_columns(channels, classes, chunk, limit, 0)
    assert columns == whole
    assert columns.projected == 0
    assert all(columns.projection(layer) is None for layer in range(len(channels)))


@given(WIDTHS, st.integers(2, 20), st.integers(4, 100), st.floats(2e6, 1e8))
@settings(deadline=None)
def test_the_widest_are_projected_to_the_widest_width_that_fits(
    channels: list[int], classes: int, chunk: int, limit: float
) -> None:
    columns = plan_columns(channels, classes, chunk, limit, 0)
    cap = max(columns.widths)
    assert columns.widths == tuple(min(count, cap) for count in channels)
    assert max(sums_memory(columns, chunk).__dict__.values()) <= limit
    for wider in range(cap + 1, max(channels) + 1):
        others = Columns(columns.channels, tuple(min(count, wider) for count in channels), classes, 0)
        assert max(sums_memory(others, chunk).__dict__.values()) > limit


def test_an_actor_that_needs_more_than_the_driver_sets_the_width() -> None:
    # The Grams and pooled features of a large chunk are on the actors only.
    columns = Columns((300, 300), (100, 100), 2, 0)
    memory = sums_memory(columns, 500)
    assert memory.actor > memory.driver
    assert plan_columns((300, 300), 2, 500, memory.actor, 0) == columns


def test_memory_holds_the_matrices_the_pooled_features_the_grams_and_the_projections() -> None:
    columns = Columns((30, 10), (20, 10), 5, 0)
    assert columns.total == 20 + 10 + 2 + 5
    assert columns.projected == 1
    memory = sums_memory(columns, 100)
    matrix = 37 * 37
    assert memory.actor == 8 * (3 * matrix + 100 * (40 + 2 * 37) + 4 * 100 * 100 + 30 * 20)
    # One a group and some more.
    assert 16 * 8 * matrix < memory.driver < 32 * 8 * matrix


def test_resnet50_on_imagenet_is_projected_into_4_gb() -> None:
    columns = plan_columns(RESNET50, 1000, 256, 4e9, 0)
    memory = sums_memory(columns, 256)
    assert sum(RESNET50) == 15_104
    assert set(columns.widths) == {221}
    assert columns.projected == 16
    assert max(memory.actor, memory.driver) <= 4e9
    whole = sums_memory(Columns(RESNET50, RESNET50, 1000, 0), 256)
    assert min(whole.actor, whole.driver) > 4e9


def test_too_little_memory_for_one_column_a_candidate_says_how_much_it_takes() -> None:
    with pytest.raises(InputError) as caught:
        plan_columns((64, 128), 1000, 256, 1e8, 0)
    # 24 · 1004² · 8 bytes: the driver's matrices of 2 features, 2 norms and 1000 labels.
    assert str(caught.value) == (
        "layers.memory_gb is 0.1, but the sums of 2 candidates and 1000 classes take at least 0.194; "
        "raise it, or name fewer layers.candidates"
    )


def projection_of(seed: int, layer: int = 0, channels: int = 40, width: int = 10) -> Matrix:
    projection = Columns((channels,) * 2, (width,) * 2, 2, seed).projection(layer)
    assert projection is not None
    return projection


def test_a_projection_leads_from_the_channels_to_the_width() -> None:
    assert projection_of(0).shape == (40, 10)


def test_a_projection_is_fixed_by_its_seed() -> None:
    np.testing.assert_array_equal(projection_of(3), projection_of(3))


def test_projections_of_other_seeds_and_layers_differ() -> None:
    assert not np.isclose(projection_of(3), projection_of(4)).any()
    assert not np.isclose(projection_of(3, 0), projection_of(3, 1)).any()


def test_a_projection_keeps_squared_lengths_on_average() -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 2000))
    projected = vectors @ projection_of(0, channels=2000, width=500)
    ratios = np.square(projected).sum(axis=1) / np.square(vectors).sum(axis=1)
    # χ² with 500 degrees of freedom, over 500.
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.std(ratios) == pytest.approx(np.sqrt(2 / 500), rel=0.25)
