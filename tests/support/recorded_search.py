"""A search whose events are logged as a search logs them, and read back from the store."""

from collections.abc import Iterable
from pathlib import Path

from hintsearch.analysis.trials import SearchRecord, read_search
from hintsearch.distill.execution import Execution
from hintsearch.search.events import Event, Prepared
from hintsearch.search.journal import SearchLog
from hintsearch.search.mlflow_logger import MlflowLogger
from hintsearch.search.parent_run import search_document
from hintsearch.search.preparation import Preparation
from hintsearch.search.study import Study
from hintsearch.search.tracking import TrackedSearch
from mlflow.tracking import MlflowClient


def recorded_search(
    client: MlflowClient, name: str, study: Study, preparation: Preparation, folder: Path, events: Iterable[Event]
) -> SearchRecord:
    """Logs the events of a search to its runs, without training anything.

    Args:
        client: on the store.
        name: of the search, and of its experiment.
        study: what was searched.
        preparation: what the search stands on.
        folder: where its journal goes.
        events: of its trials.
    """
    objective = study.objective
    tracked = TrackedSearch(client, name, name, None)
    tracked.tag_parent({"objective": objective.metric, "direction": objective.direction})
    if objective.against:
        tracked.tag_parent({"against": objective.against})
    tracked.add_documents({"search.json": search_document(study, preparation, Execution())})
    log = SearchLog(folder / "journal.jsonl")
    logger = MlflowLogger(tracked, log)
    log.listen(logger)
    log.record(Prepared(preparation.teacher.sha256, str(preparation.teacher.path), 0.95))
    for event in events:
        log.record(event)
    assert logger.close(interrupted=False) == 0
    return read_search(client, name)
