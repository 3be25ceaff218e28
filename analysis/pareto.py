"""The trials that no other trial beats in two objectives at once, and the best compromise among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .clustering import TIE_DECIMALS
from .direction import check_finite, sign_of

Objectives = tuple[float, float]
Directions = tuple[str, str]


@dataclass(frozen=True)
class ParetoSet:
    """Of two objectives.

    Attributes:
        members: numbers of the trials, the best one in the first objective first; trials with equal values, which do
            not beat each other, by their numbers.
        knee: number of the best compromise, or None; see `knee_of`.
    """

    members: tuple[int, ...]
    knee: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return {"members": list(self.members), "knee": self.knee}


def pareto_set(values: Mapping[int, Objectives], directions: Directions) -> ParetoSet:
    """The trials that no other one dominates: at least as good in both objectives, and better in one.

    Sorted by the first objective, a trial is a member if its second one is better than all before it (Kung, Luccio &
    Preparata 1975): O(n log n).

    Args:
        values: of both objectives, by trial number.
        directions: maximize or minimize, of each objective.

    Raises:
        InputError: a value that is not finite, or an unknown direction.
    """
    costs = {number: _costs(number, pair, directions) for number, pair in values.items()}
    members: list[int] = []
    for number in sorted(costs, key=lambda number: (*costs[number], number)):
        if not members or costs[number][1] < costs[members[-1]][1] or costs[number] == costs[members[-1]]:
            members.append(number)
    return ParetoSet(tuple(members), knee_of({number: values[number] for number in members}, directions))


def knee_of(front: Mapping[int, Objectives], directions: Directions) -> int | None:
    """The trial where the front bulges most: giving more of one objective buys less of the other on either side.

    Both objectives are scaled to 0..1 over the front. The knee lies farthest from the straight line between its two
    ends, on the side of better values (Das 1999, Structural Optimization 18, 107-115). Where the front bulges the other
    way, the farthest point would be the worst compromise, so that only the side of better values counts: this front
    has no knee.

    Args:
        front: the objectives of the members of a Pareto set, by trial number.
        directions: maximize or minimize, of each objective.

    Returns:
        A trial number, on a tie the one better in the first objective, then the smaller one. None for fewer than 3
        different points, or if none lies beyond the line.

    Raises:
        InputError: a value that is not finite, or an unknown direction.
    """
    costs = {number: _costs(number, pair, directions) for number, pair in front.items()}
    if len(set(costs.values())) < 3:
        return None
    lows = tuple(min(pair[axis] for pair in costs.values()) for axis in (0, 1))
    highs = tuple(max(pair[axis] for pair in costs.values()) for axis in (0, 1))

    def bulge(number: int) -> float:
        """√2 times the distance to the line from (0, 1) to (1, 0)."""
        first, second = ((costs[number][axis] - lows[axis]) / (highs[axis] - lows[axis]) for axis in (0, 1))
        return round(1 - first - second, TIE_DECIMALS)

    farthest = min(costs, key=lambda number: (-bulge(number), costs[number][0], number))
    return farthest if bulge(farthest) > 0 else None


def _costs(number: int, pair: Objectives, directions: Directions) -> Objectives:
    """The objectives turned so that smaller is better."""
    for value in pair:
        check_finite(f"trial {number}", value)
    return -sign_of(directions[0]) * pair[0], -sign_of(directions[1]) * pair[1]
