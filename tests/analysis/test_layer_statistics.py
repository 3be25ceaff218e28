from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from hintsearch.analysis.layer_statistics import (
    LayerStatistics,
    LayerSums,
    Matrix,
    OrderedMerge,
    merge,
    merge_statistics,
    resampled,
    sums_of_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from made_layers import parts, rows_of
from numpy.typing import NDArray

CHANNELS, CLASSES = (3, 2), 2
COLUMNS = sum(CHANNELS) + len(CHANNELS) + CLASSES

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)
# Raw sums of squares around 1e4 keep but half of their digits.
OFFSETS = st.sampled_from([0.0, -3.0, 1e4])


def chunks_of(sizes: Sequence[int], offset: float, seed: int) -> tuple[Matrix, list[LayerSums]]:
    rows = offset + np.random.default_rng(seed).standard_normal((sum(sizes), COLUMNS))
    return rows, [sums_of_rows(part, CHANNELS, CLASSES) for part in parts(rows, sizes)]


def statistics_of(rows: Matrix, seed: int = 0) -> LayerStatistics:
    """The sums of the rows; all that adds up beside them is whole numbers, so that the order makes no difference."""
    rng = np.random.default_rng([seed, len(rows)])
    return LayerStatistics(
        sums_of_rows(rows, CHANNELS, CLASSES),
        rng.integers(99, size=2).astype(float),
        rng.integers(2, size=5).astype(bool),
        rng.integers(99, size=2).astype(float),
        rng.integers(99, size=(2, 2)).astype(float),
        1,
    )


def ordered(statistics: Sequence[LayerStatistics], arrival: Sequence[int]) -> LayerStatistics:
    merged = OrderedMerge()
    for position in arrival:
        merged.add(position, statistics[position])
    return merged.total()


def two_pass(rows: Matrix) -> tuple[NDArray[np.longdouble], NDArray[np.longdouble]]:
    """Mean and centred moment in extended precision."""
    exact = rows.astype(np.longdouble)
    mean = exact.mean(axis=0)
    return mean, np.einsum("ni,nj->ij", exact - mean, exact - mean)


def assert_same(ours: LayerSums, count: int, mean: NDArray[np.floating], moment: NDArray[np.floating]) -> None:
    assert ours.count == count
    np.testing.assert_allclose(ours.mean, mean.astype(float), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.moment, moment.astype(float), rtol=1e-9, atol=1e-9)


def assert_same_bits(ours: LayerStatistics, others: LayerStatistics) -> None:
    np.testing.assert_array_equal(ours.sums.mean, others.sums.mean)
    np.testing.assert_array_equal(ours.sums.moment, others.sums.moment)
    assert_same_extras(ours, others)


def assert_same_extras(ours: LayerStatistics, others: LayerStatistics) -> None:
    """All but the sums of the rows."""
    assert ours.sums.count == others.sums.count
    np.testing.assert_array_equal(ours.norms, others.norms)
    np.testing.assert_array_equal(ours.fired, others.fired)
    np.testing.assert_array_equal(ours.zeros, others.zeros)
    np.testing.assert_array_equal(ours.alignment, others.alignment)
    assert ours.minibatches == others.minibatches


def test_columns_are_the_layers_then_their_norms_then_the_labels() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    sums = sums_of_rows(rows_of([first, second], np.arange(9) % 2, 2), CHANNELS, 2)
    np.testing.assert_allclose(sums.mean[sums.layer(0)], first.mean(axis=0))
    np.testing.assert_allclose(sums.mean[sums.layer(1)], second.mean(axis=0))
    np.testing.assert_allclose(sums.mean[sums.norms], [np.square(first).sum() / 9, np.square(second).sum() / 9])
    np.testing.assert_allclose(sums.mean[sums.labels], [5 / 9, 4 / 9])
    crossed = (first - first.mean(axis=0)).T @ (second - second.mean(axis=0))
    np.testing.assert_allclose(sums.cross(0, 1), crossed, atol=1e-12)


def test_a_tensor_of_rows_has_the_sums_of_the_array() -> None:
    rows = 1e4 + np.random.default_rng(0).standard_normal((20, COLUMNS))
    array, tensor = (sums_of_rows(given, CHANNELS, CLASSES) for given in (rows, torch.from_numpy(rows)))
    assert isinstance(tensor.moment, np.ndarray)
    assert_same(tensor, array.count, array.mean, array.moment)


