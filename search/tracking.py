"""The MLflow store, written by the driver alone: one run a search, one below it a trial."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.tracking import MlflowClient
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from ..models.errors import InputError, reason
from .places import sqlite_file

PARENT_TAG = "mlflow.parentRunId"
NAME_TAG = "mlflow.runName"


@dataclass(frozen=True)
class EpochMetrics:
    """Figures of an epoch.

    Attributes:
        number: of the epoch.
        metrics: by their MLflow names.
        milliseconds: since 1970, when they came.
    """

    number: int
    metrics: Mapping[str, float]
    milliseconds: int


def connect(uri: str, create: bool) -> MlflowClient:
    """A client on the store, after one real call to it (`/health` would answer even where the API refuses).

    Args:
        uri: of the store; a sqlite path must be absolute.
        create: whether a missing sqlite file may be made.

    Raises:
        InputError: the store is not there, or refuses.
    """
    file = sqlite_file(uri)
    if file is not None and not create and not file.is_file():
        raise InputError(f"there is no tracking store {file}; run a search first, or name the store by --tracking")
    if file is not None and create:
        file.parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    try:
        with _alone(file):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except UnsupportedModelRegistryStoreURIException as error:
        raise InputError(
            f"the tracking store {uri} is of no kind that MLflow knows; name a server as http://HOST:PORT, or a "
            "database as sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from error
    except Exception as error:
        # Opening a store raises what lies below it, too: SQLAlchemy's errors, Alembic's, those of the network.
        if "error code 403" in str(error):
            host = urlsplit(uri).netloc
            names = f"{host.partition(':')[0]} and {host}"
            raise InputError(
                f"the tracking store {uri} answers, but refuses (403): sign in by MLFLOW_TRACKING_USERNAME and "
                f"MLFLOW_TRACKING_PASSWORD, or start it with --allowed-hosts that have {names}"
            ) from error
        raise InputError(
            f"the tracking store {uri} does not answer ({reason(error)}); start it or name another"
        ) from error
    return client


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """One process of this machine at a time opens a sqlite store: two that migrate a fresh one break each other."""
    if file is None:
        yield
        return
    name = hashlib.sha256(str(file).encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"hintsearch-{os.getuid()}-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_name_is_free(client: MlflowClient, experiment: str, search: str) -> None:
    """A new search must not take over the runs of another one of its name, from another folder or machine.

    Raises:
        InputError: the store has a search of that name, or the study's experiment is deleted.
    """
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return
    if known.lifecycle_stage != "active":
        raise InputError(
            f"the MLflow experiment {experiment!r} is deleted; restore it (mlflow experiments restore -x "
            f"{known.experiment_id}), or give the study another name"
        )
    if client.search_runs([known.experiment_id], f"tags.search = '{search}'", max_results=1):
        raise InputError(f"the tracking store has a search {search!r} already; choose another --name")


class TrackedSearch:
    """The runs of one search in the store.

    Args:
        client: on the store.
        experiment: name of the experiment, the study's name.
        search: name of the search.
        parent_run_id: of the parent run if it is known already.
    """

    def __init__(self, client: MlflowClient, experiment: str, search: str, parent_run_id: str | None) -> None:
        self.client = client
        self.name = search
        self._experiment_id = _experiment_id(client, experiment)
        self.parent_run_id = parent_run_id or self._find_parent(search) or self._create_parent(search)

    def add_documents(self, documents: Mapping[str, str | dict[str, Any]]) -> None:
        """Logs texts and JSON documents to the parent run, by their paths there."""
        for path, content in documents.items():
            if isinstance(content, str):
                self.client.log_text(self.parent_run_id, content, path)
            else:
                self.client.log_dict(self.parent_run_id, content, path)

    def add_file(self, file: Path, folder: str) -> None:
        """Logs a file to the parent run, below `folder` there."""
        self.client.log_artifact(self.parent_run_id, str(file), folder or None)

    def tag_parent(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the parent run."""
        self.tag(self.parent_run_id, tags)

    def find_trial(self, number: int) -> str | None:
        """The run of a trial, looked up by parent and number before one is created."""
        runs = self.client.search_runs(
            [self._experiment_id], f"tags.`{PARENT_TAG}` = '{self.parent_run_id}' and tags.trial = '{number}'"
        )
        return str(runs[0].info.run_id) if runs else None

    def create_trial(self, number: int, tags: Mapping[str, str]) -> str:
        """A new run below the parent."""
        run = self.client.create_run(
            self._experiment_id,
            tags={PARENT_TAG: self.parent_run_id, NAME_TAG: f"trial-{number:03d}", "trial": str(number), **tags},
        )
        return str(run.info.run_id)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """A run's parameters; logging the same ones again changes nothing."""
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])

    def log_document(self, run_id: str, path: str, content: dict[str, Any]) -> None:
        """A JSON artifact of a run."""
        self.client.log_dict(run_id, content, path)

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """A text artifact of a run."""
        self.client.log_text(run_id, text, path)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a run."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_epochs(self, run_id: str, epochs: Sequence[EpochMetrics]) -> None:
        """Figures of some epochs, in as few requests as the store allows; each has whole epochs."""
        batch: list[Metric] = []
        for epoch in epochs:
            metrics = [Metric(name, value, epoch.milliseconds, epoch.number) for name, value in epoch.metrics.items()]
            if len(batch) + len(metrics) > MAX_METRICS_PER_BATCH:
                self.client.log_batch(run_id, metrics=batch)
                batch = []
            batch += metrics
        self.client.log_batch(run_id, metrics=batch)

    def logged_epochs(self, run_id: str, metric: str) -> set[int]:
        """The epochs of which a run has the metric."""
        return {int(entry.step) for entry in self.client.get_metric_history(run_id, metric)}

    def is_closed(self, run_id: str) -> bool:
        """Whether the run has ended for good."""
        return str(self.client.get_run(run_id).info.status) in ("FINISHED", "FAILED")

    def set_running(self, run_id: str) -> None:
        """Opens a run again that an interruption closed."""
        self.client.update_run(run_id, status="RUNNING")
        self.client.set_tag(run_id, "outcome", "running")

    def close(self, run_id: str, status: str, tags: Mapping[str, str]) -> None:
        """Ends a run with its outcome."""
        self.tag(run_id, tags)
        self.client.set_terminated(run_id, status)

    def _find_parent(self, search: str) -> str | None:
        runs = self.client.search_runs(
            [self._experiment_id], f"tags.search = '{search}'", run_view_type=ViewType.ACTIVE_ONLY
        )
        parents = [run for run in runs if PARENT_TAG not in run.data.tags]
        return str(parents[0].info.run_id) if parents else None

    def _create_parent(self, search: str) -> str:
        run = self.client.create_run(self._experiment_id, tags={NAME_TAG: search, "search": search})
        return str(run.info.run_id)


def _experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name, created if it is not there."""
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    file = sqlite_file(client.tracking_uri)
    # A relative default would put artifacts wherever the reader happens to be; a server decides for itself.
    location = (file.parent / "mlartifacts" / name).as_uri() if file else None
    return str(client.create_experiment(name, artifact_location=location))
