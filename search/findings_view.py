"""Tables of what a search found: what each arm was given, what held on fresh seeds, trade-offs, importances."""

from collections.abc import Sequence

from rich.table import Table

from ..analysis.confirmation import ConfigurationSummary, Confirmation
from ..analysis.importance import Importances
from ..analysis.trials import SearchRecord
from ..analysis.verdict import describe
from .view import View

# So many of each kind are shown; the file has all.
MOST_SHOWN = 8


def show_findings(
    view: View, record: SearchRecord, importances: Importances | None, validation_images: int | None
) -> None:
    """The leaderboard and what each arm was given; of a search that has ended also what was found.

    Args:
        view: where to show it.
        record: the search.
        importances: of its hyperparameters, if they are known.
        validation_images: size of the split that decided; None: the search has not ended.
    """
    view.leaderboard(record)
    show_arms(view, record)
    if validation_images is None:
        return
    show_pareto(view, record)
    if importances is not None:
        show_importances(view, importances)
    confirmation = record.confirmation()
    if confirmation is not None:
        show_confirmation(view, record, confirmation)
    else:
        view.verdict(record, validation_images)


def show_arms(view: View, record: SearchRecord) -> None:
    """Trials and epochs that each arm received: a baseline that was given less is no baseline."""
    table = _table("What each arm was given", ("arm",), ("trials", "epochs", f"best {record.metric}"))
    for budget in record.arms():
        best = f"{budget.best.metrics[record.metric]:.4f}" if budget.best else ""
        name = f"{budget.arm} {budget.control}".strip()
        table.add_row(name, str(budget.trials), str(budget.epochs), best)
    view.console.print(table)


def show_confirmation(view: View, record: SearchRecord, confirmation: Confirmation) -> None:
    """Mean and spread of each confirmed configuration, the one test in words, and what is exported."""
    seeds = max(summary.n for summary in confirmation.summaries)
    table = _table(
        f"Confirmed with {seeds} fresh seeds",
        ("configuration",),
        ("trial", "seeds", f"{record.metric}, mean ± sd", "in the search"),
    )
    for summary in confirmation.summaries:
        searched = record.trial(summary.number).metrics[record.metric]
        table.add_row(
            summary.control or "search", str(summary.number), str(summary.n), _spread(summary), f"{searched:.4f}"
        )
    view.console.print(table)
    if confirmation.comparison is not None:
        view.say(describe(confirmation.comparison, record.metric))
        view.sizes(record.trial(confirmation.comparison.winner), record.trial(confirmation.comparison.control))
    else:
        view.say("No control was confirmed, so that nothing is said of whether the search was worth it.")
    exported = next((s for s in confirmation.summaries if s.number == confirmation.export), None)
    if exported is not None and exported.arm == "control":
        view.say(f"The control {exported.control} (trial {exported.number}) has the best mean: it is what is exported.")
    elif exported is not None and confirmation.comparison and exported.number != confirmation.comparison.winner:
        view.say(
            f"Trial {exported.number} has the best mean: it is what is exported. The search ranked trial "
            f"{confirmation.comparison.winner} first, and the test is of that one."
        )


def show_pareto(view: View, record: SearchRecord) -> None:
    """The completed search trials that none beats in objective and cost, the knee marked."""
    pareto = record.pareto()
    if pareto is None or not pareto.members:
        return
    table = _table(f"Pareto set of {record.metric} and {record.against}", (), ("trial", record.metric, record.against))
    table.add_column("")
    for number in pareto.members:
        metrics = record.trial(number).metrics
        knee = "knee" if number == pareto.knee else ""
        table.add_row(str(number), f"{metrics[record.metric]:.4f}", f"{metrics[record.against]:,.5g}", knee)
    view.console.print(table)


def show_importances(view: View, found: Importances) -> None:
    """What decided how good a trial was at the first rung."""
    if found.too_few:
        view.say(f"Importances: {found.trials} search trials reached the first rung, too few; it takes {found.needed}.")
        return
    table = _table(
        f"What decided {found.trials} search trials at the first rung (PED-ANOVA)",
        ("hyperparameter",),
        ("share", "by chance", "trials"),
    )
    for row in found.parameters[:MOST_SHOWN]:
        table.add_row(row.name, f"{row.share:.3f}", f"{row.by_chance:.2f}", str(row.trials))
    view.console.print(table)
    table = _table("Layer metrics in the subset", ("metric",), ("share", "by chance", "effect, 95 % interval", "with"))
    for metric in found.metrics[:MOST_SHOWN]:
        effect = "" if metric.effect is None else f"{metric.effect:+.4f}"
        interval = "" if metric.interval is None else f" ({metric.interval[0]:+.4f} .. {metric.interval[1]:+.4f})"
        total = metric.trials_with + metric.trials_without
        table.add_row(
            metric.name,
            f"{metric.share:.3f}",
            f"{metric.by_chance:.2f}",
            effect + interval,
            f"{metric.trials_with} of {total}",
        )
    view.console.print(table)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _spread(summary: ConfigurationSummary) -> str:
    if summary.mean is None:
        return ""
    return f"{summary.mean:.4f}" + ("" if summary.sd is None else f" ± {summary.sd:.4f}")
