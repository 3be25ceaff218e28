import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
import pytest
from hintsearch.analysis.confirmation import (
    ConfirmedConfiguration,
    PairedComparison,
    choose_export,
    compare,
    confirm,
    hedges_correction,
    pre_stated,
    summarise,
)
from hintsearch.models.errors import InputError
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

WINNER = (0.90, 0.92, 0.89, 0.93, 0.91)
CONTROL = (0.88, 0.89, 0.88, 0.90, 0.90)


def configuration(
    number: int,
    values: Sequence[float],
    arm: Literal["search", "control"] = "search",
    searched: float = 0.0,
    seeds: Sequence[int] | None = None,
) -> ConfirmedConfiguration:
    """With values for seed pairs (1, 11), (2, 12), …, or for those of `seeds`."""
    pairs = [(seed, 10 + seed) for seed in (seeds or range(1, len(values) + 1))]
    return ConfirmedConfiguration(
        number, arm, "random" if arm == "control" else "", searched, dict(zip(pairs, values, strict=True))
    )


def compared(ours: Sequence[float], theirs: Sequence[float], direction: str = "maximize") -> PairedComparison:
    return compare(configuration(18, ours), configuration(5, theirs, "control"), direction)


def test_comparison_by_hand() -> None:
    # Differences 2, 3, 1, 3, 1 points: mean 2, variance (0+1+1+1+1)/4 = 1; t(0.975, 4) = 2.776445.
    found = compared(WINNER, CONTROL)
    half = 0.01 * 2.7764451 / math.sqrt(5)
    assert found.differences == pytest.approx((0.02, 0.03, 0.01, 0.03, 0.01))
    assert (found.mean, found.sd) == pytest.approx((0.02, 0.01))
    assert found.interval == pytest.approx((0.02 - half, 0.02 + half))
    assert (found.winner, found.control, found.control_name) == (18, 5, "random")
    assert (found.n, found.left_out) == (5, 0)


def test_p_value_is_that_of_the_paired_t_test() -> None:
    assert compared(WINNER, CONTROL).p_value == pytest.approx(stats.ttest_rel(WINNER, CONTROL).pvalue)


def test_effect_size_is_mean_by_spread_with_the_correction_of_hedges() -> None:
    # Of 4 degrees of freedom: Γ(2) / (√2 Γ(1.5)) = 1 / (√2 · √π/2).
    assert compared(WINNER, CONTROL).effect_size == pytest.approx(2 / (math.sqrt(2) * math.sqrt(math.pi) / 2))


@pytest.mark.parametrize("freedom", [2, 4, 9, 99])
def test_correction_is_near_its_usual_approximation(freedom: int) -> None:
    assert hedges_correction(freedom) == pytest.approx(1 - 3 / (4 * freedom - 1), abs=0.008)


def test_correction_makes_the_effect_unbiased() -> None:
    # Of true effect 1 with 6 seeds; the uncorrected mean is 1.19.
    draws = np.random.default_rng(0).normal(1.0, 1.0, (200_000, 6))
    effects = draws.mean(axis=1) / draws.std(axis=1, ddof=1) * hedges_correction(5)
    assert effects.mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.02, 0.03, 0.01, 0.03, 0.01), "better"),
        ((0.02, -0.03, 0.01, 0.03, -0.01), "not_distinguishable"),
        ((-0.02, -0.03, -0.01, -0.03, -0.01), "worse"),
    ],
)
def test_verdict_says_where_the_interval_lies(differences: Sequence[float], verdict: str, direction: str) -> None:
    sign = 1 if direction == "maximize" else -1
    found = compared([0.5 + sign * difference for difference in differences], [0.5] * 5, direction)
    assert found.verdict == verdict
    assert found.differences == pytest.approx(differences)


@given(
    ours=st.lists(st.integers(0, 100).map(lambda i: i / 100), min_size=4, max_size=4),
    theirs=st.lists(st.integers(0, 100).map(lambda i: i / 100), min_size=4, max_size=4),
)
def test_changing_sides_changes_the_sign_alone(ours: Sequence[float], theirs: Sequence[float]) -> None:
    there, back = compared(ours, theirs), compared(theirs, ours)
    opposite = {"better": "worse", "worse": "better", "not_distinguishable": "not_distinguishable"}
    assert there.differences == tuple(-difference for difference in back.differences)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.verdict == opposite[back.verdict]