def test_summing_leaves_the_rows_as_they_were() -> None:
    rows = np.random.default_rng(0).standard_normal((20, COLUMNS))
    before = rows.copy()
    sums_of_rows(torch.from_numpy(rows), CHANNELS, CLASSES)
    np.testing.assert_array_equal(rows, before)


def test_merging_leaves_both_as_they_were() -> None:
    _, (first, second) = chunks_of([5, 4], 3.0, 0)
    before = first.moment.copy(), second.moment.copy()
    merge(first, second)
    np.testing.assert_array_equal(first.moment, before[0])
    np.testing.assert_array_equal(second.moment, before[1])


@given(SIZES, OFFSETS, SEEDS)
@settings(deadline=None)
def test_merged_chunks_equal_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    rows, chunks = chunks_of(sizes, offset, seed)
    assert_same(reduce(merge, chunks), len(rows), *two_pass(rows))


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), OFFSETS, SEEDS)
@settings(deadline=None)
def test_merging_is_associative(sizes: list[int], offset: float, seed: int) -> None:
    _, (first, second, third) = chunks_of(sizes, offset, seed)
    left, right = merge(merge(first, second), third), merge(first, merge(second, third))
    assert_same(left, right.count, right.mean, right.moment)


@pytest.mark.parametrize("actors", [1, 2, 5])
@given(SIZES, OFFSETS, SEEDS)
@settings(deadline=None, max_examples=30)
def test_chunks_merged_by_actors_in_any_order_equal_the_ordered_merge(
    actors: int, sizes: list[int], offset: float, seed: int
) -> None:
    rows, _ = chunks_of(sizes, offset, seed)
    statistics = [statistics_of(part) for part in parts(rows, sizes)]
    arrival = np.random.default_rng(seed).permutation(len(sizes))
    by_actor = [arrival[actor::actors] for actor in range(min(actors, len(sizes)))]
    totals = [reduce(merge_statistics, [statistics[position] for position in share]) for share in by_actor]
    merged, expected = reduce(merge_statistics, totals), ordered(statistics, range(len(sizes)))
    assert_same(merged.sums, len(rows), expected.sums.mean, expected.sums.moment)
    assert_same_extras(merged, expected)


@given(st.permutations(range(11)), SEEDS)
@settings(deadline=None)
def test_ordered_merge_gives_the_same_bits_in_any_order_of_arrival(arrival: list[int], seed: int) -> None:
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    rows, _ = chunks_of(sizes, 0.1, seed)
    statistics = [statistics_of(part, seed) for part in parts(rows, sizes)]
    assert_same_bits(ordered(statistics, arrival), ordered(statistics, range(11)))


@given(SIZES, OFFSETS, SEEDS)
@settings(deadline=None)
def test_every_group_taken_once_is_the_ordered_merge(sizes: list[int], offset: float, seed: int) -> None:
    rows, _ = chunks_of(sizes, offset, seed)
    statistics = [statistics_of(part) for part in parts(rows, sizes)]
    once, merged = resampled(statistics, [1] * len(sizes)), ordered(statistics, range(len(sizes)))
    assert_same(once.sums, len(rows), merged.sums.mean, merged.sums.moment)
    assert_same_extras(once, merged)


@given(st.data(), SIZES, OFFSETS, SEEDS)
@settings(deadline=None)
def test_groups_taken_several_times_equal_their_rows_repeated(
    data: st.DataObject, sizes: list[int], offset: float, seed: int
) -> None:
    rows, _ = chunks_of(sizes, offset, seed)
    count = len(sizes)
    times = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(any))
    groups = [statistics_of(part) for part in parts(rows, sizes)]
    repeated = np.concatenate(
        [part for part, share in zip(parts(rows, sizes), times, strict=True) for _ in range(share)]
    )
    drawn = resampled(groups, times)
    assert_same(drawn.sums, len(repeated), *two_pass(repeated))


def test_groups_taken_several_times_count_as_often_in_all_that_adds_up() -> None:
    rows, _ = chunks_of([4, 3, 5], 0.0, 0)
    first, second, third = (statistics_of(part) for part in parts(rows, [4, 3, 5]))
    drawn = resampled([first, second, third], [2, 0, 1])
    assert_same_extras(drawn, reduce(merge_statistics, [first, first, third]))
    assert drawn.minibatches == 3


