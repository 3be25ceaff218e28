"""Which hyperparameters, and which layer metrics in the subset, decided how good the trials of a search were.

Only values at the first rung are compared. Every trial has one, while those at the last rung are of the survivors:
among these, the parameter that decided who survives has nothing left to decide.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial

from ..models.errors import InputError, nearest, reason
from .direction import check_finite, sign_of

_Distributions = dict[str, BaseDistribution]
_Values = np.ndarray[Any, np.dtype[np.float64]]

# The part of the trials that PED-ANOVA compares with all; it wants at least 5 trials there (Optuna's documentation).
BEST = 0.1
NEEDED_TRIALS = 50
# Optuna's names of the yes-or-no choices that a subset of layer metrics is drawn by.
METRIC_SWITCH = "hints.metrics."
CONFIDENCE = 0.95
# How often values are dealt out at random, to see what importance comes about by chance.
SHUFFLES = 199
# Importances that differ by less than this part are equal: the order of addition alone makes them differ.
ROUNDING = 1e-9


@dataclass(frozen=True)
class FirstRungTrial:
    """A search trial that reached the first rung, whatever became of it later.

    Attributes:
        number: of the trial.
        parameters: by Optuna's names, such as `lr`, `weight.logit.on` or `weight.hint@at`.
        distributions: Optuna's JSON of each of them, by the same names.
        metrics: the layer metrics in the subset.
        value: of the objective at the first rung.
    """

    number: int
    parameters: Mapping[str, Any]
    distributions: Mapping[str, str]
    metrics: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class ParameterImportance:
    """Of one hyperparameter.

    Attributes:
        name: as Optuna has it.
        share: of all importance, 0..1.
        by_chance: how often it has at least this importance if the values are dealt out to the trials at random, 0..1.
            Some parameter always has the largest share: below 0.05 it is more than noise, of one parameter looked at
            alone.
        trials: how many trials have it. One that is asked only if a term is on, or only for one hint loss, is missing
            in the others; the fewer have it, the larger a share it gets by chance.
    """

    name: str
    share: float
    by_chance: float
    trials: int


@dataclass(frozen=True)
class MetricImportance:
    """Of having one layer metric in the subset.

    Attributes:
        name: of the metric.
        share: of all importance, 0..1.
        by_chance: as of a parameter.
        effect: mean value of the trials with it, less that of those without, turned so that positive is better; None
            if it is in all subsets or in none.
        interval: 95 % interval of the effect by Welch's t; None if there are fewer than 2 trials on either side, or no
            spread. It describes these trials: they are no random sample, for the sampler learns from them, and other
            parameters differ between the two sides.
        trials_with: how many trials have it.
        trials_without: how many have not.
    """

    name: str
    share: float
    by_chance: float
    effect: float | None
    interval: tuple[float, float] | None
    trials_with: int
    trials_without: int


@dataclass(frozen=True)
class Importances:
    """All shares add up to 1, or all are 0 if nothing made a difference.

    Attributes:
        trials: how many trials were compared.
        needed: how many it takes.
        parameters: the largest share first; empty for too few trials.
        metrics: the largest share first; empty for too few trials.
    """

    trials: int
    needed: int
    parameters: tuple[ParameterImportance, ...]
    metrics: tuple[MetricImportance, ...]

    @property
    def too_few(self) -> bool:
        """Whether there were too few trials to say anything."""
        return self.trials < self.needed

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return {**asdict(self), "too_few": self.too_few}


def importances(trials: Sequence[FirstRungTrial], direction: str, metrics: Sequence[str]) -> Importances:
    """What decided whether a trial was among the best tenth at the first rung.

    By PED-ANOVA (Watanabe, Bansal & Hutter 2023, arXiv 2304.10255), which compares where the best tenth of the trials
    lie with where all of them lie: what the sampler preferred does not count as important for that alone. A parameter
    that some trials do not have is compared among the trials that have it, and weighted by how much of the best tenth
    and how much of all they are (conditional PED-ANOVA, arXiv 2601.20800). That a term is on at all is the
    importance of its own yes-or-no choice, as `weight.logit.on`.

    A metric counts as the yes or no of its being in the subset. The sampler's own yes-or-no choices are left out: the
    last metric is not asked about if no other is chosen, and then is in.

    Args:
        trials: every search trial with a value at the first rung, also those that were stopped there or failed later;
            no controls and no repetitions.
        direction: maximize or minimize.
        metrics: all that the space offers.

    Raises:
        InputError: an unknown direction, a value that is not finite, a subset with a metric that the space does not
            offer, or a parameter that does not fit its distribution.
    """
    sign = sign_of(direction)
    for trial in trials:
        check_finite(f"trial {trial.number}", trial.value)
        _check_metrics(trial, metrics)
    if len(trials) < NEEDED_TRIALS:
        return Importances(len(trials), NEEDED_TRIALS, (), ())
    study = _study(trials, sign, metrics)
    found = _ped_anova(study)
    shares, by_chance = _shares(found), _by_chance(study, sign, found)
    return Importances(
        trials=len(trials),
        needed=NEEDED_TRIALS,
        parameters=tuple(
            ParameterImportance(name, share, by_chance[name], sum(name in trial.parameters for trial in trials))
            for name, share in shares.items()
            if not name.startswith(METRIC_SWITCH)
        ),
        metrics=tuple(
            _metric_importance(name.removeprefix(METRIC_SWITCH), share, by_chance[name], trials, sign)
            for name, share in shares.items()
            if name.startswith(METRIC_SWITCH)
        ),
    )


def _check_metrics(trial: FirstRungTrial, metrics: Sequence[str]) -> None:
    for metric in trial.metrics:
        if metric not in metrics:
            raise InputError(
                f"trial {trial.number} has the unknown layer metric {metric!r}; {nearest(metric, metrics)}"
            )


def _with_realised_subset(trial: FirstRungTrial, metrics: Sequence[str]) -> tuple[dict[str, Any], _Distributions]:
    """Parameters and distributions with a yes or no for every metric, whether or not the sampler asked for it."""
    names = [name for name in trial.distributions if not name.startswith(METRIC_SWITCH)]
    missing = sorted(set(names) - set(trial.parameters))
    if missing:
        raise InputError(f"trial {trial.number} has a distribution of {missing[0]}, but no value; give both or neither")
    parameters = {name: trial.parameters[name] for name in names}
    distributions: _Distributions = {name: json_to_distribution(trial.distributions[name]) for name in names}
    for metric in metrics:
        parameters[METRIC_SWITCH + metric] = metric in trial.metrics
        distributions[METRIC_SWITCH + metric] = CategoricalDistribution([False, True])
    return parameters, distributions


def _shares(found: Mapping[str, float]) -> dict[str, float]:
    """Of all importance, the largest first; by name on a tie, for Optuna's own order is that of a set.

    Optuna's own normalising would give equal shares where nothing made a difference.
    """
    total = sum(found.values())
    shares = {name: value / total if total > 0 else 0.0 for name, value in found.items()}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _varying(trials: Sequence[FrozenTrial]) -> tuple[list[str], list[str]]:
    """Names of the parameters with several values among the trials, and of those with one, which decide nothing.

    To PED-ANOVA these would matter: its prior weighs more in the few best trials than in all.
    """
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    several = sorted(name for name, own in values.items() if len(own) > 1)
    return several, sorted(set(values).difference(several))


def _by_chance(study: optuna.Study, sign: float, found: Mapping[str, float]) -> dict[str, float]:
    """For each name, how often values dealt out at random give at least the importance that was found."""
    rng = np.random.default_rng(0)
    values = np.array([trial.value for trial in study.get_trials(deepcopy=False)])
    # What was found is one of the deals: no p value is 0 (Phipson & Smyth 2010).
    reached = dict.fromkeys(found, 1)
    for _ in range(SHUFFLES):
        # With a target PED-ANOVA takes the smallest for the best, whatever the direction of the study.
        costs = -sign * rng.permutation(values)
        dealt = _ped_anova(study, partial(_dealt_cost, costs))
        for name, value in found.items():
            reached[name] += dealt[name] >= value * (1 - ROUNDING)
    return {name: count / (SHUFFLES + 1) for name, count in reached.items()}


def _dealt_cost(costs: _Values, trial: FrozenTrial) -> float:
    return float(costs[trial.number])


def _ped_anova(study: optuna.Study, target: Callable[[FrozenTrial], float] | None = None) -> dict[str, float]:
    several, single = _varying(study.get_trials(deepcopy=False))
    # Here, for with it comes scikit-learn, which a trial's process does not need.
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        # Of parameters that one trial alone has, of trials that are all equal, and of the meaning of a target.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST),
            params=several,
            target=target,
            normalize=False,
        )
    return found | dict.fromkeys(single, 0.0)


def _study(trials: Sequence[FirstRungTrial], sign: float, metrics: Sequence[str]) -> optuna.Study:
    """All trials as completed ones, in an in-memory study.

    The direction is the study's, and no target is given: with one, PED-ANOVA takes the smallest values for the best.
    """
    direction = StudyDirection.MAXIMIZE if sign > 0 else StudyDirection.MINIMIZE
    verbosity = optuna.logging.get_verbosity()
    # Its notice of a new study would stand among the results.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction=direction)
    finally:
        optuna.logging.set_verbosity(verbosity)
    for trial in trials:
        parameters, distributions = _with_realised_subset(trial, metrics)
        try:
            study.add_trial(create_trial(value=trial.value, params=parameters, distributions=distributions))
        except ValueError as error:
            raise InputError(
                f"trial {trial.number} has a parameter outside its distribution ({reason(error)}); leave the trial out"
            ) from error
    return study


def _metric_importance(
    metric: str, share: float, by_chance: float, trials: Sequence[FirstRungTrial], sign: float
) -> MetricImportance:
    values = {
        having: np.array([sign * trial.value for trial in trials if (metric in trial.metrics) is having])
        for having in (True, False)
    }
    with_it, without = values[True], values[False]
    return MetricImportance(
        name=metric,
        share=share,
        by_chance=by_chance,
        effect=float(with_it.mean() - without.mean()) if len(with_it) and len(without) else None,
        interval=_welch_interval(with_it, without),
        trials_with=len(with_it),
        trials_without=len(without),
    )


def _welch_interval(first: _Values, second: _Values) -> tuple[float, float] | None:
    if min(len(first), len(second)) < 2 or not (np.ptp(first) or np.ptp(second)):
        return None
    # SciPy takes most of a second to import, which whoever does not ask for importances would pay.
    from scipy.stats import ttest_ind

    low, high = ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
    return float(low), float(high)
