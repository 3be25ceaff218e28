"""Trials that two workers train together, one on each node of a cluster, by Ray Train."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from disturbances import HANGS_S, SMALL_STUDY, DisturbedSearch, Event, finished, reported
from mlflow.tracking import MlflowClient
from processes import Ended, Family, ended, wait_for
from ray_cluster import RayCluster, ray_cluster
from search_records import journaled_trials, missing_epochs, records, records_by_journal, repeated_events, statuses

WORKERS = 2
# What a trial that was stopped or killed may hold its workers for.
FREED_S = 30
CONTROL, SEARCHED = [1], [2, 3, 4]
STUDY = {
    **SMALL_STUDY,
    "recipe": {**SMALL_STUDY["recipe"], "batch_norm": "frozen", "lr": 0.02, "clip_norm": 1},
    "objective": {"metric": "val_loss", "direction": "minimize"},
    "controls": {"arms": ["no_distillation"], "trials": len(CONTROL)},
    # Their classifiers learn next to nothing, unlike the control arm's, so that each is stopped at the first rung.
    "space": {**SMALL_STUDY["space"], "weight": {"hint": {"low": 1e4, "high": 1e5}}},
    "budget": {**SMALL_STUDY["budget"], "trials": len(SEARCHED), "rungs": [2, 5], "reduction": 4},
    "resources": {"cpus_per_trial": WORKERS, "workers_per_trial": WORKERS, "concurrent_trials": 1, "precision": "fp32"},
}


@dataclass(frozen=True)
class Shared:
    """A search whose trials have two workers each.

    Attributes:
        search: where it lies.
        places: nodes that had a worker of the first trial.
        in_results: folders in the search's own, which all nodes see, where the first trial's workers left checkpoints.
        retried: the journal when a worker of the first trial had been killed and the trial begun again.
        pruned_freed: whether the workers of a trial that was stopped at a rung were gone in time.
        stopped: how it ended when Ctrl-C was pressed.
        freed: whether the workers were gone in time after that.
        last: how it came to its end.
        left: worker processes that were left then.
        events: the whole journal.
    """

    search: DisturbedSearch
    places: list[bool]
    in_results: list[str]
    retried: list[Event]
    pruned_freed: bool
    stopped: Ended
    freed: bool
    last: Ended
    left: list[int]
    events: list[Event]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(dashboard=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def second(cluster: RayCluster) -> Family:
    return cluster.add()


def workers_of(*nodes: Family) -> list[int]:
    """The processes that train."""
    return [process for node in nodes for process, command in node.commands().items() if "RayTrainWorker" in command]


@pytest.fixture(scope="module")
def shared(new_search: Callable[..., DisturbedSearch], cluster: RayCluster, second: Family) -> Shared:
    search = new_search("shared", study=STUDY, cluster=cluster)
    process = search.start()
    search.wait(process, reported(1, 3))
    places = [bool(workers_of(node)) for node in (cluster.head, second)]
    in_results = [path.name for path in (search.results / "workers").iterdir()]
    os.kill(workers_of(second)[0], signal.SIGKILL)
    search.wait(process, lambda events: any(e["event"] == "retry" for e in events))
    retried = search.events()
    search.wait(process, reported(2, 1))
    of_pruned = workers_of(cluster.head, second)
    search.wait(process, finished(2))
    pruned_freed = wait_for(lambda: not set(of_pruned) & set(workers_of(cluster.head, second)), FREED_S)
    search.wait(process, reported(3, 1))
    os.killpg(process.pid, signal.SIGINT)
    stopped = ended(process, HANGS_S)
    freed = wait_for(lambda: not workers_of(cluster.head, second), FREED_S)
    last = search.finish("--resume")
    wait_for(lambda: not workers_of(cluster.head, second), FREED_S)
    left = workers_of(cluster.head, second)
    return Shared(search, places, in_results, retried, pruned_freed, stopped, freed, last, left, search.events())


def test_a_trial_has_a_worker_on_each_node(shared: Shared) -> None:
    assert shared.places == [True, True]


def test_trap_23_checkpoints_go_from_worker_to_trial_where_all_nodes_see_them(shared: Shared) -> None:
    (of_first,) = shared.in_results
    assert of_first.startswith("1-")
    assert not (shared.search.results / "workers").exists()


def test_a_trial_whose_worker_died_goes_on_from_its_checkpoint(shared: Shared) -> None:
    (retry,) = [e for e in shared.retried if e["event"] == "retry"]
    assert (retry["number"], retry["attempt"]) == (1, 1)
    assert [e["epoch"] for e in shared.retried if e["event"] == "checkpoint" and e["number"] == 1][:2] == [1, 2]


def test_a_trial_that_is_stopped_at_a_rung_frees_its_workers(shared: Shared) -> None:
    assert shared.pruned_freed


def test_ctrl_c_ends_the_search_and_frees_its_workers(shared: Shared) -> None:
    assert shared.stopped.code == 3, shared.stopped.err
    assert "Traceback" not in shared.stopped.err
    assert shared.freed


def test_every_trial_comes_to_its_end_and_leaves_no_worker(shared: Shared) -> None:
    assert shared.last.code == 0, shared.last.err
    outcomes = {e["number"]: e["outcome"] for e in shared.events if e["event"] == "outcome"}
    assert sorted(outcomes) == CONTROL + SEARCHED
    assert outcomes == {number: "completed" if number in CONTROL else "pruned" for number in CONTROL + SEARCHED}
    assert shared.left == []


def test_no_epoch_is_reported_twice_and_none_is_missing(shared: Shared) -> None:
    assert [e["number"] for e in shared.events if e["event"] == "suggestion"] == CONTROL + SEARCHED
    assert repeated_events(shared.events) == []
    assert missing_epochs(shared.events) == {}


def test_each_trial_has_one_run_and_each_metric_once(shared: Shared) -> None:
    client = MlflowClient(shared.search.store)
    assert records(client, "tiny", "shared") == records_by_journal(shared.events)
    assert statuses(client, "tiny") == {"FINISHED": len(CONTROL + SEARCHED) + 1}


def test_trials_have_the_results_of_one_worker(shared: Shared, new_search: Callable[..., DisturbedSearch]) -> None:
    """Batch norms are frozen, so that nothing but rounding tells them apart."""
    alone = new_search("alone", study={**STUDY, "resources": {"concurrent_trials": 1, "precision": "fp32"}})
    assert alone.finish().code == 0
    ours, theirs = journaled_trials(shared.events), journaled_trials(alone.events())
    for number in (1, 2):
        assert ours[number].suggestion == theirs[number].suggestion
        for epoch in set(ours[number].reports) & set(theirs[number].reports):
            assert ours[number].reports[epoch] == pytest.approx(theirs[number].reports[epoch], abs=0.02)