def test_resampling_leaves_the_groups_as_they_were() -> None:
    rows, _ = chunks_of([4, 3], 0.0, 0)
    groups = [statistics_of(part) for part in parts(rows, [4, 3])]
    before = [group.sums.moment.copy() for group in groups]
    resampled(groups, [2, 1])
    for group, moment in zip(groups, before, strict=True):
        np.testing.assert_array_equal(group.sums.moment, moment)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_million_images_lose_nothing(offset: float) -> None:
    # Whole numbers of eighths around the offset: their sums are exact as integers. Raw sums of squares in float64 are
    # off by 7e-4 of the moment at an offset of 1e6.
    images, chunk = 1_000_000, 2000
    eighths = np.random.default_rng(0).integers(-40, 40, (images, 4))
    merged = OrderedMerge()
    for position in range(images // chunk):
        rows = offset + eighths[position * chunk : (position + 1) * chunk] / 8
        nothing = np.zeros(1)
        merged.add(position, LayerStatistics(sums_of_rows(rows, (1,), 2), nothing, nothing.astype(bool)))
    sums = merged.total().sums
    totals = [int(total) for total in eighths.sum(axis=0)]
    products = eighths.T @ eighths
    exact = [
        [(int(products[i, j]) * images - totals[i] * totals[j]) / (64 * images) for j in range(4)] for i in range(4)
    ]
    assert sums.count == images
    np.testing.assert_allclose(sums.mean, [offset + total / (8 * images) for total in totals], rtol=1e-15)
    # Of independent columns the cross moments are small: the error is measured by the columns' own spread.
    assert np.abs(sums.moment - exact).max() < 1e-12 * np.diag(exact).min()


def test_one_outlying_chunk_loses_nothing_of_the_others() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.standard_normal((20, COLUMNS)), 1e4 + rng.standard_normal((1, COLUMNS))])
    merged = merge(sums_of_rows(rows[:20], CHANNELS, CLASSES), sums_of_rows(rows[20:], CHANNELS, CLASSES))
    _, moment = two_pass(rows)
    np.testing.assert_allclose(merged.moment, moment.astype(float), rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, -1e4 / 3, 1e-9])
def test_constant_column_has_no_spread_at_all(value: float) -> None:
    rows = np.random.default_rng(0).standard_normal((21, COLUMNS))
    rows[:, 1] = value
    statistics = [statistics_of(part) for part in parts(rows, [6, 7, 8])]
    for total in (ordered(statistics, range(3)), resampled(statistics, [3, 1, 2])):
        assert not total.sums.moment[1].any()
        assert total.sums.mean[1] == value


def test_merge_refuses_other_layers() -> None:
    rows = np.zeros((2, COLUMNS))
    with pytest.raises(ValueError, match="different layers"):
        merge(sums_of_rows(rows, (3, 2), CLASSES), sums_of_rows(rows, (2, 3), CLASSES))


def test_merge_refuses_other_classes() -> None:
    ours = sums_of_rows(np.zeros((2, COLUMNS)), CHANNELS, CLASSES)
    other = sums_of_rows(np.zeros((2, COLUMNS + 1)), CHANNELS, CLASSES + 1)
    with pytest.raises(ValueError, match="different layers"):
        merge(ours, other)


def test_resampling_refuses_groups_of_other_layers() -> None:
    rows = np.zeros((2, COLUMNS))
    ours = statistics_of(rows)
    with pytest.raises(ValueError, match="different layers"):
        resampled([ours, replace(ours, sums=sums_of_rows(rows, (2, 3), CLASSES))], [1, 1])


def test_what_one_chunk_did_not_count_is_not_counted_in_the_whole() -> None:
    rows = np.random.default_rng(0).standard_normal((4, COLUMNS))
    counted = statistics_of(rows)
    without = replace(counted, zeros=None, alignment=None, minibatches=0)
    for total in (merge_statistics(counted, without), resampled([counted, without], [1, 1])):
        assert total.zeros is None
        assert total.alignment is None


@pytest.mark.parametrize("given_positions", [[], [1], [0, 2], [0, 1, 3]])
def test_ordered_merge_names_the_first_missing_position(given_positions: list[int]) -> None:
    statistics = [statistics_of(np.zeros((2, COLUMNS)))] * 4
    missing = min(set(range(4)) - set(given_positions))
    with pytest.raises(ValueError, match=f"^statistics number {missing} is missing"):
        ordered(statistics, given_positions)