def test_noise_alone_is_called_better_or_worse_in_one_search_of_twenty() -> None:
    draws = np.random.default_rng(1).normal(0.9, 0.01, (2000, 2, 5))
    verdicts = [compared(ours, theirs).verdict for ours, theirs in draws]
    shares = [verdicts.count("better") / 2000, verdicts.count("worse") / 2000]
    assert shares == pytest.approx([0.025, 0.025], abs=0.01)


def test_only_seed_pairs_that_both_have_are_compared() -> None:
    ours = configuration(18, (0.9, 0.8, 0.7), seeds=(1, 2, 3))
    theirs = configuration(5, (0.6, 0.6, 0.1), "control", seeds=(3, 2, 9))
    found = compare(ours, theirs, "maximize")
    assert found.differences == pytest.approx((0.2, 0.1))
    assert (found.n, found.left_out) == (2, 2)


def test_seeds_are_paired_by_both_of_their_parts() -> None:
    ours = ConfirmedConfiguration(18, "search", "", 0.0, {(1, 1): 0.9, (1, 2): 0.8})
    theirs = ConfirmedConfiguration(5, "control", "last", 0.0, {(1, 2): 0.7, (2, 1): 0.1})
    assert compare(ours, theirs, "maximize").differences == pytest.approx((0.1,))


def test_one_seed_tells_nothing_beyond_its_difference() -> None:
    found = compared((0.9,), (0.8,))
    assert found.mean == pytest.approx(0.1)
    assert (found.n, found.sd, found.interval, found.p_value, found.effect_size) == (1, None, None, None, None)
    assert found.verdict == "not_distinguishable"


def test_two_seeds_have_an_interval_but_no_effect_size() -> None:
    # Differences 1 and 3: mean 2, sd √2, t(0.975, 1) = 12.7062.
    found = compared((2.0, 4.0), (1.0, 1.0))
    assert found.interval == pytest.approx((2 - 12.7062047, 2 + 12.7062047))
    assert found.effect_size is None


def test_no_seed_in_common_is_not_distinguishable() -> None:
    found = compare(configuration(18, (), seeds=()), configuration(5, CONTROL, "control"), "maximize")
    assert (found.n, found.left_out, found.mean, found.verdict) == (0, 5, None, "not_distinguishable")


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_differences_that_are_all_equal_give_no_verdict(offset: float) -> None:
    # In floating point the differences are not quite equal.
    found = compared([value + offset for value in CONTROL], CONTROL)
    assert found.mean == pytest.approx(offset)
    assert (found.interval, found.p_value, found.effect_size) == (None, None, None)
    assert found.verdict == "not_distinguishable"


def test_winner_and_control_are_those_of_the_search_phase() -> None:
    # By their repetitions, trials 2 and 8 would be compared.
    found = pre_stated(
        [
            configuration(1, (0.1, 0.2), searched=0.9),
            configuration(2, (0.8, 0.9), searched=0.8),
            configuration(7, (0.1, 0.2), "control", searched=0.7),
            configuration(8, (0.8, 0.9), "control", searched=0.6),
        ],
        "maximize",
    )
    assert found is not None
    assert [c.number for c in found] == [1, 7]


def test_winner_to_minimize_has_the_smallest_value() -> None:
    parts = [configuration(n, (), searched=n / 10) for n in (3, 2)] + [
        configuration(n, (), "control", searched=n / 10) for n in (5, 4)
    ]
    found = pre_stated(parts, "minimize")
    assert found is not None
    assert [c.number for c in found] == [2, 4]


def test_winner_on_a_tie_is_the_earlier_trial() -> None:
    found = pre_stated([configuration(9, ()), configuration(4, ()), configuration(5, (), "control")], "maximize")
    assert found is not None
    assert found[0].number == 4


