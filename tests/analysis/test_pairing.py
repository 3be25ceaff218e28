from collections.abc import Callable

import pytest
from hintsearch.analysis.pairing import pair_by_depth, pair_hints, pair_reversed
from hintsearch.models.candidates import Candidate
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


@given(cases())
@settings(deadline=None)
def test_every_hint_point_is_in_one_pair_in_order(
    made_up: MadeUp, case: tuple[list[int], list[int], list[int]]
) -> None:
    teacher, student = made_up(*case[0]), made_up(*case[2])
    points = [teacher[i] for i in case[1]]
    assert [point for point, _ in pair_by_depth(points, len(teacher), student)] == points


@given(cases())
@settings(deadline=None)
def test_student_layers_never_run_backwards(made_up: MadeUp, case: tuple[list[int], list[int], list[int]]) -> None:
    teacher, student = made_up(*case[0]), made_up(*case[2])
    layers = [layer.index for _, layer in pair_by_depth([teacher[i] for i in case[1]], len(teacher), student)]
    assert layers == sorted(layers)


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
