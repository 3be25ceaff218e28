"""The MLflow server dies by SIGKILL: in the middle, before a Ctrl-C, before the end.

On a Ray that was there before and stays, as a cluster's: each leg comes to it as a driver of its own.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from disturbances import HANGS_S, NUMBERS, DisturbedSearch, Leg, Undisturbed, finished, reported, suggested
from processes import Ended, ended
from ray_cluster import RayCluster
from search_records import (
    Records,
    comparable,
    journaled_trials,
    missing_epochs,
    records,
    records_by_journal,
    repeated_events,
    statuses,
)
from tracking_server import TrackingServer

ADDED = len(NUMBERS) + 1


@dataclass(frozen=True)
class Untracked:
    """A search whose server died three times.

    Attributes:
        in_the_middle: the first leg: the server was away for two trials and more.
        events: the journal after it.
        logged: what the server then had.
        runs: statuses of the runs then.
        stopped: the second leg, with one more trial: the server died, then Ctrl-C was pressed.
        unsent: the third leg: the server died before the end.
        last: the fourth, undisturbed.
        all_events: the whole journal.
        all_logged: what the server has in the end.
        all_runs: statuses of the runs then.
    """

    in_the_middle: Ended
    events: list[dict]
    logged: Records
    runs: dict[str, int]
    stopped: Leg
    unsent: Leg
    last: Ended
    all_events: list[dict]
    all_logged: Records
    all_runs: dict[str, int]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def untracked(new_search: Callable[..., DisturbedSearch], server: TrackingServer, cluster: RayCluster) -> Untracked:
    search = new_search("untracked", options=["--tracking", server.uri], cluster=cluster)
    process = search.start()
    search.wait(process, reported(2, 2))
    server.kill()
    search.wait(process, finished(4))
    server.start()
    in_the_middle = ended(process, HANGS_S)
    assert in_the_middle.code == 0, in_the_middle.err
    events, logged, runs = search.events(), records(server.client, "tiny", "untracked"), statuses(server.client, "tiny")

    def stop_without_server(process: subprocess.Popen[str]) -> None:
        server.kill()
        os.killpg(process.pid, signal.SIGINT)

    stopped = search.disturb(suggested(ADDED), stop_without_server, "--extend", "1")
    server.start()
    unsent = search.disturb(reported(ADDED, 2), lambda _: server.kill(), "--resume")
    server.start()
    last = search.finish("--resume")
    all_logged, all_runs = records(server.client, "tiny", "untracked"), statuses(server.client, "tiny")
    return Untracked(in_the_middle, events, logged, runs, stopped, unsent, last, search.events(), all_logged, all_runs)


def test_trap_14_a_search_goes_on_without_its_server_to_the_results_of_an_undisturbed_one(
    untracked: Untracked, undisturbed: Undisturbed
) -> None:
    assert journaled_trials(untracked.events) == journaled_trials(undisturbed.events)
    assert comparable(untracked.in_the_middle) == comparable(undisturbed.ended)


def test_trap_14_every_metric_arrives_once_when_the_server_is_back(untracked: Untracked) -> None:
    assert untracked.logged == records_by_journal(untracked.events)


def test_trap_14_no_run_is_left_running_when_the_server_is_back(untracked: Untracked) -> None:
    assert untracked.runs == {"FINISHED": len(NUMBERS) + 1}


@pytest.mark.parametrize("leg", ["stopped", "unsent"])
def test_trap_14_a_search_that_ends_without_its_server_exits_3_and_says_how_to_send_the_rest(
    untracked: Untracked, cluster: RayCluster, leg: str
) -> None:
    ended = getattr(untracked, leg).ended
    assert ended.code == 3, ended.err
    assert f"search untracked.yaml --address {cluster.address} --name untracked --resume" in ended.err
    assert "none is lost" in ended.err
    assert "Traceback" not in ended.err


def test_trap_14_a_search_without_its_server_ends_all_the_same(untracked: Untracked) -> None:
    assert finished(ADDED)(untracked.unsent.after)
    assert not finished(ADDED)(untracked.stopped.after)


def test_trap_14_a_resume_sends_what_is_missing_and_nothing_twice(untracked: Untracked) -> None:
    assert untracked.last.code == 0, untracked.last.err
    assert untracked.all_logged == records_by_journal(untracked.all_events)
    assert untracked.all_runs == {"FINISHED": ADDED + 1}


def test_trap_14_a_resume_that_only_sends_runs_no_trial(untracked: Untracked) -> None:
    added = untracked.all_events[len(untracked.unsent.after) :]
    assert not [e for e in added if e["event"] in ("suggestion", "report", "checkpoint", "outcome")]
    assert repeated_events(untracked.all_events) == []
    assert missing_epochs(untracked.all_events) == {}
