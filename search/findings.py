"""What a search found beyond its trials: what mattered, and which configurations no other one beats."""

import json
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from ..analysis.importance import FirstRungTrial, Importances, importances
from ..analysis.pareto import ParetoSet
from ..analysis.trials import SearchRecord
from ..models.files import replacing
from .events import History
from .export import export_hints
from .study import Study
from .suggestions import chosen

IMPORTANCES_FILE = "importances.json"
# A folder of the search, and of its parent run.
PARETO = "pareto"


def search_importances(study: Study, history: History) -> Importances:
    """What decided how good the search's trials were at the first rung, whatever became of them later."""
    rung, metric = study.budget.rungs[0], study.objective.metric
    trials = [
        FirstRungTrial(
            trial.number,
            {name: chosen(name, trial.suggested.parameters) for name in trial.suggested.distributions},
            trial.suggested.distributions,
            tuple(trial.suggested.parameters["hints.metrics"].split(",")),
            trial.reports[rung].metrics[metric],
        )
        for _, trial in sorted(history.trials.items())
        if trial.suggested.arm == "search" and rung in trial.reports and metric in trial.reports[rung].metrics
    ]
    return importances(trials, study.objective.direction, study.space.hints.metrics)


def export_pareto(client: MlflowClient, record: SearchRecord, pareto: ParetoSet, folder: Path) -> list[Path]:
    """Writes a hint file of each member, and `pareto.json` which lists them with both objectives and marks the knee.

    Args:
        client: on the tracking store.
        record: the search.
        pareto: its set.
        folder: where the files go; made if it is not there.

    Returns:
        All files.
    """
    folder.mkdir(exist_ok=True)
    files = [folder / f"trial-{number}.yaml" for number in pareto.members]
    rows: list[dict[str, Any]] = []
    for number, file in zip(pareto.members, files, strict=True):
        export_hints(client, record, file, number)
        metrics = record.trial(number).metrics
        rows.append(
            {
                "trial": number,
                record.metric: metrics[record.metric],
                record.against: metrics[record.against],
                "knee": number == pareto.knee,
                "file": file.name,
            }
        )
    listed = folder / "pareto.json"
    directions = {record.metric: record.direction, record.against: "minimize"}
    with replacing(listed) as temporary:
        temporary.write_text(json.dumps({"directions": directions, "members": rows}, indent=2) + "\n")
    return [*files, listed]
