from collections.abc import Sequence

import pytest
from hintsearch.analysis.confirmation import ConfirmedConfiguration, PairedComparison, compare
from hintsearch.analysis.verdict import describe

BASE = 0.9


def comparison(differences: Sequence[float], direction: str = "maximize", more_of_control: int = 0) -> PairedComparison:
    """Of trial 18 with the control random; `more_of_control` seeds are the control's alone."""
    sign = 1 if direction == "maximize" else -1
    ours = {(seed, 0): BASE + sign * difference for seed, difference in enumerate(differences)}
    theirs = {(seed, 0): BASE for seed in range(len(differences) + more_of_control)}
    return compare(
        ConfirmedConfiguration(18, "search", "", 1.0, ours),
        ConfirmedConfiguration(5, "control", "random", 0.9, theirs),
        direction,
    )


BETTER = (0.02, 0.03, 0.01, 0.03, 0.01)


def test_winner_that_is_better() -> None:
    assert describe(comparison(BETTER), "val_accuracy") == (
        "Trial 18 is better than the control random (trial 5) by 2.0 points "
        "(95 % interval 0.8 .. 3.2, d 1.6, n = 5 seeds): more than noise."
    )


def test_winner_that_is_worse_is_told_by_how_much() -> None:
    assert describe(comparison([-difference for difference in BETTER]), "val_map_cosine") == (
        "Trial 18 is worse than the control random (trial 5) by 2.0 points (95 % interval 0.8 .. 3.2, d 1.6, "
        "n = 5 seeds): more than noise, so the search's best lost to what needs no search."
    )


def test_winner_that_is_better_within_noise() -> None:
    assert describe(comparison((0.03, -0.01, 0.02, -0.02)), "val_accuracy") == (
        "Trial 18 is better than the control random (trial 5) by 0.5 points (95 % interval -3.3 .. 4.3, d 0.2, "
        "n = 4 seeds): not more than noise, so that the search found better hint points is not shown."
    )


def test_winner_that_is_worse_within_noise() -> None:
    assert describe(comparison((-0.03, 0.01, -0.02, 0.02)), "val_accuracy") == (
        "Trial 18 is worse than the control random (trial 5) by 0.5 points (95 % interval -3.3 .. 4.3, d 0.2, "
        "n = 4 seeds): not more than noise, so that the search found better hint points is not shown."
    )


def test_loss_is_told_in_its_own_unit() -> None:
    assert describe(comparison(BETTER, "minimize"), "val_loss").startswith(
        "Trial 18 is better than the control random (trial 5) by 0.020 (95 % interval 0.008 .. 0.032, d 1.6,"
    )


def test_small_end_of_an_interval_does_not_read_as_0() -> None:
    # The lower end is 2 − 2.776 · 1.6 / √5 = 0.013 points.
    differences = [0.02 + 1.6 * (difference - 0.02) for difference in BETTER]
    assert "by 2.00 points (95 % interval 0.01 .. 3.99" in describe(comparison(differences), "val_accuracy")


def test_one_seed_has_no_interval() -> None:
    assert describe(comparison((0.02,)), "val_accuracy") == (
        "Trial 18 is better than the control random (trial 5) by 2.0 points (n = 1 seed): not more than noise, "
        "so that the search found better hint points is not shown."
    )


@pytest.mark.parametrize(
    ("difference", "order"), [(0.02, "is better than"), (0.0, "differs from"), (-0.02, "is worse than")]
)
def test_equal_differences_are_said_to_have_no_spread(difference: float, order: str) -> None:
    said = describe(comparison((difference,) * 3), "val_accuracy")
    assert said.startswith(
        f"Trial 18 {order} the control random (trial 5) by {abs(100 * difference):.1f} points (the same"
    )
    assert "the same for every seed, which leaves no spread to compare it with, n = 3 seeds): not more" in said


@pytest.mark.parametrize(("more", "said"), [(1, "1 seed is"), (2, "2 seeds are")])
def test_seeds_that_are_left_out_are_told(more: int, said: str) -> None:
    assert describe(comparison(BETTER, more_of_control=more), "val_accuracy").endswith(
        f"more than noise. {said} left out, for a trial of one of the two failed."
    )


def test_no_seeds_in_common_are_told() -> None:
    assert describe(comparison((), more_of_control=3), "val_accuracy") == (
        "Trial 18 and the control random (trial 5) have no seeds in common, so that the search found better hint "
        "points is not shown. 3 seeds are left out, for a trial of one of the two failed."
    )
