"""SIGTERM to the driver and to all of Ray's processes at once, as systemd, Slurm and `timeout` send it."""

import os
import signal
import subprocess
from collections.abc import Callable

import pytest
from disturbances import DisturbedSearch, Leg, Undisturbed, reported
from mlflow.tracking import MlflowClient
from processes import Ended
from search_records import comparable, journaled_trials, statuses


def terminate_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def terminated(new_search: Callable[..., DisturbedSearch]) -> tuple[DisturbedSearch, Leg, dict[str, int], Ended]:
    """The search, how it was stopped, the statuses of its runs then, and how it came to its end."""
    search = new_search("terminated")
    leg = search.disturb(reported(3, 2), terminate_group)
    runs = statuses(MlflowClient(search.store), "tiny")
    return search, leg, runs, search.finish("--resume")


def test_trap_4_an_interrupt_ends_though_ray_is_gone(
    terminated: tuple[DisturbedSearch, Leg, dict[str, int], Ended],
) -> None:
    _, leg, runs, _ = terminated
    assert leg.ended.code == 3, leg.ended.err
    assert "search terminated.yaml --name terminated --resume" in leg.ended.err
    assert set(runs) <= {"FINISHED", "KILLED"}


def test_trap_4_and_it_resumes_as_if_it_had_not_been(
    terminated: tuple[DisturbedSearch, Leg, dict[str, int], Ended], undisturbed: Undisturbed
) -> None:
    search, _, _, last = terminated
    assert last.code == 0, last.err
    assert journaled_trials(search.events()) == journaled_trials(undisturbed.events)
    assert comparable(last) == comparable(undisturbed.ended)
