"""The trials of a search, read back from MLflow: all that comparing and exporting needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from ..models.errors import InputError, nearest
from .confirmation import Confirmation, ConfirmedConfiguration, SeedPair, confirm
from .direction import sign_of
from .pareto import ParetoSet, pareto_set

PARENT_TAG = "mlflow.parentRunId"
SEARCH_FILE = "search.json"


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        number: of the trial.
        arm: search, control or confirm.
        control: name of the control arm, or empty.
        outcome: completed, pruned, failed, interrupted, or running.
        epochs: of the last report; 0 before the first.
        metrics: of the last report.
        parameters: by their MLflow names.
        run_id: of its MLflow run.
        error: why it failed, or empty.
        confirms: number of the trial that a confirm trial repeats; 0: it is none.
    """

    number: int
    arm: str
    control: str
    outcome: str
    epochs: int
    metrics: dict[str, float]
    parameters: dict[str, str]
    run_id: str
    error: str
    confirms: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class ArmBudget:
    """What an arm was given.

    Attributes:
        arm: search, control or confirm.
        control: name of the control arm, or empty.
        trials: how many.
        epochs: of all of them, those of stopped and failed trials included.
        best: its best completed trial, or None.
    """

    arm: str
    control: str
    trials: int
    epochs: int
    best: TrialRow | None


@dataclass(frozen=True)
class SearchRecord:
    """One search with all its trials.

    Attributes:
        name: of the search.
        parent_run_id: of its MLflow run.
        metric: the objective.
        direction: maximize or minimize.
        trials: best first: completed ones by the objective, then the others by epochs and objective.
        tags: of the parent run.
        against: the cost that the objective is weighed against, or empty.
    """

    name: str
    parent_run_id: str
    metric: str
    direction: str
    trials: tuple[TrialRow, ...]
    tags: dict[str, str]
    against: str = ""

    def best(self, arm: str) -> TrialRow | None:
        """The best completed trial of an arm."""
        return next((t for t in self.trials if t.arm == arm and t.outcome == "completed"), None)

    def winner(self) -> TrialRow | None:
        """What to export.

        What the confirm trials speak for: see `choose_export`. Without them the best of search and controls.
        """
        confirmed = self.confirmation()
        if confirmed is not None and confirmed.export is not None:
            return self.trial(confirmed.export)
        # Where they are equal, the search's.
        found = [row for row in (self.best("search"), self.best("control")) if row is not None]
        sign = sign_of(self.direction)
        return max(found, key=lambda row: sign * row.metrics[self.metric], default=None)

    def confirmation(self) -> Confirmation | None:
        """What the confirm trials say; None if there are none."""
        repeats: dict[int, dict[SeedPair, float]] = {}
        for row in self.trials:
            if row.confirms:
                values = repeats.setdefault(row.confirms, {})
                if row.outcome == "completed":
                    seeds = int(row.parameters["data_seed"]), int(row.parameters["init_seed"])
                    values[seeds] = row.metrics[self.metric]
        if not repeats:
            return None
        sources = [self.trial(number) for number in repeats]
        return confirm(
            [
                ConfirmedConfiguration(
                    row.number,
                    "control" if row.control else "search",
                    row.control,
                    row.metrics[self.metric],
                    repeats[row.number],
                )
                for row in sources
            ],
            self.direction,
        )

    def pareto(self) -> ParetoSet | None:
        """The completed search trials that none beats in objective and cost; None if no cost was weighed."""
        if not self.against:
            return None
        values = {
            row.number: (row.metrics[self.metric], row.metrics[self.against])
            for row in self.trials
            if row.arm == "search" and row.outcome == "completed"
        }
        return pareto_set(values, (self.direction, "minimize"))

    def arms(self) -> list[ArmBudget]:
        """What each arm was given, in the order of the arms' first trials."""
        rows = sorted(self.trials, key=lambda row: row.number)
        names = list(dict.fromkeys((row.arm, row.control) for row in rows))
        found = []
        for arm, control in names:
            own = [row for row in rows if (row.arm, row.control) == (arm, control)]
            best = next((row for row in self.trials if row in own and row.outcome == "completed"), None)
            found.append(ArmBudget(arm, control, len(own), sum(row.epochs for row in own), best))
        return found

    def trial(self, number: int) -> TrialRow:
        """The trial of that number.

        Raises:
            InputError: there is none.
        """
        found = next((trial for trial in self.trials if trial.number == number), None)
        if found is None:
            raise InputError(f"{self.name} has no trial {number}; choose 1..{len(self.trials)}")
        return found

    def frame(self) -> pd.DataFrame:
        """One row a trial; parameters and metrics are columns by their names."""
        rows = [
            {
                "trial": t.number,
                "arm": t.arm,
                "control": t.control,
                "outcome": t.outcome,
                "epochs": t.epochs,
                **t.metrics,
                **t.parameters,
            }
            for t in self.trials
        ]
        return pd.DataFrame(rows)


def read_search(client: MlflowClient, name: str) -> SearchRecord:
    """Reads a search back.

    Args:
        client: on the tracking store.
        name: of a search, or of a study: then its latest search.

    Raises:
        InputError: no such search in the store.
    """
    parent = _find_parent(client, name)
    search = parent.data.tags["search"]
    metric = parent.data.tags.get("objective", "val_accuracy")
    direction = parent.data.tags.get("direction", "maximize")
    sign = -1.0 if direction == "maximize" else 1.0
    rows = [_row(run) for run in _children(client, parent)]
    worst = float("inf")

    def order(row: TrialRow) -> tuple[bool, int, float, int]:
        value = sign * row.metrics[metric] if metric in row.metrics else worst
        return row.outcome != "completed", -row.epochs, value, row.number

    trials = tuple(sorted(rows, key=order))
    tags = dict(parent.data.tags)
    return SearchRecord(search, str(parent.info.run_id), metric, direction, trials, tags, tags.get("against", ""))


def _find_parent(client: MlflowClient, name: str) -> Run:
    experiments = [e.experiment_id for e in client.search_experiments()]
    if "'" not in name and experiments:
        named = client.search_runs(experiments, f"tags.search = '{name}'", order_by=["attributes.start_time DESC"])
        parents = [run for run in named if PARENT_TAG not in run.data.tags]
        if parents:
            return parents[0]
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        latest = client.search_runs(
            [experiment.experiment_id], "tags.search LIKE '%'", order_by=["attributes.start_time DESC"]
        )
        if latest:
            return latest[0]
    known = _search_names(client, experiments)
    mend = nearest(name, known) if known else "run a search first, or name its store by --tracking"
    raise InputError(f"the tracking store has no search {name!r}; {mend}")


def _search_names(client: MlflowClient, experiments: Sequence[str]) -> list[str]:
    if not experiments:
        return []
    runs = client.search_runs(list(experiments), "tags.search LIKE '%'", order_by=["attributes.start_time DESC"])
    return [str(run.data.tags["search"]) for run in runs[:10]]


def _children(client: MlflowClient, parent: Run) -> list[Run]:
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'", page_token=token
        )
        found.extend(page)
        token = page.token
        if not token:
            return found


def _row(run: Run) -> TrialRow:
    tags, metrics = run.data.tags, dict(run.data.metrics)
    return TrialRow(
        number=int(tags["trial"]),
        arm=tags.get("arm", ""),
        control=tags.get("control", ""),
        outcome=tags.get("outcome", "running"),
        epochs=int(metrics.pop("epoch", 0)),
        metrics=metrics,
        parameters=dict(run.data.params),
        run_id=str(run.info.run_id),
        error=tags.get("error", ""),
        confirms=int(tags.get("confirms", 0)),
    )
