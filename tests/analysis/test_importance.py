"""Trap 34: PED-ANOVA alone looks at the survivors only, and takes small values of a target for the good ones."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from hintsearch.analysis.importance import NEEDED_TRIALS, FirstRungTrial, Importances, importances
from hintsearch.models.errors import InputError
from hintsearch.search.sampler import suggest_parameters
from hintsearch.search.study import load_study
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)
from scipy import stats

UNIT = FloatDistribution(0, 1)
YES_OR_NO = CategoricalDistribution([True, False])


def trial(
    number: int,
    value: float,
    metrics: Sequence[str] = (),
    **chosen: tuple[Any, BaseDistribution],
) -> FirstRungTrial:
    """With parameters as pairs of value and distribution."""
    return FirstRungTrial(
        number,
        {name: value for name, (value, _) in chosen.items()},
        {name: distribution_to_json(distribution) for name, (_, distribution) in chosen.items()},
        tuple(metrics),
        value,
    )


def made(count: int, value_of: Callable[..., float], seed: int = 0, names: str = "abc") -> list[FirstRungTrial]:
    """Trials with parameters in 0..1 of these names, drawn at random."""
    drawn = np.random.default_rng(seed).random((count, len(names)))
    return [
        trial(number, value_of(*row), **{name: (float(value), UNIT) for name, value in zip(names, row, strict=True)})
        for number, row in enumerate(drawn, start=1)
    ]


def with_subsets(value_of: Callable[[bool, bool, bool], float]) -> list[FirstRungTrial]:
    """80 trials: each subset of three metrics that is not empty, about as often."""
    subsets = [tuple(bool(bits >> place & 1) for place in range(3)) for bits in range(1, 8)]
    return [
        trial(
            number,
            value_of(*subsets[number % 7]) + 0.001 * (number * 37 % 80),
            [m for m, is_in in zip("xyz", subsets[number % 7], strict=True) if is_in],
        )
        for number in range(80)
    ]


def order(found: Importances) -> list[str]:
    return [parameter.name for parameter in found.parameters]


def top_by_a_bottom_by_b(a: float, b: float, c: float) -> float:
    """The largest values are those of large a; the smallest ones those of small b."""
    return a if b > 0.15 else b - 10


# Direction


def test_trap_34_what_decides_the_largest_values_ranks_first_when_maximizing() -> None:
    found = importances(made(120, top_by_a_bottom_by_b), "maximize", ())
    assert order(found)[0] == "a"
    assert found.parameters[0].share > 0.5


def test_trap_34_what_decides_the_smallest_values_ranks_first_when_minimizing() -> None:
    found = importances(made(120, top_by_a_bottom_by_b), "minimize", ())
    assert order(found)[0] == "b"
    assert found.parameters[0].share > 0.5


def test_trap_34_maximizing_is_minimizing_the_opposite() -> None:
    def opposite(a: float, b: float, c: float) -> float:
        return -top_by_a_bottom_by_b(a, b, c)

    found = importances(made(120, top_by_a_bottom_by_b), "maximize", ())
    assert importances(made(120, opposite), "minimize", ()) == found


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_trap_34_effect_of_a_metric_that_helps_is_positive(direction: str, sign: int) -> None:
    found = importances(with_subsets(lambda x, y, z: sign * (0.5 * y - 0.2 * z)), direction, "xyz")
    by_name = {metric.name: metric for metric in found.metrics}
    assert found.metrics[-1].name == "x"
    assert by_name["y"].effect == pytest.approx(0.5, abs=0.1)
    assert by_name["z"].effect == pytest.approx(-0.2, abs=0.1)


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_trap_34_what_decides_nothing_is_reached_by_chance_half_of_the_time(direction: str, sign: int) -> None:
    # Half of the trials share the worst value: were they taken for the best, chance would reach more.
    rng = np.random.default_rng(5)
    by_chance = [
        parameter.by_chance
        for seed in range(2)
        for parameter in importances(
            made(60, lambda *_: sign * max(0.5, float(rng.random())), seed, "abcdef"), direction, ()
        ).parameters
    ]
    # The mean of 12 draws from 0..1 has a standard deviation of 0.083.
    assert np.mean(by_chance) == pytest.approx(0.5, abs=0.25)


# Survivors


def survivors_and_stopped() -> tuple[optuna.Study, list[FirstRungTrial]]:
    """A search as Optuna knows it, and its first rung: x decides who gets on, y what the survivors end with."""
    study = optuna.create_study(direction="maximize")
    rows = []
    for number, (x, y) in enumerate(np.random.default_rng(3).random((180, 2)).tolist(), start=1):
        survives = x > 0.65
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if survives else optuna.trial.TrialState.PRUNED,
                value=y if survives else None,
                params={"x": x, "y": y},
                distributions={"x": UNIT, "y": UNIT},
                intermediate_values={8: x},
            )
        )
        rows.append(trial(number, x + 0.01 * y, x=(x, UNIT), y=(y, UNIT)))
    return study, rows


def test_trap_34_what_decided_who_was_stopped_ranks_first() -> None:
    study, first_rung = survivors_and_stopped()
    by_survivors = optuna.importance.get_param_importances(study)
    found = importances(first_rung, "maximize", ())
    assert next(iter(by_survivors)) == "y"
    assert order(found)[0] == "x"
    assert found.trials == 180


# Too few


def test_trap_34_fewer_than_50_trials_are_too_few() -> None:
    found = importances(made(49, top_by_a_bottom_by_b), "maximize", ())
    assert found.too_few
    assert (found.trials, found.needed, found.parameters, found.metrics) == (49, 50, (), ())


def test_50_trials_are_enough() -> None:
    found = importances(made(NEEDED_TRIALS, top_by_a_bottom_by_b), "maximize", ())
    assert not found.too_few
    assert len(found.parameters) == 3


def test_no_trials_are_too_few() -> None:
    assert importances([], "maximize", ()).trials == 0


# Shares


def divergence(best: Sequence[int], everything: Sequence[int]) -> float:
    """Pearson's, of a two-valued parameter with these counts, both values among the best.

    Each value that was seen is a kernel of its count, with 1 + 1/3 on itself and 1/3 on the other; the prior is one
    more, of count 1 and even.
    """

    def density(counts: Sequence[int]) -> list[float]:
        return [(0.8 * own + 0.2 * other + 0.5) / (sum(counts) + 1) for own, other in (counts, counts[::-1])]

    return sum(all_ * (best_ / all_ - 1) ** 2 for best_, all_ in zip(density(best), density(everything), strict=True))


def two_valued(rows: Sequence[tuple[int, Sequence[bool | None]]], names: Sequence[str]) -> list[FirstRungTrial]:
    """`rows` of (count, values): so many trials with these values, best rows first; None is a missing parameter."""
    found: list[FirstRungTrial] = []
    for count, values in rows:
        for _ in range(count):
            chosen = {n: (v, YES_OR_NO) for n, v in zip(names, values, strict=True) if v is not None}
            found.append(trial(len(found) + 1, -float(len(found)), **chosen))
    return found


def test_shares_by_hand() -> None:
    # The best 6 of 60 have p yes 5 times and q yes 3 times; all 60 have p yes 15 times and q yes 29 times.
    rows = [
        (3, (True, True)),
        (2, (True, False)),
        (1, (False, False)),
        (10, (True, True)),
        (16, (False, True)),
        (28, (False, False)),
    ]
    p, q = divergence((5, 1), (15, 45)), divergence((3, 3), (29, 31))
    found = importances(two_valued(rows, "pq"), "maximize", ())
    assert [(x.name, x.trials) for x in found.parameters] == [("p", 60), ("q", 60)]
    assert [x.share for x in found.parameters] == pytest.approx([p / (p + q), q / (p + q)])


def test_conditional_parameter_is_compared_among_the_trials_that_have_it() -> None:
    # The best 6 of 60 have t on 4 times, u yes 3 of these; all 60 have t on 20 times, u yes 9 of these.
    rows = [
        (3, (True, True)),
        (1, (True, False)),
        (2, (False, None)),
        (6, (True, True)),
        (10, (True, False)),
        (38, (False, None)),
    ]
    t = divergence((4, 2), (20, 40))
    u = (4 / 6) ** 2 / (20 / 60) * divergence((3, 1), (9, 11))
    found = importances(two_valued(rows, ("t.on", "u")), "maximize", ())
    assert {x.name: x.trials for x in found.parameters} == {"t.on": 60, "u": 20}
    assert {x.name: x.share for x in found.parameters} == pytest.approx({"t.on": t / (t + u), "u": u / (t + u)})


def test_parameter_that_none_of_the_best_have_has_no_share() -> None:
    rows = [(6, (True, None)), (4, (False, True)), (20, (False, False)), (30, (True, None))]
    found = importances(two_valued(rows, ("t.on", "u")), "maximize", ())
    assert (order(found), found.parameters[1].share) == (["t.on", "u"], 0.0)


def test_parameter_of_a_single_trial_has_no_share() -> None:
    rows = [(1, (True, True)), (9, (True, None)), (50, (False, None))]
    found = importances(two_valued(rows, ("t.on", "u")), "maximize", ())
    assert (found.parameters[1].name, found.parameters[1].share, found.parameters[1].trials) == ("u", 0.0, 1)


def test_shares_of_parameters_and_metrics_add_up_to_1() -> None:
    rows = [
        trial(n, math.sin(n), ["x"] if n % 3 else ["x", "y"], a=(n / 80, UNIT), b=(n * 37 % 80 / 80, UNIT))
        for n in range(80)
    ]
    found = importances(rows, "maximize", "xy")
    assert sum(x.share for x in (*found.parameters, *found.metrics)) == pytest.approx(1)
    assert all(x.share >= 0 for x in (*found.parameters, *found.metrics))


def test_importances_of_the_same_trials_are_the_same() -> None:
    rows = made(60, top_by_a_bottom_by_b)
    assert importances(rows, "maximize", "x") == importances(rows, "maximize", "x")


# Chance


def test_parameter_that_decides_is_more_than_chance() -> None:
    found = importances(made(60, lambda a, b, c: a), "maximize", ())
    assert (found.parameters[0].name, found.parameters[0].by_chance) == ("a", 1 / 200)


def test_rare_parameter_with_the_largest_share_by_luck_is_told_from_one_that_decides() -> None:
    # u is in 3 trials, one of them among the best: its share is large, but 3 of 60 are among the best 6 often enough.
    rows = [
        trial(n, -float(n), a=(n * 37 % 60 / 60, UNIT), **({"u": (n / 60, UNIT)} if n in (2, 30, 59) else {}))
        for n in range(60)
    ]
    found = importances(rows, "maximize", ())
    assert order(found)[0] == "u"
    assert found.parameters[0].by_chance > 0.05


# Metrics


def test_metric_counts_by_the_subset_that_came_about_and_not_by_what_was_asked() -> None:
    # The sampler asks for the last metric, z, only if another is in; it is in without being asked otherwise.
    rows = []
    for n in range(60):
        asked = n % 3 > 0
        chosen: dict[str, Any] = {"hints.metrics.y": (asked, YES_OR_NO)}
        if asked:
            chosen["hints.metrics.z"] = (n % 3 == 1, YES_OR_NO)
        metrics = [["z"], ["y", "z"], ["y"]][n % 3]
        rows.append(trial(n, float("z" in metrics) + 0.001 * (n // 3), metrics, **chosen))
    found = importances(rows, "maximize", "yz")
    z = next(metric for metric in found.metrics if metric.name == "z")
    assert (z.trials_with, z.trials_without) == (40, 20)
    assert z.effect == pytest.approx(1.0)
    assert found == importances([replace(row, parameters={}, distributions={}) for row in rows], "maximize", "yz")
    assert z.share > 0


def test_interval_of_an_effect_is_that_of_welch() -> None:
    rows = with_subsets(lambda x, y, z: 0.5 * y - 0.2 * z)
    having, others = ([r.value for r in rows if ("x" in r.metrics) is side] for side in (True, False))
    parts = [float(np.var(side, ddof=1)) / len(side) for side in (having, others)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (having, others), strict=True)
    )
    middle = float(np.mean(having) - np.mean(others))
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(parts))
    found = next(metric for metric in importances(rows, "maximize", "xyz").metrics if metric.name == "x")
    assert found.effect == pytest.approx(middle)
    assert found.interval == pytest.approx((middle - half, middle + half))


@pytest.mark.parametrize(("metric", "trials_with"), [("x", 60), ("y", 0)])
def test_metric_in_all_subsets_or_in_none_has_no_effect(metric: str, trials_with: int) -> None:
    found = importances([trial(n, float(n), ["x"]) for n in range(60)], "maximize", ("x", "y"))
    own = next(m for m in found.metrics if m.name == metric)
    assert (own.share, own.effect, own.interval, own.by_chance) == (0.0, None, None, 1.0)
    assert (own.trials_with, own.trials_without) == (trials_with, 60 - trials_with)


def test_metric_of_a_single_trial_has_an_effect_but_no_interval() -> None:
    found = importances([trial(n, float(n == 0), ["x"] if n == 0 else ["z"]) for n in range(60)], "maximize", "xz")
    assert {(m.effect, m.interval) for m in found.metrics} == {(1.0, None), (-1.0, None)}


# What cannot vary


def test_parameters_with_one_value_have_no_share() -> None:
    rows = [
        trial(
            n,
            float(n),
            a=(n / 60, UNIT),
            still=(0.5, UNIT),
            single=(0.3, FloatDistribution(0.3, 0.3)),
            only=("at", CategoricalDistribution(["at"])),
        )
        for n in range(60)
    ]
    found = importances(rows, "maximize", ())
    shares = {parameter.name: parameter.share for parameter in found.parameters}
    assert shares == {"a": 1.0, "still": 0.0, "single": 0.0, "only": 0.0}


def test_equal_values_make_nothing_important() -> None:
    rows = [trial(n, 0.5, ["x"] if n % 2 else ["y"], a=(n / 60, UNIT), b=(0.1, UNIT)) for n in range(60)]
    found = importances(rows, "maximize", "xy")
    assert [(x.name, x.share, x.by_chance) for x in found.parameters] == [("a", 0.0, 1.0), ("b", 0.0, 1.0)]
    assert [(x.share, x.effect, x.interval) for x in found.metrics] == [(0.0, 0.0, None)] * 2


def test_trials_without_any_parameter_have_no_importances() -> None:
    found = importances([trial(n, float(n)) for n in range(60)], "maximize", ())
    assert (found.trials, found.parameters, found.metrics) == (60, (), ())


# The sampler's names


def test_every_choice_of_the_digits_study_has_an_importance() -> None:
    space = load_study("digits", []).space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rows, asked = [], set()
    for number in range(60):
        source = study.ask()
        parameters = suggest_parameters(source, space, "", 3, 0.1)
        asked |= set(source.params)
        distributions = {name: distribution_to_json(d) for name, d in source.distributions.items()}
        metrics = tuple(parameters["hints.metrics"].split(","))
        rows.append(FirstRungTrial(number, source.params, distributions, metrics, math.log(parameters["weight.hint"])))
    found = importances(rows, "maximize", space.hints.metrics)
    assert set(order(found)) == {name for name in asked if not name.startswith("hints.metrics.")}
    assert {metric.name for metric in found.metrics} == set(space.hints.metrics)
    assert order(found)[0] == "weight.hint"


# Input


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=rf"^trial 7 has the value {value}, but values must be finite"):
        importances([trial(7, value)], "maximize", ())


def test_unknown_direction_is_refused() -> None:
    with pytest.raises(InputError, match=r"^unknown direction 'max'"):
        importances([], "max", ())


def test_metric_that_the_space_does_not_offer_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^trial 7 has the unknown layer metric 'cka_liner'; did you mean 'cka_linear'"
    ):
        importances([trial(7, 0.5, ["cka_liner"])], "maximize", ("r2_cca", "cka_linear"))


def test_value_outside_its_distribution_is_refused() -> None:
    rows = [trial(n, 0.5, a=(n / 49, UNIT)) for n in range(51)]
    with pytest.raises(InputError, match=r"^trial 50 has a parameter outside its distribution \(.*\); leave the trial"):
        importances(rows, "maximize", ())


def test_distribution_without_a_value_is_refused() -> None:
    rows = [FirstRungTrial(7, {}, {"lr": distribution_to_json(UNIT)}, (), 0.5)] * 50
    with pytest.raises(InputError, match=r"^trial 7 has a distribution of lr, but no value; give both or neither$"):
        importances(rows, "maximize", ())


def test_importances_can_be_written_as_json() -> None:
    found = importances(with_subsets(lambda x, y, z: float(y)), "maximize", "xyz")
    read = json.loads(json.dumps(found.to_dict()))
    assert (read["trials"], read["too_few"]) == (80, False)
    assert [metric["name"] for metric in read["metrics"]] == [metric.name for metric in found.metrics]
