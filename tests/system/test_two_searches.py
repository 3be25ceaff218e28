"""Two searches at once, of one folder and one Ray, on one sqlite store that neither has made yet.

One of them is resumed by mistake while it is running, from another terminal.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from disturbances import HANGS_S, NUMBERS, SMALL_STUDY, DisturbedSearch, Event, Undisturbed, reported
from mlflow.tracking import MlflowClient
from processes import Ended, ended
from ray_cluster import RayCluster
from search_records import (
    comparable,
    journaled_trials,
    missing_epochs,
    records,
    records_by_journal,
    repeated_events,
    statuses,
)

# Of tracking servers: sqlite has no use for them.
CREDENTIALS = {
    "MLFLOW_TRACKING_USERNAME": "eve",
    "MLFLOW_TRACKING_PASSWORD": "corr3ct-h0rse",
    "MLFLOW_TRACKING_TOKEN": "b4ttery",
}
MINIMISED = {**SMALL_STUDY, "objective": {"metric": "val_loss", "direction": "minimize"}}


@dataclass(frozen=True)
class Both:
    """Two searches of one experiment, with opposite directions.

    Attributes:
        searches: where they lie, by name.
        ended: how they ended.
        mistaken: how the resume of `up` ended that was made while it was running.
        meanwhile: the journal of `up` then.
    """

    searches: dict[str, DisturbedSearch]
    ended: dict[str, Ended]
    mistaken: Ended
    meanwhile: list[Event]

    def client(self) -> MlflowClient:
        """On their common store."""
        return MlflowClient(self.searches["up"].store)


@pytest.fixture(scope="module")
def both(new_search: Callable[..., DisturbedSearch], cluster: RayCluster) -> Both:
    up = new_search("up", cluster=cluster)
    searches = {"up": up, "down": new_search("down", up.folder, study=MINIMISED, cluster=cluster)}
    for search in searches.values():
        search.command_line.environment |= CREDENTIALS
    running = {name: search.start() for name, search in searches.items()}
    up.wait(running["up"], reported(1, 1))
    # It holds its place while it stands still, so that it cannot be over before the second one has looked.
    running["up"].send_signal(signal.SIGSTOP)
    mistaken = up.finish("--resume")
    meanwhile = up.events()
    running["up"].send_signal(signal.SIGCONT)
    return Both(searches, {name: ended(process, HANGS_S) for name, process in running.items()}, mistaken, meanwhile)


@pytest.mark.parametrize("name", ["up", "down"])
def test_trap_13_both_searches_finish_on_a_store_that_neither_had_made(both: Both, name: str) -> None:
    assert both.ended[name].code == 0, both.ended[name].err
    assert sorted(journaled_trials(both.searches[name].events())) == NUMBERS


def test_a_running_search_is_not_resumed_beside_itself(both: Both) -> None:
    assert both.mistaken.code == 2
    (line,) = both.mistaken.err.strip().splitlines()
    assert "up is running" in line


def test_the_running_search_is_not_disturbed(both: Both) -> None:
    assert journaled_trials(both.meanwhile)[1].outcome is None, "the resume came too late"
    events = both.searches["up"].events()
    assert repeated_events(events) == []
    assert missing_epochs(events) == {}


@pytest.mark.parametrize("name", ["up", "down"])
def test_trap_13_each_search_has_its_own_runs_in_the_common_store(both: Both, name: str) -> None:
    assert records(both.client(), "tiny", name) == records_by_journal(both.searches[name].events())


def test_trap_13_no_run_is_left_running_and_none_belongs_to_no_search(both: Both) -> None:
    assert statuses(both.client(), "tiny") == {"FINISHED": 2 * (len(NUMBERS) + 1)}


def test_trap_7_a_search_is_not_moved_by_one_of_the_other_direction(both: Both, undisturbed: Undisturbed) -> None:
    assert journaled_trials(both.searches["up"].events()) == journaled_trials(undisturbed.events)
    assert comparable(both.ended["up"]) == comparable(undisturbed.ended)


def test_trap_7_each_search_has_the_winner_of_its_own_direction(both: Both) -> None:
    for name, metric, best in (("up", "val_accuracy", max), ("down", "val_loss", min)):
        document = both.ended[name].document()
        ours = [trial for trial in document["trials"] if trial["outcome"] == "completed"]
        exported = yaml.safe_load(Path(document["hints"]).read_text())
        assert exported["evidence"]["metric"] == metric
        assert exported["trial"] == best(ours, key=lambda trial, metric=metric: trial["metrics"][metric])["number"]


def test_trap_9_no_credential_is_in_any_file_or_output_or_tag(both: Both, cluster: RayCluster) -> None:
    """MLflow's store, with its tags, is one of the files."""
    secrets = [cluster.environment["RAY_AUTH_TOKEN"], *list(CREDENTIALS.values())[1:]]
    files = [path for path in both.searches["up"].folder.rglob("*") if path.is_file()]
    assert {"journal.jsonl", "mlflow.db", "hints.yaml"} <= {path.name for path in files}
    for secret in secrets:
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert not any(secret in how.out + how.err for how in (*both.ended.values(), both.mistaken))
