"""The process of a trial dies: once, and as often as it is begun again."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from disturbances import HANGS_S, NUMBERS, DisturbedSearch, Undisturbed, reported, retried
from mlflow.tracking import MlflowClient
from processes import Ended, ended, wait_for
from search_records import (
    journaled_trials,
    missing_epochs,
    records,
    records_by_journal,
    repeated_events,
    statuses,
)

ONCE, ALWAYS = 4, 6
RETRIES = 2  # the default of budget.retries


@dataclass(frozen=True)
class Bereaved:
    """A search two of whose trials lost their processes.

    Attributes:
        search: where it lies.
        ended: how it ended.
        events: its journal.
    """

    search: DisturbedSearch
    ended: Ended
    events: list[dict]

    def of(self, kind: str, number: int) -> list[dict]:
        """The journal's events of a kind and a trial."""
        return [e for e in self.events if e["event"] == kind and e["number"] == number]


@pytest.fixture(scope="module")
def bereaved(new_search: Callable[..., DisturbedSearch]) -> Bereaved:
    search = new_search("bereaved")
    process = search.start()
    search.wait(process, reported(ONCE, 5))
    kill_trial(search)
    search.wait(process, reported(ALWAYS, 2))
    kill_trial(search)
    for attempt in range(1, RETRIES + 1):
        search.wait(process, retried(ALWAYS, attempt))
        kill_trial(search)
    how = ended(process, HANGS_S)
    return Bereaved(search, how, search.events())


def kill_trial(search: DisturbedSearch) -> None:
    """Kills the one process that trains, as soon as it is there, and waits until it is gone."""
    assert wait_for(lambda: len(search.trial_processes()) == 1, HANGS_S, every=0.01)
    (process,) = search.trial_processes()
    os.kill(process, signal.SIGKILL)
    assert wait_for(lambda: process not in search.trial_processes(), HANGS_S, every=0.01)


@pytest.fixture(scope="module")
def client(bereaved: Bereaved) -> MlflowClient:
    return MlflowClient(bereaved.search.store)


def test_a_search_goes_on_when_trials_lose_their_processes(bereaved: Bereaved) -> None:
    assert bereaved.ended.code == 0, bereaved.ended.err
    assert [e["number"] for e in bereaved.events if e["event"] == "suggestion"] == NUMBERS
    assert sorted(e["number"] for e in bereaved.events if e["event"] == "outcome") == NUMBERS


def test_standard_output_is_one_document_whatever_ray_has_to_say(bereaved: Bereaved) -> None:
    assert sorted(trial["number"] for trial in bereaved.ended.document()["trials"]) == NUMBERS
    assert "died" in bereaved.ended.err


def test_a_trial_that_lost_its_process_is_retried_and_the_journal_says_so(bereaved: Bereaved) -> None:
    (retry,) = bereaved.of("retry", ONCE)
    assert retry["attempt"] == 1
    assert "died" in retry["error"]


def test_a_retried_trial_goes_on_from_its_checkpoint_to_the_results_of_an_undisturbed_one(
    bereaved: Bereaved, undisturbed: Undisturbed
) -> None:
    ours, theirs = journaled_trials(bereaved.events), journaled_trials(undisturbed.events)
    assert {n: ours[n] for n in range(1, ALWAYS)} == {n: theirs[n] for n in range(1, ALWAYS)}
    assert len(bereaved.of("suggestion", ONCE)) == 1


def test_a_retried_trial_reports_no_epoch_twice(bereaved: Bereaved) -> None:
    assert repeated_events(bereaved.events) == []
    assert missing_epochs(bereaved.events) == {}


def test_a_trial_that_always_dies_fails_when_its_retries_are_used_up(bereaved: Bereaved) -> None:
    assert [retry["attempt"] for retry in bereaved.of("retry", ALWAYS)] == list(range(1, RETRIES + 1))
    (outcome,) = bereaved.of("outcome", ALWAYS)
    assert outcome["outcome"] == "failed"
    assert "died" in outcome["error"]


def test_the_run_of_a_trial_that_always_dies_says_why(bereaved: Bereaved, client: MlflowClient) -> None:
    run = client.get_run(records(client, "tiny", "bereaved").runs[ALWAYS])
    assert run.info.status == "FAILED"
    assert "died" in run.data.tags["error"]
    traceback = Path(client.download_artifacts(run.info.run_id, "traceback.txt")).read_text()
    assert "died" in traceback


def test_trap_14_each_trial_has_one_run_and_each_metric_once(bereaved: Bereaved, client: MlflowClient) -> None:
    assert records(client, "tiny", "bereaved") == records_by_journal(bereaved.events)
    assert statuses(client, "tiny") == {"FINISHED": len(NUMBERS), "FAILED": 1}