def test_winner_whose_repetitions_failed_is_not_replaced() -> None:
    found = confirm(
        [
            configuration(1, (), searched=0.9),
            configuration(2, WINNER, searched=0.8),
            configuration(5, CONTROL, "control", searched=0.7),
        ],
        "maximize",
    )
    assert found.comparison is not None
    assert (found.comparison.winner, found.comparison.verdict) == (1, "not_distinguishable")


@pytest.mark.parametrize("arm", ["search", "control"])
def test_without_one_of_the_sides_there_is_no_comparison(arm: Literal["search", "control"]) -> None:
    assert confirm([configuration(1, WINNER, arm)], "maximize").comparison is None


def test_summary_by_hand() -> None:
    found = summarise(configuration(5, (0.8, 0.9, 1.0), "control"))
    assert (found.number, found.arm, found.control, found.n) == (5, "control", "random", 3)
    assert (found.mean, found.sd) == pytest.approx((0.9, 0.1))


@pytest.mark.parametrize(("values", "mean"), [((), None), ((0.5,), 0.5)])
def test_summary_of_fewer_than_two_values_has_no_spread(values: Sequence[float], mean: float | None) -> None:
    found = summarise(configuration(5, values))
    assert (found.mean, found.sd, found.n) == (mean, None, len(values))


@pytest.mark.parametrize(("direction", "best"), [("maximize", 2), ("minimize", 1)])
def test_configuration_with_the_best_mean_is_exported(direction: str, best: int) -> None:
    parts = [configuration(1, (0.5, 0.6)), configuration(2, (0.7, 0.6)), configuration(3, (0.65, 0.6), "control")]
    chosen = choose_export(parts, direction)
    assert chosen is not None
    assert chosen.number == best


def test_control_with_a_better_mean_is_exported_whichever_was_tested() -> None:
    found = confirm(
        [
            configuration(1, (0.80, 0.81), searched=0.9),
            configuration(5, (0.70, 0.71), "control", searched=0.8),
            configuration(6, (0.82, 0.83), "control", searched=0.7),
        ],
        "maximize",
    )
    assert found.comparison is not None
    assert found.comparison.control == 5
    assert found.export == 6


def test_control_with_an_equal_mean_is_not_exported() -> None:
    # Added up in another order, the same values differ in their last digits.
    assert sum((0.1, 0.2, 0.3)) != sum((0.3, 0.2, 0.1))
    parts = [configuration(9, (0.3, 0.2, 0.1)), configuration(5, (0.1, 0.2, 0.3), "control")]
    chosen = choose_export(parts, "maximize")
    assert chosen is not None
    assert chosen.number == 9


def test_configuration_that_failed_for_most_seeds_is_not_exported() -> None:
    chosen = choose_export([configuration(1, (0.99, 0.99)), configuration(2, WINNER)], "maximize")
    assert chosen is not None
    assert chosen.number == 2


def test_nothing_is_exported_if_nothing_was_repeated() -> None:
    assert confirm([configuration(1, ()), configuration(5, (), "control")], "maximize").export is None


def test_summaries_come_best_first_and_those_without_values_last() -> None:
    parts = [configuration(1, ()), configuration(2, (0.5,)), configuration(3, (0.9,), "control")]
    assert [s.number for s in confirm(parts, "maximize").summaries] == [3, 2, 1]
    assert [s.number for s in confirm(parts, "minimize").summaries] == [2, 3, 1]


def test_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match=r"^the repetition of trial 18 with seeds 2, 12 has the value nan, but values"):
        compared((0.9, math.nan), (0.8, 0.8))


def test_search_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match=r"^trial 3 has the value inf"):
        pre_stated([configuration(3, (), searched=math.inf)], "maximize")


def test_confirmation_can_be_written_as_json() -> None:
    parts = [configuration(18, WINNER), configuration(5, CONTROL, "control")]
    found = confirm(parts, "maximize")
    assert found.comparison is not None
    read = json.loads(json.dumps(found.to_dict()))
    assert read["comparison"] == json.loads(json.dumps(asdict(found.comparison)))
    assert read["comparison"]["verdict"] == "better"
    assert [s["number"] for s in read["summaries"]] == [18, 5]
