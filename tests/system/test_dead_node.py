"""A whole node dies in the middle of a trial that runs there: a real cluster of two, all processes of one killed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from disturbances import (
    CONTROLS,
    HANGS_S,
    NUMBERS,
    RUNGS,
    SMALL_STUDY,
    DisturbedSearch,
    Event,
    Undisturbed,
    trial_processes,
)
from mlflow.tracking import MlflowClient
from processes import Ended, Family, ended
from ray_cluster import RayCluster, ray_cluster
from search_records import (
    journaled_trials,
    missing_epochs,
    records,
    records_by_journal,
    repeated_events,
    statuses,
    wrong_decisions,
)

STUDY = {**SMALL_STUDY, "resources": {"concurrent_trials": 2}}


@dataclass(frozen=True)
class Orphaned:
    """A search on two nodes one of which died.

    Attributes:
        search: where it lies.
        ended: how it ended.
        before: the journal when the node died.
        events: the journal at the end.
    """

    search: DisturbedSearch
    ended: Ended
    before: list[Event]
    events: list[Event]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def second(cluster: RayCluster) -> Family:
    return cluster.add()


@pytest.fixture(scope="module")
def orphaned(new_search: Callable[..., DisturbedSearch], cluster: RayCluster, second: Family) -> Orphaned:
    search = new_search("orphaned", study=STUDY, cluster=cluster)
    process = search.start()

    def both_train(events: list[Event]) -> bool:
        """Whether two trials are in their middle, one on each node."""
        trials = journaled_trials(events)
        amid = [n for n, trial in trials.items() if trial.outcome is None and 1 <= max(trial.reports, default=0) <= 6]
        return len(amid) == 2 and all(trial_processes(node) for node in (cluster.head, second))

    before = search.wait(process, both_train)
    second.kill()
    how = ended(process, HANGS_S)
    return Orphaned(search, how, before, search.events())


def test_a_search_outlives_a_node(orphaned: Orphaned) -> None:
    assert orphaned.ended.code == 0, orphaned.ended.err
    assert sorted(e["number"] for e in orphaned.events if e["event"] == "outcome") == NUMBERS
    assert {e["outcome"] for e in orphaned.events if e["event"] == "outcome"} <= {"completed", "pruned"}


def test_the_trial_of_a_dead_node_and_no_other_is_retried(orphaned: Orphaned) -> None:
    (retry,) = [e for e in orphaned.events if e["event"] == "retry"]
    over = {e["number"] for e in orphaned.before if e["event"] == "outcome"}
    begun = {e["number"] for e in orphaned.before if e["event"] == "suggestion"}
    assert retry["number"] in begun - over


def test_no_number_is_suggested_twice_and_no_epoch_reported_twice(orphaned: Orphaned) -> None:
    assert [e["number"] for e in orphaned.events if e["event"] == "suggestion"] == NUMBERS
    assert repeated_events(orphaned.events) == []
    assert missing_epochs(orphaned.events) == {}


def test_trap_3_each_decision_is_by_the_rungs_as_they_were(orphaned: Orphaned) -> None:
    reduction = STUDY["budget"]["reduction"]
    assert [e for e in orphaned.events if e["event"] == "report" and e["decision"]], "no rung was reached"
    assert wrong_decisions(orphaned.events, RUNGS, reduction, "val_accuracy") == []


def test_trials_that_do_not_depend_on_others_have_the_results_of_an_undisturbed_search(
    orphaned: Orphaned, undisturbed: Undisturbed
) -> None:
    ours, theirs = journaled_trials(orphaned.events), journaled_trials(undisturbed.events)
    # Controls, then random suggestions; from there on TPE reads what else has ended by then.
    for number in range(1, CONTROLS + STUDY["budget"]["startup_trials"] + 1):
        assert ours[number].suggestion == theirs[number].suggestion
        common = set(ours[number].reports) & set(theirs[number].reports)
        assert RUNGS[0] in common
        assert {epoch: ours[number].reports[epoch] for epoch in common} == {
            epoch: theirs[number].reports[epoch] for epoch in common
        }


def test_trap_14_each_trial_has_one_run_and_each_metric_once(orphaned: Orphaned) -> None:
    client = MlflowClient(orphaned.search.store)
    assert records(client, "tiny", "orphaned") == records_by_journal(orphaned.events)
    assert statuses(client, "tiny") == {"FINISHED": len(NUMBERS) + 1}
