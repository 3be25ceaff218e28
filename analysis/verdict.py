"""What the confirm phase found, in words."""

import math

from .confirmation import PairedComparison

# Objectives that are no share of something; all others are told in points, hundredths of their range.
OWN_UNITS = frozenset({"val_loss"})

NOT_SHOWN = "so that the search found better hint points is not shown"


def describe(comparison: PairedComparison, metric: str) -> str:
    """The result in one or two plain sentences.

    Args:
        comparison: of `compare`.
        metric: the objective. Accuracy, macro F1, precision and mean average precision are told in points (×100), the
            loss in its own unit.
    """
    winner, control = (
        f"Trial {comparison.winner}",
        f"the control {comparison.control_name} (trial {comparison.control})",
    )
    if comparison.mean is None:
        said = f"{winner} and {control} have no seeds in common, {NOT_SHOWN}."
    else:
        evidence = _evidence(comparison, comparison.mean, metric)
        said = {
            "better": f"{winner} is better than {control} by {evidence}: more than noise.",
            "not_distinguishable": f"{winner} {_order(comparison.mean)} {control} by {evidence}: "
            f"not more than noise, {NOT_SHOWN}.",
            "worse": f"{winner} is worse than {control} by {evidence}: more than noise, "
            "so the search's best lost to what needs no search.",
        }[comparison.verdict]
    return said + _left_out(comparison.left_out)


def describe_sizes(winner: float | None, control: float | None) -> str:
    """That a difference may be one of the students' sizes; empty if they are equal or unknown.

    Args:
        winner: parameters of its student.
        control: of the control's.
    """
    if winner is None or control is None or winner == control:
        return ""
    return (
        f"Their students differ in size ({winner:,.0f} and {control:,.0f} parameters), which may be why: to tell, "
        "compare with controls of the same size."
    )


def _order(mean: float) -> str:
    return "is better than" if mean > 0 else "is worse than" if mean < 0 else "differs from"


def _evidence(comparison: PairedComparison, mean: float, metric: str) -> str:
    """The amount, and in brackets how sure it is; where the winner is worse, of how much worse it is."""
    turn = -1.0 if mean < 0 else 1.0
    scale, unit, fewest = (turn, "", 3) if metric in OWN_UNITS else (100 * turn, " points", 1)
    ends = sorted(scale * end for end in comparison.interval or ())
    amount, *ends_told = _numbers([scale * mean, *ends], fewest)
    sureness = []
    if ends_told:
        sureness.append(f"95 % interval {' .. '.join(ends_told)}")
    elif comparison.n >= 2:
        sureness.append("the same for every seed, which leaves no spread to compare it with")
    if comparison.effect_size is not None:
        sureness.append(f"d {turn * comparison.effect_size:.1f}")
    sureness.append(f"n = {comparison.n} {'seed' if comparison.n == 1 else 'seeds'}")
    return f"{amount}{unit} ({', '.join(sureness)})"


def _numbers(values: list[float], fewest: int) -> list[str]:
    """All with as many decimals, at least `fewest`, as keep a small number from reading as 0."""
    most = fewest + 3
    needed = [math.ceil(-math.log10(abs(value))) for value in values if abs(value) >= 10**-most]
    decimals = max([fewest, *needed])
    # Adding 0 makes a zero of −0.
    return [f"{round(value, decimals) + 0.0:.{decimals}f}" for value in values]


def _left_out(count: int) -> str:
    if not count:
        return ""
    return f" {count} {'seed is' if count == 1 else 'seeds are'} left out, for a trial of one of the two failed."
