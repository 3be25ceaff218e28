"""The driver is killed right after an event is journaled, when little of it can have taken effect."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from disturbances import NUMBERS, DisturbedSearch, Leg, Undisturbed, reported, suggested
from mlflow.tracking import MlflowClient
from processes import Ended
from search_records import (
    comparable,
    journaled_trials,
    missing_epochs,
    records,
    records_by_journal,
    repeated_events,
    statuses,
)

TORN = '{"event": "report", "number": 3, "epo'
LEGS = ("a suggestion", "a report", "the signal of a job manager")


@dataclass(frozen=True)
class Killed:
    """A search that was killed several times.

    Attributes:
        search: where it lies.
        legs: by what came right before the kill.
        last: how it came to its end.
        events: its whole journal.
    """

    search: DisturbedSearch
    legs: dict[str, Leg]
    last: Ended
    events: list[dict]


def stop_like_a_job_manager(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(new_search: Callable[..., DisturbedSearch]) -> Killed:
    search = new_search("killed")
    # A resume follows at once: Ray's processes of the killed driver may still be there.
    legs = [
        search.disturb(suggested(3), subprocess.Popen.kill),
        # The end of a rung: its decision is journaled, its checkpoint is not.
        search.disturb(reported(4, 3), subprocess.Popen.kill, "--resume"),
    ]
    with (search.results / "journal.jsonl").open("a") as journal:
        journal.write(TORN)
    legs.append(search.disturb(reported(5, 1), stop_like_a_job_manager, "--resume"))
    last = search.finish("--resume")
    assert last.code == 0, last.err
    return Killed(search, dict(zip(LEGS, legs, strict=True)), last, search.events())


@pytest.mark.parametrize("what", LEGS)
def test_trap_32_and_33_nothing_that_was_journaled_before_a_kill_is_lost(killed: Killed, what: str) -> None:
    leg = killed.legs[what]
    assert killed.events[: len(leg.before)] == leg.before
    assert not set(NUMBERS) <= {e["number"] for e in leg.after if e["event"] == "outcome"}, "the kill came too late"


@pytest.mark.parametrize("what", LEGS)
def test_trap_32_and_33_a_trial_that_was_finished_before_a_kill_does_not_run_again(killed: Killed, what: str) -> None:
    leg = killed.legs[what]
    over = {e["number"] for e in leg.before if e["event"] == "outcome"}
    later = killed.events[len(leg.before) :]
    assert over
    assert not over & {e["number"] for e in later if e["event"] in ("suggestion", "report", "checkpoint", "outcome")}


def test_trap_32_no_number_is_suggested_twice_and_no_epoch_reported_twice(killed: Killed) -> None:
    assert [e["number"] for e in killed.events if e["event"] == "suggestion"] == NUMBERS
    assert repeated_events(killed.events) == []
    assert missing_epochs(killed.events) == {}


def test_trap_3_and_32_trials_results_and_rungs_are_those_of_an_undisturbed_search(
    killed: Killed, undisturbed: Undisturbed
) -> None:
    assert journaled_trials(killed.events) == journaled_trials(undisturbed.events)
    assert comparable(killed.last) == comparable(undisturbed.ended)


def test_trap_14_each_trial_has_its_one_run_of_before_and_each_metric_once(killed: Killed) -> None:
    assert records(MlflowClient(killed.search.store), "tiny", "killed") == records_by_journal(killed.events)


def test_trap_14_no_run_is_left_running(killed: Killed) -> None:
    assert statuses(MlflowClient(killed.search.store), "tiny") == {"FINISHED": len(NUMBERS) + 1}


def test_trap_5_a_torn_last_line_is_cut_off_and_said(killed: Killed) -> None:
    assert f"was torn ({len(TORN)} bytes) and is cut off" in killed.legs["the signal of a job manager"].ended.err


def test_ray_s_processes_do_not_outlive_a_killed_driver(killed: Killed) -> None:
    # Ray's agents wait out a timeout of their own (70 s) if they were still starting; they hold no CPU or GPU.
    agents = "ray::DashboardAgent", "ray::RuntimeEnvAgent"
    assert killed.search.command_line.wait_until_gone(but=agents) == []
