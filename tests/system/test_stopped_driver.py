"""The driver has to stop right after an event is journaled: Ctrl-C, once and impatiently, SIGTERM, Ray's own end."""

import contextlib
import os
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

LEGS = (
    "Ray is killed before a trial has begun",
    "Ctrl-C after a suggestion",
    "SIGTERM after a report",
    "Ctrl-C again and again",
    "SIGTERM to every process after a suggestion",
    "Ray ends after a report",
)


@dataclass(frozen=True)
class Stopped:
    """A search that was stopped several times.

    Attributes:
        search: where it lies.
        legs: by how they were stopped.
        runs: statuses of all runs after each leg.
        last: how it came to its end.
        events: its whole journal.
    """

    search: DisturbedSearch
    legs: dict[str, Leg]
    runs: dict[str, dict[str, int]]
    last: Ended
    events: list[dict]


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    """A terminal's goes to the whole group."""
    os.killpg(process.pid, signal.SIGINT)


def press_ctrl_c_again_and_again(process: subprocess.Popen[str]) -> None:
    """As one does who sees nothing happen."""
    while process.poll() is None:
        press_ctrl_c(process)
        time.sleep(0.5)


def end_ray(search: DisturbedSearch) -> None:
    """The daemon that Ray has on each machine ends, and the driver is told nothing."""
    os.kill(process_of(search, "/raylet/raylet"), signal.SIGTERM)


def kill_ray(search: DisturbedSearch) -> None:
    """As for want of memory: after a minute without its control store Ray ends the driver, with nothing saved."""
    os.kill(process_of(search, "/gcs/gcs_server"), signal.SIGKILL)


def process_of(search: DisturbedSearch, program: str) -> int:
    """The one process that runs a program of Ray's."""
    (found,) = (number for number, command in search.command_line.commands().items() if program in command.split()[0])
    return found


def stop_the_job(search: DisturbedSearch) -> None:
    """As systemd and Slurm do it: Ray's own processes are told to stop, too, and some of them are the first to end."""
    end_ray(search)
    time.sleep(0.1)
    for process in search.command_line.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped(new_search: Callable[..., DisturbedSearch]) -> Stopped:
    search = new_search("stopped")
    moments = (
        (suggested(1), lambda _: kill_ray(search)),
        (suggested(3), press_ctrl_c),
        (reported(3, 2), subprocess.Popen.terminate),
        (reported(4, 4), press_ctrl_c_again_and_again),
        (suggested(6), lambda _: stop_the_job(search)),
        (reported(6, 1), lambda _: end_ray(search)),
    )
    legs, runs = {}, {}
    for name, (moment, action) in zip(LEGS, moments, strict=True):
        legs[name] = search.disturb(moment, action, *(["--resume"] if legs else []))
        runs[name] = statuses(MlflowClient(search.store), "tiny")
    last = search.finish("--resume")
    assert last.code == 0, last.err
    return Stopped(search, legs, runs, last, search.events())


@pytest.mark.parametrize("how", LEGS)
def test_trap_4_a_stop_exits_3_with_the_resume_command(stopped: Stopped, how: str) -> None:
    ended = stopped.legs[how].ended
    assert ended.code == 3, ended.err
    assert "search stopped.yaml --name stopped --resume" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("how", LEGS)
def test_trap_14_a_stop_leaves_no_run_running(stopped: Stopped, how: str) -> None:
    assert set(stopped.runs[how]) <= {"FINISHED", "KILLED"}
    assert stopped.runs[how]["KILLED"] >= 1


@pytest.mark.parametrize("how", LEGS)
def test_trap_4_a_trial_that_was_finished_before_a_stop_does_not_run_again(stopped: Stopped, how: str) -> None:
    leg = stopped.legs[how]
    over = {e["number"] for e in leg.after if e["event"] == "outcome"}
    later = stopped.events[len(leg.after) :]
    assert len(over) < len(NUMBERS), "the stop came too late"
    assert stopped.events[: len(leg.after)] == leg.after
    assert not over & {e["number"] for e in later if e["event"] in ("suggestion", "report", "checkpoint", "outcome")}


def test_trap_4_no_number_is_suggested_twice_and_no_epoch_reported_twice(stopped: Stopped) -> None:
    assert [e["number"] for e in stopped.events if e["event"] == "suggestion"] == NUMBERS
    assert repeated_events(stopped.events) == []
    assert missing_epochs(stopped.events) == {}


def test_trap_3_and_4_trials_results_and_rungs_are_those_of_an_undisturbed_search(
    stopped: Stopped, undisturbed: Undisturbed
) -> None:
    assert journaled_trials(stopped.events) == journaled_trials(undisturbed.events)
    assert comparable(stopped.last) == comparable(undisturbed.ended)


def test_trap_14_each_trial_has_its_one_run_of_before_and_each_metric_once(stopped: Stopped) -> None:
    assert records(MlflowClient(stopped.search.store), "tiny", "stopped") == records_by_journal(stopped.events)


def test_no_process_of_a_stopped_search_is_left(stopped: Stopped) -> None:
    assert stopped.search.command_line.wait_until_gone() == []
