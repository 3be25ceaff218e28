"""Which values of an objective are better: the larger or the smaller ones."""

import math

from ..models.errors import InputError, nearest

_SIGNS = {"maximize": 1.0, "minimize": -1.0}


def sign_of(direction: str) -> float:
    """What an objective is multiplied by so that larger is better: 1 or −1.

    Args:
        direction: maximize or minimize.

    Raises:
        InputError: another direction.
    """
    if direction not in _SIGNS:
        raise InputError(f"unknown direction {direction!r}; {nearest(direction, _SIGNS)}")
    return _SIGNS[direction]


def check_finite(what: str, value: float) -> None:
    """Raises `InputError` for NaN and infinity, which no comparison puts in a place.

    Args:
        what: has the value, e.g. `trial 7`.
        value: of the objective.
    """
    if not math.isfinite(value):
        raise InputError(f"{what} has the value {value}, but values must be finite; leave it out")
