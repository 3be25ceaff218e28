"""A cluster of nodes with a GPU each, made up, that come and go: where layers are read and trials are placed."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import pytest
from disturbances import CONTROLS, HANGS_S, NUMBERS, SMALL_STUDY, DisturbedSearch, Event, Undisturbed
from mlflow.tracking import MlflowClient
from processes import Ended, Family, ended, wait_for
from ray_cluster import RayCluster, ray_cluster
from search_records import journaled_trials, missing_epochs, records, records_by_journal, repeated_events

NODE = {"cpus": 2, "gpus": 1}
# Two trials share a GPU; what they ask for decides where they run, but there is none to compute on.
STUDY = {**SMALL_STUDY, "resources": {"gpus_per_trial": 0.5, "device": "cpu"}}
# A trial's process, by the name that Ray gives it while it trains.
TRAINING = "ray::ImplicitFunc.train"


@dataclass(frozen=True)
class Placed:
    """A search on such nodes.

    Attributes:
        search: where it lies.
        read_by_each: whether each of two nodes had one actor that read layers; then one of them was killed.
        two_a_gpu: whether each of two nodes then had two trials; one of them was killed.
        ended: how the search ended.
        events: its journal.
    """

    search: DisturbedSearch
    read_by_each: bool
    two_a_gpu: bool
    ended: Ended
    events: list[Event]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(**NODE) as cluster:
        yield cluster


def layer_actors(node: Family) -> int:
    """How many read layers there, or get ready to."""
    return sum(command.startswith("ray::LayerWorker") for command in node.commands().values())


@pytest.fixture(scope="module")
def placed(
    new_search: Callable[..., DisturbedSearch], cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Placed:
    search = new_search("placed", study=STUDY, cluster=cluster)
    # A cache of its own: the layers are read here.
    search.command_line.environment["HINTSEARCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    second = cluster.add(**NODE)
    process = search.start()
    read_by_each = has_one_layer_actor_on_each(process, cluster.head, second)
    second.kill()
    third = cluster.add(**NODE)
    two_a_gpu = has_two_trials_on_each(process, cluster.head, third)
    third.kill()
    how = ended(process, HANGS_S)
    return Placed(search, read_by_each, two_a_gpu, how, search.events())


def has_one_layer_actor_on_each(process: "subprocess.Popen[str]", *nodes: Family) -> bool:
    """The driver stands still meanwhile: else the first actor might have read all before the second one is up."""
    begun = until(process, lambda: any(map(layer_actors, nodes)))
    process.send_signal(signal.SIGSTOP)
    try:
        return begun and wait_for(lambda: [layer_actors(node) for node in nodes] == [1] * len(nodes), HANGS_S)
    finally:
        process.send_signal(signal.SIGCONT)


def has_two_trials_on_each(process: "subprocess.Popen[str]", *nodes: Family) -> bool:
    """Trials that run stand still meanwhile: else they might be over before the last actor is up."""
    held: set[int] = set()

    def two_on_each() -> bool:
        training = [[p for p, command in node.commands().items() if command.startswith(TRAINING)] for node in nodes]
        for trial in set(chain(*training)) - held:
            os.kill(trial, signal.SIGSTOP)
            held.add(trial)
        return [len(trials) for trials in training] == [2] * len(nodes)

    try:
        return until(process, two_on_each)
    finally:
        for trial in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trial, signal.SIGCONT)


def until(process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> bool:
    """Whether the condition came true while the process lived."""
    return wait_for(lambda: process.poll() is not None or condition(), HANGS_S, every=0.02) and process.poll() is None


def test_layers_are_read_by_one_actor_a_gpu(placed: Placed) -> None:
    assert placed.read_by_each


def test_trap_20_trials_that_share_a_gpu_are_placed_two_on_each(placed: Placed) -> None:
    assert placed.two_a_gpu


def test_trap_10_a_search_outlives_nodes_that_die_in_both_phases(placed: Placed) -> None:
    assert placed.ended.code == 0, placed.ended.err
    assert sorted(e["number"] for e in placed.events if e["event"] == "outcome") == NUMBERS
    assert {e["outcome"] for e in placed.events if e["event"] == "outcome"} <= {"completed", "pruned"}
    assert repeated_events(placed.events) == []
    assert missing_epochs(placed.events) == {}


def test_trials_that_do_not_depend_on_others_have_the_results_of_an_undisturbed_search(
    placed: Placed, undisturbed: Undisturbed
) -> None:
    """The layers', too: a suggestion has the stability of its hint points in it."""
    ours, theirs = journaled_trials(placed.events), journaled_trials(undisturbed.events)
    for number in range(1, CONTROLS + STUDY["budget"]["startup_trials"] + 1):
        assert ours[number].suggestion == theirs[number].suggestion
        common = set(ours[number].reports) & set(theirs[number].reports)
        assert common
        assert {epoch: ours[number].reports[epoch] for epoch in common} == {
            epoch: theirs[number].reports[epoch] for epoch in common
        }


def test_trap_14_each_trial_has_one_run_and_each_metric_once(placed: Placed) -> None:
    client = MlflowClient(placed.search.store)
    assert records(client, "tiny", "placed") == records_by_journal(placed.events)
