"""Whether a search beat its controls by more than noise: configurations repeated with fresh seeds, and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .clustering import TIE_DECIMALS
from .direction import check_finite, sign_of

SeedPair = tuple[int, int]
Verdict = Literal["better", "not_distinguishable", "worse"]

CONFIDENCE = 0.95
# Differences spread by less than this part of the values' size are all the same: arithmetic alone makes them differ.
ROUNDING = 1e-9


@dataclass(frozen=True)
class ConfirmedConfiguration:
    """A configuration of the search phase that the confirm phase repeated.

    Attributes:
        number: of the trial of the search phase that it comes from.
        arm: search or control.
        control: name of the control arm, or empty.
        searched: the objective at full budget in the search phase, which it was chosen by.
        values: the objective of each repetition that completed, by (data_seed, init_seed).
    """

    number: int
    arm: Literal["search", "control"]
    control: str
    searched: float
    values: Mapping[SeedPair, float]


@dataclass(frozen=True)
class ConfigurationSummary:
    """The repetitions of one configuration.

    Attributes:
        number: of its trial of the search phase.
        arm: search or control.
        control: name of the control arm, or empty.
        mean: of the objective; None without repetitions.
        sd: sample standard deviation (ddof 1); None for fewer than 2 repetitions.
        n: repetitions that completed.
    """

    number: int
    arm: Literal["search", "control"]
    control: str
    mean: float | None
    sd: float | None
    n: int


@dataclass(frozen=True)
class PairedComparison:
    """The one test of a search: its winner against its best control, seed pair by seed pair.

    Differences are winner − control for an objective to maximize, control − winner for one to minimize: positive is
    better.

    Attributes:
        winner: number of the search's trial.
        control: number of the control's trial.
        control_name: name of the control arm.
        differences: in the order of the seed pairs.
        n: number of seed pairs that both have.
        left_out: seed pairs that only one of them has, because a trial of the other failed.
        mean: of the differences; None for n = 0.
        sd: sample standard deviation (ddof 1) of the differences; None for n < 2.
        interval: two-sided 95 % interval of the mean by Student's t; None for n < 2, or if all differences are equal.
        p_value: of the two-sided paired t-test; None where there is no interval.
        effect_size: Cohen's d_z = mean / sd with Hedges' correction, see `hedges_correction`; None for n < 3, where
            the correction has no value, and where there is no interval.
        verdict: whether the interval lies above, across or below 0; not_distinguishable where there is none.
    """

    winner: int
    control: int
    control_name: str
    differences: tuple[float, ...]
    n: int
    left_out: int
    mean: float | None
    sd: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    effect_size: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Confirmation:
    """What the confirm phase found.

    Attributes:
        summaries: of each configuration, best mean first.
        comparison: the pre-stated test; None if no control, or nothing of the search, was confirmed.
        export: number of the trial to export; None if nothing was repeated.
    """

    summaries: tuple[ConfigurationSummary, ...]
    comparison: PairedComparison | None
    export: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)


def confirm(configurations: Sequence[ConfirmedConfiguration], direction: str) -> Confirmation:
    """Compares, summarises and chooses.

    Args:
        configurations: all that were confirmed.
        direction: maximize or minimize.

    Raises:
        InputError: a value that is not finite, or an unknown direction.
    """
    sign = sign_of(direction)
    tested = pre_stated(configurations, direction)
    chosen = choose_export(configurations, direction)
    summaries = sorted(map(summarise, configurations), key=lambda s: (*_order(s.mean, sign), s.number))
    return Confirmation(
        summaries=tuple(summaries),
        comparison=compare(*tested, direction) if tested else None,
        export=chosen.number if chosen else None,
    )


def pre_stated(
    configurations: Sequence[ConfirmedConfiguration], direction: str
) -> tuple[ConfirmedConfiguration, ConfirmedConfiguration] | None:
    """The search's best configuration and its best control, by their values in the search phase alone.

    Both are fixed before any confirm seed is run. Had the repetitions chosen the winner, the best of several noisy
    means would be tested, and would look better than it is.

    Returns:
        Winner and control, the earlier trial on a tie; None if one of them is missing.

    Raises:
        InputError: a value that is not finite, or an unknown direction.
    """
    sign = sign_of(direction)
    for configuration in configurations:
        check_finite(f"trial {configuration.number}", configuration.searched)
    ordered = sorted(configurations, key=lambda c: (-sign * c.searched, c.number))
    winner = next((c for c in ordered if c.arm == "search"), None)
    control = next((c for c in ordered if c.arm == "control"), None)
    return (winner, control) if winner and control else None


def compare(winner: ConfirmedConfiguration, control: ConfirmedConfiguration, direction: str) -> PairedComparison:
    """The paired t-test of two configurations over the seed pairs that both have.

    If all differences are equal there is no spread to hold the mean against. That happens where few images are
    counted, and says nothing of the next seed: there is no interval, and no verdict but not_distinguishable.

    Raises:
        InputError: a value that is not finite, or an unknown direction.
    """
    sign = sign_of(direction)
    for configuration in (winner, control):
        _check_values(configuration)
    common = sorted(set(winner.values) & set(control.values))
    ours, theirs = (np.array([c.values[pair] for pair in common]) for c in (winner, control))
    differences = sign * (ours - theirs)
    n = len(common)
    size = float(np.abs([ours, theirs]).max(initial=0.0))
    interval = p_value = effect = None
    mean = float(differences.mean()) if n else None
    sd = float(differences.std(ddof=1)) if n >= 2 else None
    if mean is not None and sd is not None and float(np.ptp(differences)) > ROUNDING * size:
        interval, p_value = _t_test(differences)
        effect = mean / sd * hedges_correction(n - 1) if n >= 3 else None
    return PairedComparison(
        winner=winner.number,
        control=control.number,
        control_name=control.control,
        differences=tuple(differences.tolist()),
        n=n,
        left_out=len(set(winner.values) ^ set(control.values)),
        mean=mean,
        sd=sd,
        interval=interval,
        p_value=p_value,
        effect_size=effect,
        verdict=_verdict(interval),
    )


def hedges_correction(freedom: int) -> float:
    """What Cohen's d is multiplied by, for a standard deviation of few values makes it too large.

    The exact factor of Hedges (1981, Journal of Educational Statistics 6, 107-128):
    Γ(m/2) / (√(m/2) Γ((m−1)/2)), about 1 − 3/(4m−1).

    Args:
        freedom: degrees of freedom m of the standard deviation, at least 2.
    """
    # SciPy takes most of a second to import, which every command of the command line would pay.
    from scipy.special import gammaln

    half = freedom / 2
    return float(np.exp(gammaln(half) - gammaln(half - 0.5)) / np.sqrt(half))


def summarise(configuration: ConfirmedConfiguration) -> ConfigurationSummary:
    """Mean and spread over the seeds.

    Raises:
        InputError: a value that is not finite.
    """
    _check_values(configuration)
    values = np.array(list(configuration.values.values()))
    return ConfigurationSummary(
        number=configuration.number,
        arm=configuration.arm,
        control=configuration.control,
        mean=float(values.mean()) if len(values) else None,
        sd=float(values.std(ddof=1)) if len(values) >= 2 else None,
        n=len(values),
    )


def choose_export(configurations: Sequence[ConfirmedConfiguration], direction: str) -> ConfirmedConfiguration | None:
    """The configuration with the best mean of its repetitions: of the search, unless a control's mean is better.

    A mean of few seeds is luck: a configuration with fewer than half as many repetitions as another one has, because
    its trials failed, is not chosen.

    Returns:
        On a tie the one of the search, then the earlier trial; None if nothing was repeated.

    Raises:
        InputError: a value that is not finite, or an unknown direction.
    """
    sign = sign_of(direction)
    most = max((len(c.values) for c in configurations), default=0)
    enough = [c for c in configurations if c.values and 2 * len(c.values) >= most]
    return min(
        enough,
        key=lambda c: (*_order(summarise(c).mean, sign), c.arm == "control", c.number),
        default=None,
    )


def _check_values(configuration: ConfirmedConfiguration) -> None:
    for pair, value in configuration.values.items():
        check_finite(f"the repetition of trial {configuration.number} with seeds {pair[0]}, {pair[1]}", value)


def _order(mean: float | None, sign: float) -> tuple[bool, float]:
    """Best first; those without repetitions last."""
    return mean is None, 0.0 if mean is None else round(-sign * mean, TIE_DECIMALS)


def _t_test(differences: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[tuple[float, float], float]:
    # SciPy takes most of a second to import, which every command of the command line would pay.
    from scipy.stats import ttest_1samp

    found = ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(CONFIDENCE)
    return (float(low), float(high)), float(found.pvalue)


def _verdict(interval: tuple[float, float] | None) -> Verdict:
    if interval is None:
        return "not_distinguishable"
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "not_distinguishable"
