from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hintsearch.analysis.hint_selection import CONTROL_SELECTORS
from hintsearch.analysis.layer_statistics import Matrix
from hintsearch.analysis.pairing import (
    PAIRINGS,
    pair_by_depth,
    pair_by_similarity,
    pair_by_size,
    pair_hints,
    pair_reversed,
    used_pairing,
)
from hintsearch.models.candidates import Candidate
from hintsearch.models.errors import InputError
from hintsearch.models.registry import Entry
from hypothesis import given, settings
from hypothesis import strategies as st

MadeUp = Callable[..., tuple[Candidate, ...]]

BLOCKS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Blocks a stage of a teacher, 0-based hint points of it, blocks a stage of a student."""
    teacher = draw(BLOCKS)
    points = draw(st.sets(st.integers(0, sum(teacher) - 1), min_size=1))
    return teacher, sorted(points), draw(BLOCKS)


def paired(pairs: tuple[tuple[Candidate, Candidate], ...]) -> list[tuple[int, int]]:
    return [(point.index, layer.index) for point, layer in pairs]


def similar(teacher_depth: int, student_depth: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).random((teacher_depth, student_depth))


def of_sizes(*sizes: int | tuple[int, int]) -> tuple[Candidate, ...]:
    """Candidates with maps of such (height, width); square of a single number."""
    shapes = [size if isinstance(size, tuple) else (size, size) for size in sizes]
    return tuple(Candidate(f"layer{i}", i, 8, *shape, 0) for i, shape in enumerate(shapes, start=1))


SIZES = st.lists(st.sampled_from([1, 2, 4, 7, 8, 14, 16, (4, 8), (8, 4)]), min_size=1, max_size=7)


# What every pairing keeps

every_pairing = pytest.mark.parametrize("pairing", PAIRINGS.names())


@every_pairing
@given(teacher=SIZES, student=SIZES, data=st.data())
@settings(deadline=None, max_examples=60)
def test_every_hint_point_is_in_one_pair_in_order(
    pairing: str, teacher: list[int], student: list[int], data: st.DataObject
) -> None:
    layers = of_sizes(*teacher)
    points = [layers[i] for i in sorted(data.draw(st.sets(st.integers(0, len(layers) - 1), min_size=1)))]
    pairs = pair_hints("kmedoids", points, len(layers), of_sizes(*student), pairing, similar(len(layers), len(student)))
    assert [point for point, _ in pairs] == points


@every_pairing
@given(teacher=SIZES, student=SIZES, seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=100)
def test_student_layers_never_run_backwards(
    pairing: str, teacher: list[int], student: list[int], seed: int, data: st.DataObject
) -> None:
    layers = of_sizes(*teacher)
    points = [layers[i] for i in sorted(data.draw(st.sets(st.integers(0, len(layers) - 1), min_size=1)))]
    similarity = similar(len(layers), len(student), seed)
    pairs = pair_hints("kmedoids", points, len(layers), of_sizes(*student), pairing, similarity)
    indices = [layer.index for _, layer in pairs]
    assert indices == sorted(indices)


def test_three_pairings_are_registered() -> None:
    assert PAIRINGS.names() == ("by_depth", "by_size", "by_similarity")


@pytest.mark.parametrize("entry", list(PAIRINGS), ids=lambda entry: entry.name)
def test_pairing_declares_its_kind_its_needs_and_its_source(entry: Entry[object]) -> None:
    assert entry.facts["kind"] == "pairing"
    assert entry.facts["needs"]
    assert entry.source


def test_unknown_pairing_names_the_nearest(resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...]) -> None:
    with pytest.raises(InputError) as caught:
        pair_hints("kmedoids", resnet20[:1], 9, resnet8, "by_depht")
    assert str(caught.value) == (
        "unknown pairing 'by_depht'; did you mean 'by_depth'? (by_depth, by_similarity, by_size)"
    )


@pytest.mark.parametrize("selector", CONTROL_SELECTORS.names())
@every_pairing
def test_control_selectors_are_paired_by_depth_whatever_the_pairing(
    resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...], selector: str, pairing: str
) -> None:
    points = [resnet20[i] for i in (1, 4, 5, 8)]
    expected = pair_reversed(points, 9, resnet8) if selector == "reversed" else pair_by_depth(points, 9, resnet8)
    # Of a similarity that would send every point to the first layer.
    assert pair_hints(selector, points, 9, resnet8, pairing, np.tile([1.0, 0.0, 0.0], (9, 1))) == expected


@pytest.mark.parametrize("selector", ["paper_kmeans", "kmedoids", "contiguous", "agglomerative", "spectral"])
def test_selectors_are_paired_as_asked(
    resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...], selector: str
) -> None:
    points, similarity = [resnet20[i] for i in (1, 2, 8)], similar(9, 3)
    for name, pair in (("by_size", pair_by_size), ("by_similarity", pair_by_similarity)):
        assert pair_hints(selector, points, 9, resnet8, name, similarity) == pair(points, 9, resnet8, similarity)


# By depth


@given(cases())
@settings(deadline=None)
def test_as_many_points_as_stages_go_to_the_stage_ends(
    made_up: MadeUp, case: tuple[list[int], list[int], list[int]]
) -> None:
    teacher = made_up(*case[0])
    points = [teacher[i] for i in case[1]]
    # A student with as many stages as there are points.
    stages = [1 + i % 3 for i in range(len(points))]
    student = made_up(*stages)
    ends = [sum(stages[: i + 1]) for i in range(len(stages))]
    assert [layer.index for _, layer in pair_by_depth(points, len(teacher), student)] == ends


@given(cases())
@settings(deadline=None)
def test_other_numbers_of_points_go_to_a_nearest_relative_depth(
    made_up: MadeUp, case: tuple[list[int], list[int], list[int]]
) -> None:
    teacher, student = made_up(*case[0]), made_up(*case[2], 1, 1)
    points = [teacher[i] for i in case[1]][: len(case[2]) + 1]
    for point, layer in pair_by_depth(points, len(teacher), student):
        gaps = [abs(other.index / len(student) - point.index / len(teacher)) for other in student]
        assert abs(layer.index / len(student) - point.index / len(teacher)) == pytest.approx(min(gaps))


@given(cases())
@settings(deadline=None)
def test_reversed_uses_the_same_student_layers_from_the_deepest(
    made_up: MadeUp, case: tuple[list[int], list[int], list[int]]
) -> None:
    teacher, student = made_up(*case[0]), made_up(*case[2])
    points = [teacher[i] for i in case[1]]
    forward = pair_by_depth(points, len(teacher), student)
    backward = pair_reversed(points, len(teacher), student)
    assert [point for point, _ in backward] == points
    assert [layer for _, layer in backward] == [layer for _, layer in forward][::-1]


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([9], [(9, 3)]),
        ([1], [(1, 1)]),
        ([5], [(5, 2)]),
        ([2, 8], [(2, 1), (8, 3)]),
        ([1, 2, 3], [(1, 1), (2, 2), (3, 3)]),
        ([1, 3, 5, 6, 9], [(1, 1), (3, 1), (5, 2), (6, 2), (9, 3)]),
        (list(range(1, 10)), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 2), (8, 3), (9, 3)]),
    ],
)
def test_pairs_of_resnet20_with_resnet8(
    resnet20: tuple[Candidate, ...],
    resnet8: tuple[Candidate, ...],
    indices: list[int],
    expected: list[tuple[int, int]],
) -> None:
    assert paired(pair_by_depth([resnet20[i - 1] for i in indices], 9, resnet8)) == expected


def test_point_between_two_student_layers_goes_to_the_deeper(made_up: MadeUp) -> None:
    teacher, student = made_up(4), made_up(1, 1)
    assert paired(pair_by_depth([teacher[2]], 4, student)) == [(3, 2)]  # 3/4 lies between 1/2 and 1


def test_single_point_of_a_student_with_one_stage_goes_to_its_end(made_up: MadeUp) -> None:
    assert paired(pair_by_depth([made_up(6)[0]], 6, made_up(4))) == [(1, 4)]


def test_only_reversed_is_paired_backwards(resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...]) -> None:
    points = [resnet20[i] for i in (2, 5, 8)]
    assert paired(pair_hints("reversed", points, 9, resnet8)) == [(3, 3), (6, 2), (9, 1)]
    for selector in ("stage_ends", "random", "paper_kmeans", "kmedoids"):
        assert paired(pair_hints(selector, points, 9, resnet8)) == [(3, 1), (6, 2), (9, 3)]


# By size


def by_size(teacher: Sequence[Candidate], indices: Sequence[int], student: Sequence[Candidate]) -> list[int]:
    pairs = pair_by_size([teacher[index - 1] for index in indices], len(teacher), student)
    return [layer.index for _, layer in pairs]


def test_points_go_to_the_student_layers_of_their_size() -> None:
    teacher, student = of_sizes(16, 16, 16, 8, 8, 4), of_sizes(16, 8, 8, 4, 4, 4)
    # By depth the third would go to a map of 8×8, and the fifth to one of 4×4.
    assert by_size(teacher, [1, 2, 3, 4, 5, 6], student) == [1, 1, 1, 3, 3, 6]


@given(cases())
@settings(deadline=None)
def test_layers_have_the_size_of_their_points_where_the_student_has_it(
    made_up: MadeUp, case: tuple[list[int], list[int], list[int]]
) -> None:
    teacher, student = made_up(*case[0]), made_up(*case[2])
    sizes = {(layer.height, layer.width) for layer in student}
    for point, layer in pair_by_size([teacher[i] for i in case[1]], len(teacher), student):
        if (point.height, point.width) in sizes:
            assert (layer.height, layer.width) == (point.height, point.width)


@given(cases())
@settings(deadline=None)
def test_maps_that_never_grow_leave_each_point_its_own_best_layer(
    made_up: MadeUp, case: tuple[list[int], list[int], list[int]]
) -> None:
    teacher, student = made_up(*case[0]), made_up(*case[2])
    indices = [i + 1 for i in case[1]]
    assert by_size(teacher, indices, student) == [by_size(teacher, [index], student)[0] for index in indices]


def test_of_several_layers_of_a_size_the_nearest_in_relative_depth_is_taken() -> None:
    assert by_size(of_sizes(8, 8, 8, 8), [2], of_sizes(*[8] * 10)) == [5]


def test_layers_of_a_size_equally_near_are_taken_from_the_deeper() -> None:
    assert by_size(of_sizes(8, 8, 8, 8), [3], of_sizes(8, 8)) == [2]  # 3/4 lies between 1/2 and 1


def test_point_of_a_size_the_student_lacks_goes_to_the_nearest_ratio_of_pixels() -> None:
    # Of 40 pixels 20 are half and 64 are 1.6 times as many, though 20 is nearer by difference.
    assert by_size(of_sizes((5, 8)), [1], of_sizes(8, (4, 5))) == [1]


def test_point_between_two_sizes_goes_to_the_smaller_map() -> None:
    assert by_size(of_sizes(8, 8), [1], of_sizes(16, 4)) == [2]


def test_same_height_and_width_come_before_the_same_number_of_pixels() -> None:
    assert by_size(of_sizes((4, 8), 1), [1], of_sizes((8, 4), (4, 8))) == [2]


def test_point_whose_size_lies_behind_only_goes_no_further_back_than_the_one_before() -> None:
    # The student's only 16×16 lies before the 8×8 that the first point took.
    assert by_size(of_sizes(8, 16), [1, 2], of_sizes(16, 8, 4)) == [2, 2]


def test_point_takes_the_later_of_two_layers_of_its_size_if_the_earlier_lies_behind() -> None:
    # 32×32 comes back, as in a U-Net; alone the second point would go to the first layer.
    teacher = of_sizes(16, 32, 8, 8, 8, 8, 8, 8)
    student = of_sizes(32, 16, 8, 32)
    assert by_size(teacher, [2], student) == [1]
    assert by_size(teacher, [1, 2], student) == [2, 4]


# By similarity


def sum_of(similarity: Matrix, indices: Sequence[int], layers: Sequence[int]) -> float:
    return sum(similarity[index - 1, layer - 1] for index, layer in zip(indices, layers, strict=True))


def by_similarity(similarity: Matrix, indices: Sequence[int]) -> list[int]:
    teacher, student = (of_sizes(*[8] * size) for size in similarity.shape)
    pairs = pair_by_similarity([teacher[index - 1] for index in indices], len(teacher), student, similarity)
    return [layer.index for _, layer in pairs]


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1, 2, 1000]), st.integers(0, 2**32 - 1), st.data())
@settings(deadline=None, max_examples=150)
def test_pairs_by_similarity_are_the_best_and_deepest_of_all_that_never_run_backwards(
    teacher_depth: int, student_depth: int, levels: int, seed: int, data: st.DataObject
) -> None:
    similarity = np.random.default_rng(seed).integers(0, levels + 1, (teacher_depth, student_depth)) / levels
    indices = sorted(data.draw(st.sets(st.integers(1, teacher_depth), min_size=1)))
    every = list(combinations_with_replacement(range(1, student_depth + 1), len(indices)))
    best = max(sum_of(similarity, indices, layers) for layers in every)
    optimal = [layers for layers in every if sum_of(similarity, indices, layers) > best - 1e-9]
    assert by_similarity(similarity, indices) == [max(depths) for depths in zip(*optimal, strict=True)]


def test_points_go_to_their_most_similar_layers_where_these_run_forward() -> None:
    assert by_similarity(np.array([[0.9, 0.2, 0.1], [0.1, 0.3, 0.8], [0.0, 0.1, 0.9]]), [1, 2, 3]) == [1, 3, 3]


def test_crossing_similarities_are_paired_for_the_largest_sum() -> None:
    # Each for itself: layers 2 and 1. Of (1, 1), (1, 2), (2, 2) the sums are 1.3, 0.9 and 1.2.
    assert by_similarity(np.array([[0.4, 0.7], [0.9, 0.5]]), [1, 2]) == [1, 1]


def test_rows_are_those_of_the_hint_points() -> None:
    similarity = np.zeros((4, 3))
    similarity[1, 0] = similarity[3, 1] = 1.0
    assert by_similarity(similarity, [2, 4]) == [1, 2]


def test_layers_all_alike_are_paired_with_the_deepest() -> None:
    assert by_similarity(np.full((3, 4), 0.1), [1, 2, 3]) == [4, 4, 4]


def test_sums_that_rounding_alone_makes_smaller_are_a_tie() -> None:
    # 0.7 + 0.1 < 0.6 + 0.2 in float64, by the last digit; the deeper is taken.
    assert 0.7 + 0.1 < 0.6 + 0.2
    assert by_similarity(np.array([[0.6, 0.7], [0.2, 0.1]]), [1, 2]) == [2, 2]


def test_negative_similarities_are_allowed() -> None:
    assert by_similarity(np.array([[-0.1, -0.2], [-0.3, -0.05]]), [1, 2]) == [1, 2]


def test_missing_similarity_is_refused(resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...]) -> None:
    with pytest.raises(InputError) as caught:
        pair_hints("kmedoids", resnet20[:2], 9, resnet8, "by_similarity")
    assert str(caught.value) == (
        "the pairing by_similarity needs the similarity of teacher and student layers, but there is none; "
        "measure it with a trained student, or choose by_depth or by_size"
    )


@pytest.mark.parametrize("shape", [(3, 9), (9, 4), (8, 3)])
def test_similarity_of_other_networks_is_refused(
    resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...], shape: tuple[int, int]
) -> None:
    with pytest.raises(InputError) as caught:
        pair_hints("kmedoids", resnet20[:2], 9, resnet8, "by_similarity", np.ones(shape))
    assert str(caught.value) == (
        f"the similarity is of shape {list(shape)}, but the teacher has 9 candidates and the student 3; "
        "measure it anew with these two networks"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_similarity_that_is_not_finite_is_refused(
    resnet20: tuple[Candidate, ...], resnet8: tuple[Candidate, ...], value: float
) -> None:
    similarity = similar(9, 3)
    similarity[8, 2] = value
    with pytest.raises(InputError) as caught:
        pair_hints("kmedoids", resnet20[:2], 9, resnet8, "by_similarity", similarity)
    assert str(caught.value) == (
        "the similarity of teacher and student layers is not finite everywhere; measure it anew"
    )


@pytest.mark.parametrize(
    ("selector", "used"), [("kmedoids", "by_size"), ("stage_ends", "by_depth"), ("reversed", "backwards")]
)
def test_controls_are_not_paired_as_asked_for(selector: str, used: str) -> None:
    assert used_pairing(selector, "by_size") == used
