import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
from hintsearch.analysis.pareto import ParetoSet, knee_of, pareto_set
from hintsearch.models.errors import InputError
from hypothesis import given
from hypothesis import strategies as st

Values = Mapping[int, tuple[float, float]]

BOTH_SMALL = ("minimize", "minimize")
# A small grid, so that ties and duplicates come about; whole numbers, so that scaling is exact.
POINTS = st.dictionaries(st.integers(1, 99), st.tuples(*[st.integers(-4, 4).map(float)] * 2), max_size=30)
DIRECTIONS = st.tuples(*[st.sampled_from(["maximize", "minimize"])] * 2)


def at_least_as_good(first: float, second: float, direction: str) -> bool:
    return first >= second if direction == "maximize" else first <= second


def dominates(first: tuple[float, float], second: tuple[float, float], directions: tuple[str, str]) -> bool:
    return first != second and all(at_least_as_good(*pair) for pair in zip(first, second, directions, strict=True))


def dominated(number: int, values: Values, directions: tuple[str, str]) -> bool:
    return any(dominates(other, values[number], directions) for other in values.values())


@given(values=POINTS, directions=DIRECTIONS)
def test_no_member_is_dominated(values: Values, directions: tuple[str, str]) -> None:
    assert not any(dominated(number, values, directions) for number in pareto_set(values, directions).members)


@given(values=POINTS, directions=DIRECTIONS)
def test_every_trial_outside_is_dominated(values: Values, directions: tuple[str, str]) -> None:
    outside = set(values).difference(pareto_set(values, directions).members)
    assert all(dominated(number, values, directions) for number in outside)


@given(values=POINTS, directions=DIRECTIONS)
def test_members_go_from_one_end_to_the_other(values: Values, directions: tuple[str, str]) -> None:
    members = pareto_set(values, directions).members
    pairs = [values[number] for number in members]
    assert all(at_least_as_good(a[0], b[0], directions[0]) for a, b in pairwise(pairs))
    assert all(at_least_as_good(b[1], a[1], directions[1]) for a, b in pairwise(pairs))


@given(values=POINTS, directions=DIRECTIONS, scales=st.tuples(*[st.integers(-20, 20)] * 2))
def test_scaling_an_objective_changes_nothing(
    values: Values, directions: tuple[str, str], scales: tuple[int, int]
) -> None:
    scaled = {n: (math.ldexp(a, scales[0]), math.ldexp(b, scales[1])) for n, (a, b) in values.items()}
    assert pareto_set(scaled, directions) == pareto_set(values, directions)


@given(data=st.data(), values=POINTS, directions=DIRECTIONS)
def test_order_of_the_trials_changes_nothing(data: st.DataObject, values: Values, directions: tuple[str, str]) -> None:
    shuffled = dict(data.draw(st.permutations(list(values.items()))))
    assert pareto_set(shuffled, directions) == pareto_set(values, directions)


@given(values=POINTS)
def test_maximizing_is_minimizing_the_opposite(values: Values) -> None:
    opposite = {number: (-first, second) for number, (first, second) in values.items()}
    assert pareto_set(values, ("maximize", "minimize")) == pareto_set(opposite, BOTH_SMALL)


@given(values=POINTS, directions=DIRECTIONS)
def test_knee_is_a_member_that_is_no_end_of_the_front(values: Values, directions: tuple[str, str]) -> None:
    found = pareto_set(values, directions)
    if found.knee is not None:
        ends = values[found.members[0]], values[found.members[-1]]
        assert found.knee in found.members
        assert values[found.knee] not in ends


def test_trials_with_equal_values_are_all_members() -> None:
    values = {5: (1.0, 2.0), 3: (1.0, 2.0), 4: (2.0, 1.0), 9: (2.0, 2.0)}
    assert pareto_set(values, BOTH_SMALL).members == (3, 5, 4)


def test_trial_equal_in_one_objective_and_worse_in_the_other_is_outside() -> None:
    values = {1: (1.0, 1.0), 2: (1.0, 2.0), 3: (2.0, 1.0)}
    assert pareto_set(values, BOTH_SMALL).members == (1,)


def test_no_trials_have_an_empty_set() -> None:
    assert pareto_set({}, BOTH_SMALL) == ParetoSet((), None)


def test_knee_by_hand() -> None:
    # Accuracy against seconds, scaled to costs: (0, 1), (0.25, 0.1), (0.5, 0.05), (1, 0), 0.65 and 0.45 beyond.
    values = {1: (0.9, 110.0), 2: (0.8, 20.0), 3: (0.7, 15.0), 4: (0.5, 10.0)}
    assert pareto_set(values, ("maximize", "minimize")).knee == 2


def test_front_that_bulges_towards_worse_values_has_no_knee() -> None:
    assert pareto_set({1: (0.0, 10.0), 2: (9.0, 9.0), 3: (10.0, 0.0)}, BOTH_SMALL) == ParetoSet((1, 2, 3), None)


def test_points_on_the_straight_line_are_no_knee() -> None:
    # 1 − 0.1/0.3 − 0.2/0.3 is not quite 0 in floating point.
    assert knee_of({1: (0.0, 0.3), 2: (0.1, 0.2), 3: (0.3, 0.0)}, BOTH_SMALL) is None


def test_of_equally_far_points_the_knee_is_better_in_the_first_objective() -> None:
    assert knee_of({1: (0.0, 10.0), 8: (1.0, 4.0), 3: (4.0, 1.0), 4: (10.0, 0.0)}, BOTH_SMALL) == 8


def test_two_different_points_have_no_knee_however_often_they_come() -> None:
    assert pareto_set({1: (0.0, 1.0), 2: (0.0, 1.0), 3: (1.0, 0.0)}, BOTH_SMALL) == ParetoSet((1, 2, 3), None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=rf"^trial 7 has the value {value}, but values must be finite; leave it out$"):
        pareto_set({2: (0.0, 0.0), 7: (1.0, value)}, BOTH_SMALL)


def test_unknown_direction_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^unknown direction 'maximise'; did you mean 'maximize'"):
        pareto_set({1: (0.0, 0.0)}, ("maximise", "minimize"))


def test_set_as_plain_types() -> None:
    assert ParetoSet((3, 1), None).to_dict() == {"members": [3, 1], "knee": None}
